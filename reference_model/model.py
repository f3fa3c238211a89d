"""The reference GPT: defines what a checkpoint computes, in PyTorch, in one file for all families.

Sources: GPT-1 (Radford et al. 2018; openai/finetune-transformer-lm), GPT-2 (Radford et al. 2019;
openai/gpt-2 src/model.py), GPT-Neo (EleutherAI/gpt-neo), GPT-J (kingoflolz/mesh-transformer-jax),
GPT-NeoX (Black et al. 2022; EleutherAI/gpt-neox), rotary positions (Su et al. 2021).

Read it beside ``gptconvert/targets/onnx/graph.py``: the same functions in the same order under the same names.
Shapes: B batch, S new tokens, P past tokens, T = P + S, D n_embd, H heads, hd = D / H, F n_inner, V vocabulary.
Token ids outside the vocabulary and learned positions from n_ctx on raise ``IndexError``. Rotary positions are
computed, not looked up: they continue past n_ctx, where the model was never trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference_model.config import COUNTED_TASKS, OUTPUTS, GPTConfig, Rotary

KeyValue = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, KeyValue | None], tuple[Tensor, KeyValue]]

ACTIVATION: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_erf_10": lambda x: F.gelu(x).clamp(-10, 10),
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x) ** 2,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "silu": F.silu,
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    # The normal distribution function with mean √(1/2) and standard deviation √(1/4π), as rounded in MEGA's code.
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "sqrt_softplus": lambda x: F.softplus(x).sqrt(),
    "linear": lambda x: x,
}


def default_positions(task: str, attention_mask: Tensor, new_tokens: int) -> Tensor:
    """Positions of the new tokens if the caller passes none: [B, T] mask → [B, S].

    They count real tokens (leading padding gets 0) or slots, see ``COUNTED_TASKS``.
    """
    counted = attention_mask if task in COUNTED_TASKS else torch.ones_like(attention_mask)  # (B, T)
    return (counted.long().cumsum(1) - 1).clamp(min=0)[:, -new_tokens:]  # (B, S)


def visible(attention_mask: Tensor, new_tokens: int, window: int | None) -> Tensor:
    """Which keys each new query sees: [B, T] 0/1 mask → bool [B, 1, S, T].

    A query at absolute index q sees key k iff k <= q, the mask has k, and q - k < window.
    """
    total = attention_mask.shape[1]
    key = torch.arange(total)  # (T)
    query = key[total - new_tokens :, None]  # (S, 1)
    seen = key <= query  # (S, T)
    if window is not None:
        seen = seen & (query - key < window)  # (S, T)
    return seen & attention_mask.bool()[:, None, None, :]  # (B, 1, S, T)


def rotary_angles(rotary: Rotary, position_ids: Tensor, dtype: torch.dtype) -> KeyValue:
    """(cos, sin), each [B, 1, S, width], laid out for the pairing of ``rotary``."""
    frequency = torch.tensor(rotary.frequencies, dtype=torch.float64)  # (width/2)
    angle = position_ids[:, None, :, None].double() * frequency  # (B, 1, S, width/2)
    angle = angle.repeat_interleave(2, -1) if rotary.interleaved else torch.cat((angle, angle), -1)
    cos, sin = angle.cos() * rotary.magnitude, angle.sin() * rotary.magnitude  # (B, 1, S, width) each
    return cos.to(dtype), sin.to(dtype)


def rotate(rotary: Rotary, x: Tensor, angles: KeyValue) -> Tensor:
    """Rotate the first ``width`` features of each head: [B, H, S, hd] → [B, H, S, hd]."""
    turned, rest = x[..., : rotary.width], x[..., rotary.width :]  # (B, H, S, width), (B, H, S, hd - width)
    if rotary.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]  # (B, H, S, width/2) each
        other = torch.stack((-b, a), -1).flatten(-2)  # (B, H, S, width)
    else:
        a, b = turned.chunk(2, -1)  # (B, H, S, width/2) each
        other = torch.cat((-b, a), -1)  # (B, H, S, width)
    cos, sin = angles
    return torch.cat((turned * cos + other * sin, rest), -1)  # (B, H, S, hd)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
    """Attention of each new token to those it sees: scaled q, and k, v [B, H, S, hd] → [B, H, S, hd].

    Also returns past and new keys and values, [B, H, T, hd] each.
    """
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, H, T, hd)
    scores = q @ k.transpose(-1, -2)  # (B, H, S, T)
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)  # (B, H, S, T)
    return scores.softmax(-1) @ v, (k, v)  # (B, H, S, hd)


class Attention(nn.Module):
    """Multi-head self-attention over past and new tokens.

    Attributes:
        attend: the only step that mixes tokens; replaced to run several sequences packed into one.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.attend: Attend = attend
        self.scale = config.attn_scale[layer]
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.attn_out_bias)

    def forward(
        self, x: Tensor, seen: Tensor, angles: KeyValue | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        batch, new_tokens, width = x.shape
        heads, head_dim = self.config.n_head, self.config.head_dim
        q, k, v = (
            part.view(batch, new_tokens, heads, head_dim).transpose(1, 2)  # (B, H, S, hd)
            for part in self.c_attn(x).split(width, dim=2)  # 3 x (B, S, D)
        )
        if self.config.rotary is not None and angles is not None:
            q, k = rotate(self.config.rotary, q, angles), rotate(self.config.rotary, k, angles)
        mixed, present = self.attend(q * self.scale, k, v, seen, past)  # (B, H, S, hd)
        out = self.c_proj(mixed.transpose(1, 2).reshape(batch, new_tokens, width))  # (B, S, D)
        return out, present


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATION[config.activation]
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (B, S, F)
        out: Tensor = self.c_proj(x)  # (B, S, D)
        return out


class Block(nn.Module):
    """One layer: attention and MLP, combined as configured."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        if config.has_second_norm:
            self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        seen: Tensor,
        angles: KeyValue | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """[B, S, D] and :func:`visible` [B, 1, S, T] → [B, S, D] and this layer's keys and values [B, H, T, hd]."""
        if self.config.norm_position == "post":
            a, present = self.attn(x, seen, angles, past)  # (B, S, D)
            n = self.ln_1(x + a)  # (B, S, D)
            return self.ln_2(n + self.mlp(n)), present  # (B, S, D)
        n = self.ln_1(x)  # (B, S, D)
        a, present = self.attn(n, seen, angles, past)  # (B, S, D)
        if self.config.residual == "serial":
            x = x + a  # (B, S, D)
            return x + self.mlp(self.ln_2(x)), present  # (B, S, D)
        m = self.mlp(self.ln_2(x) if self.config.has_second_norm else n)  # (B, S, D)
        return x + a + m, present  # (B, S, D)


def table(rows: int, width: int) -> nn.Embedding:
    """An embedding with uninitialised values.

    Random ones, drawn on the meta device, would import PyTorch's compiler, which takes a second and creates a
    directory for its cache.
    """
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))  # (rows, width)


class Embedding(nn.Module):
    """Token vectors, plus position vectors if positions are learned."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = table(config.vocab_size, config.n_embd)
        if config.rotary is None:
            self.wpe = table(config.n_ctx, config.n_embd)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x: Tensor = self.wte(input_ids)  # (B, S, D)
        return x + self.wpe(position_ids) if hasattr(self, "wpe") else x  # (B, S, D)


class Head(nn.Module):
    """The layers after the last block: the final norm and the task's projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.n_embd
        if config.final_norm:
            self.ln_f = nn.LayerNorm(width, eps=config.norm_eps)
        if config.has_lm_head:
            self.lm_head = nn.Linear(width, config.vocab_size, bias=config.head_bias)
        if config.task == "text-classification":
            self.score = nn.Linear(width, config.n_labels, bias=False)
        if config.task == "token-classification":
            self.classifier = nn.Linear(width, config.n_labels)
        if config.task == "question-answering":
            self.qa_outputs = nn.Linear(width, 2)
        if config.task == "multiple-choice":
            self.mc_head = nn.Linear(width, 1)

    def per_token(self, x: Tensor) -> dict[str, Tensor]:
        """Every output of the task (``config.OUTPUTS``) for every token: [B, S, D] → name: [B, S, width]."""
        x = self.ln_f(x) if self.config.final_norm else x  # (B, S, D)
        return dict(zip(OUTPUTS[self.config.task], PROJECTIONS[self.config.task](self, x), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """The first output of :meth:`per_token`: for a language model, logits [B, S, V]."""
        return next(iter(self.per_token(x).values()))


PROJECTIONS: Mapping[str, Callable[[Head, Tensor], tuple[Tensor, ...]]] = {
    "text-generation": lambda head, x: (head.lm_head(x),),  # (B, S, V)
    "feature-extraction": lambda head, x: (x,),  # (B, S, D)
    "text-classification": lambda head, x: (head.score(x),),  # (B, S, K)
    "token-classification": lambda head, x: (head.classifier(x),),  # (B, S, K)
    "question-answering": lambda head, x: head.qa_outputs(x).split(1, -1),  # 2 x (B, S, 1)
    "multiple-choice": lambda head, x: (head.lm_head(x), head.mc_head(x)),  # (B, S, V), (B, S, 1)
}


def pooled(
    config: GPTConfig,
    values: Mapping[str, Tensor],
    input_ids: Tensor,
    mc_token_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The task's outputs from :meth:`Head.per_token`'s [B, S, width]; shapes in ``config.OUTPUTS``.

    Args:
        config: of the model.
        values: outputs of :meth:`Head.per_token`.
        input_ids: [B, S].
        mc_token_ids: index of the token that scores a choice, [B / choices, choices]; only for multiple-choice.
        attention_mask: [B, T]; only for ``last_token``. None for no padding.
    """
    if config.last_token:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        last = (torch.arange(mask.shape[1]) * (mask != 0)).argmax(1)  # (B)
        return {name: take(value, last)[:, None] for name, value in values.items()}  # (B, 1, V)
    if config.task == "text-classification":
        last = last_real(input_ids, config.pad_token_id)  # (B)
        return {name: take(value, last) for name, value in values.items()}
    if config.task == "question-answering":
        return {name: value.squeeze(-1) for name, value in values.items()}
    if config.task == "multiple-choice":
        scores = take(values["mc_logits"], mc_token_ids.flatten())  # (B, 1)
        logits = values["logits"]  # (B, S, V)
        return {
            "logits": logits.view(*mc_token_ids.shape, *logits.shape[1:]),
            "mc_logits": scores.view(mc_token_ids.shape),
        }
    return dict(values)


def last_real(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """Index of the last token that is not padding: [B, S] → [B].

    Padding, on either side, is detected by its id. Without a padding id it is the last token; if all tokens are
    padding, the first. (transformers does the same, and rejects a batch without a padding id.)
    """
    batch, new_tokens = input_ids.shape
    if pad_token_id is None:
        return torch.full((batch,), new_tokens - 1)
    return (torch.arange(new_tokens) * (input_ids != pad_token_id)).argmax(1)  # (B)


def take(x: Tensor, index: Tensor) -> Tensor:
    """One token of each sequence: [B, S, D] and [B] → [B, D]."""
    return x[torch.arange(len(x)), index]


class GPT(nn.Module):
    """A whole model: embedding, blocks, head. Each part also runs alone, for passes over one block at a time."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.head = Head(config)

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: Mapping[str, Tensor]) -> GPT:
        """A model whose parameters are ``weights`` (by canonical name) themselves, not copies.

        Raises:
            KeyError: a weight is missing.
        """
        with torch.device("meta"):
            model = cls(config)
        fill(model, lambda name: weights[name], config)
        return model.eval()

    def outputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Sequence[KeyValue] | None = None,
        mc_token_ids: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], list[KeyValue]]:
        """All outputs of the task and every layer's keys and values.

        Args:
            input_ids: [B, S]; for multiple-choice [B, choices, S], and likewise the next two.
            attention_mask: [B, T] of 0 and 1 in any pattern; all ones by default.
            position_ids: [B, S]; by default, :func:`default_positions`.
            past: keys and values [B, H, P, hd] of each layer.
            mc_token_ids: [B, choices], for multiple-choice; by default, the last token of each choice.

        Returns:
            outputs by name (``config.OUTPUTS``) and, per layer, keys and values [B, H, T, hd].
        """
        new_tokens, choices = input_ids.shape[-1], input_ids.shape[:-1]
        ids = input_ids.flatten(0, -2)  # (B, S); for multiple-choice B counts choices from here on
        total = new_tokens + (past[0][0].shape[2] if past else 0)
        mask = torch.ones(len(ids), total) if attention_mask is None else attention_mask.flatten(0, -2)  # (B, T)
        positions = default_positions(self.config.task, mask, new_tokens)  # (B, S)
        positions = positions if position_ids is None else position_ids.flatten(0, -2)  # (B, S)
        x = self.embedding(ids, positions)  # (B, S, D)
        angles = None
        if self.config.rotary is not None:
            angles = rotary_angles(self.config.rotary, positions, x.dtype)  # (B, 1, S, dim) each
        seen = {w: visible(mask, new_tokens, w) for w in set(self.config.attn_window)}  # (B, 1, S, T) each
        presents = []
        for i, block in enumerate(self.h):
            window = self.config.attn_window[i]
            x, present = block(x, seen[window], angles, past[i] if past else None)  # (B, S, D)
            presents.append(present)
        chosen = torch.full(choices, new_tokens - 1) if mc_token_ids is None else mc_token_ids  # (B, choices)
        return pooled(self.config, self.head.per_token(x), ids, chosen, mask), presents

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Sequence[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """The first output of :meth:`outputs` (for a language model, logits [B, S, V]) and the keys and values."""
        outputs, presents = self.outputs(input_ids, attention_mask, position_ids, past)
        return next(iter(outputs.values())), presents


def canonical_name(parameter: str, config: GPTConfig) -> str:
    """The canonical name of a parameter of :class:`GPT` (a tied head is the token embedding)."""
    if parameter == "head.lm_head.weight" and config.tied_head:
        return "wte.weight"
    return parameter.removeprefix("embedding.").removeprefix("head.")


def fill(module: nn.Module, weight: Callable[[str], Tensor], config: GPTConfig, prefix: str = "") -> None:
    """Load every parameter of ``module`` (the part of :class:`GPT` under ``prefix``) without copying."""
    state = {name: weight(canonical_name(prefix + name, config)) for name, _ in module.named_parameters()}
    module.load_state_dict(state, assign=True)
