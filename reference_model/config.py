"""GPTConfig: the description of an architecture. Does not import torch.

Nothing is assumed: every difference between GPT-1, GPT-2, GPT-Neo, GPT-J and GPT-NeoX is a field.
Symbols used in shapes throughout the project: V vocab_size, C n_ctx, D n_embd, L n_layer, H n_head, F n_inner,
hd = D / H, B batch, S new tokens, P past tokens, T = P + S, K n_labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from reference_model.rotary import Rotary as Rotary

#: Activations, named by formula (``reference_model/model.py``): frameworks use the same name for different formulas.
ACTIVATIONS = (
    "gelu_tanh",
    "gelu_erf",
    "gelu_erf_10",
    "gelu_sigmoid",
    "relu",
    "relu_squared",
    "relu6",
    "leaky_relu",
    "silu",
    "hardswish",
    "mish",
    "tanh",
    "sigmoid",
    "laplace",
    "sqrt_softplus",
    "linear",
)
#: Outputs of each task, as named by Hugging Face's ONNX exporter. All graphs and the verifier use this table.
OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "text-generation": ("logits",),  # [B, S, V]
    "feature-extraction": ("last_hidden_state",),  # [B, S, D]
    "text-classification": ("logits",),  # [B, K]
    "token-classification": ("logits",),  # [B, S, K]
    "question-answering": ("start_logits", "end_logits"),  # [B, S] each
    "multiple-choice": ("logits", "mc_logits"),  # [B, choices, S, V], [B, choices]
}
#: Inputs of each task besides past keys and values. Without ``position_ids``, ``COUNTED_TASKS`` decides.
INPUTS: Mapping[str, tuple[str, ...]] = {
    "text-generation": ("input_ids", "attention_mask", "position_ids"),
    "feature-extraction": ("input_ids", "attention_mask"),
    "text-classification": ("input_ids", "attention_mask"),
    "token-classification": ("input_ids", "attention_mask"),
    "question-answering": ("input_ids", "attention_mask"),
    "multiple-choice": ("input_ids", "attention_mask", "mc_token_ids"),
}
TASKS = tuple(OUTPUTS)
#: Tasks that run token by token, for which caching keys and values pays.
CACHED_TASKS = frozenset({"text-generation", "feature-extraction"})
#: Tasks whose positions count the attention mask's ones by default, as in transformers' ``generate``. For all others,
#: they count slots, padding included, as in transformers' ``model(input_ids, attention_mask)``.
COUNTED_TASKS = frozenset({"text-generation"})
#: Tasks whose number of labels depends on the checkpoint.
LABELLED_TASKS = frozenset({"text-classification", "token-classification"})

NormPosition = Literal["pre", "post"]
Residual = Literal["serial", "parallel", "parallel_one_norm"]
MAX_SIZE = 1 << 31
#: Largest epsilon: its square root, and so every norm, stays far from float32's limits.
MAX_EPS = 1e30


class ConfigError(ValueError):
    """An impossible configuration.

    Attributes:
        key: name of the field.
        value: its value.
        why: why the value is impossible.
    """

    def __init__(self, key: str, value: object, why: str) -> None:
        super().__init__(f"{key} = {value!r}: {why}")
        self.key, self.value, self.why = key, value, why


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """One architecture.

    Attributes:
        family: registry name (``gpt2``).
        norm_position: ``post`` normalises after each residual sum (GPT-1), ``pre`` before each sub-layer.
        final_norm: whether a norm follows the last block.
        residual: ``serial``; ``parallel``: x + attn(ln_1 x) + mlp(ln_2 x) (NeoX); ``parallel_one_norm``:
            both branches read ln_1 (GPT-J).
        rotary: None for learned positions.
        activation: one of :data:`ACTIVATIONS`.
        attn_scale: factor of query·key, per layer.
        attn_window: how many keys a query sees, its own included, per layer; None for all.
        tied_head: whether the language-model head is the token embedding.
        head_bias: whether the language-model head has a bias.
        task: one of :data:`TASKS`.
        n_labels: K; 0 if the task has no labels.
        pad_token_id: text classification classifies the last other token; None to classify the last position.
        last_token: whether a language model returns the logits of each row's last real token only, [B, 1, V].
    """

    family: str
    vocab_size: int
    n_ctx: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    attn_scale: tuple[float, ...]
    attn_window: tuple[int | None, ...]
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-5
    norm_position: NormPosition = "pre"
    final_norm: bool = True
    residual: Residual = "serial"
    rotary: Rotary | None = None
    qkv_bias: bool = True
    attn_out_bias: bool = True
    tied_head: bool = True
    head_bias: bool = False
    task: str = "text-generation"
    n_labels: int = 0
    pad_token_id: int | None = None
    last_token: bool = False

    def __post_init__(self) -> None:
        for key in ("vocab_size", "n_ctx", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MAX_SIZE:
                raise ConfigError(key, value, f"must be a whole number from 1 to {MAX_SIZE - 1}")
        if self.n_layer > 10_000:
            raise ConfigError("n_layer", self.n_layer, "no GPT has more than 10000 layers")
        if self.n_embd % self.n_head:
            raise ConfigError("n_head", self.n_head, f"does not divide n_embd = {self.n_embd}")
        if not 0 <= self.norm_eps <= MAX_EPS:
            raise ConfigError("norm_eps", self.norm_eps, f"must be from 0 to {MAX_EPS:g}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError("activation", self.activation, f"must be one of {', '.join(ACTIVATIONS)}")
        if self.task not in TASKS:
            raise ConfigError("task", self.task, f"must be one of {', '.join(TASKS)}")
        if self.task in LABELLED_TASKS and not 0 < self.n_labels < MAX_SIZE:
            raise ConfigError("n_labels", self.n_labels, f"{self.task} needs at least one label")
        if self.last_token and self.task != "text-generation":
            raise ConfigError("last_token", self.last_token, f"{self.task} is not a language model")
        if len(self.attn_scale) != self.n_layer or len(self.attn_window) != self.n_layer:
            raise ConfigError("n_layer", self.n_layer, "attn_scale and attn_window need one entry per layer")
        if self.rotary is not None and (problem := self.rotary.problem(self.head_dim)):
            raise ConfigError(*problem)

    @property
    def head_dim(self) -> int:
        """Features per head, hd."""
        return self.n_embd // self.n_head

    @property
    def has_second_norm(self) -> bool:
        """Whether a block has ``ln_2``."""
        return self.residual != "parallel_one_norm"

    @property
    def padding_id(self) -> int | None:
        """``pad_token_id``; None if it is outside the vocabulary, where no input can contain it."""
        pad = self.pad_token_id
        return pad if pad is not None and 0 <= pad < self.vocab_size else None

    @property
    def has_lm_head(self) -> bool:
        """Whether the task scores the vocabulary."""
        return self.task in ("text-generation", "multiple-choice")

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)
