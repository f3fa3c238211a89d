"""How a model is stored for llama.cpp: the architecture that computes it, and its tensors under GGUF's names.

llama.cpp has graphs for GPT-2 and GPT-NeoX. GPT-J and CodeGen are stored as ``phi2``, whose graph is theirs: one norm
feeds attention and MLP in parallel, and the head has a bias. It rotates half-split pairs, so the rows of q and k that
belong to a rotated pair move apart; and it requires biases that GPT-J lacks, which are zeros.
Sources: ggml-org/llama.cpp ``src/models/{gpt2,gptneox,phi2}.cpp``, ``src/llama-arch.cpp``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gptconvert.containers.gguf import TYPES, TensorType
from gptconvert.families.trainers.gguf import OUTPUT, gguf_name
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.encodings import VOCABULARY
from gptconvert.model.ggml import BLOCK, FORMATS, GgmlQuantised
from gptconvert.model.tensors import Array, Box, Computed, LazyTensor, Shape, filled
from gptconvert.model.transforms import cast, take_rows
from reference_model.config import GPTConfig

F32 = np.dtype("<f4")
#: Type of matrices whose rows cannot be cut into blocks, as in llama.cpp.
FALLBACK = "F16"
#: Type of the embedding and the head in files with fewer bits: they decide every token.
OF_VOCABULARY = "Q8_0"


@dataclass(frozen=True)
class Architecture:
    """A graph of llama.cpp.

    Attributes:
        name: llama.cpp's.
        residual: the values of ``GPTConfig.residual`` that it computes.
        rotary: whether positions are rotary rather than learned.
        own_head: whether the file needs the head even if it is the embedding.
        head_bias: whether the head has a bias.
    """

    name: str
    residual: tuple[str, ...]
    rotary: bool
    own_head: bool
    head_bias: bool


PHI2 = Architecture("phi2", ("parallel_one_norm",), rotary=True, own_head=True, head_bias=True)
#: Family → its graph.
ARCHITECTURES: Mapping[str, Architecture] = {
    "gpt2": Architecture("gpt2", ("serial",), rotary=False, own_head=False, head_bias=False),
    "gpt_neox": Architecture("gptneox", ("serial", "parallel"), rotary=True, own_head=True, head_bias=False),
    "gptj": PHI2,
    "codegen": PHI2,
}
#: Family without a graph → why.
REFUSED: Mapping[str, str] = {
    "gpt1": "it normalises after each residual sum, which no graph of llama.cpp does for a GPT",
    "gpt_neo": "layers that attend to nearby tokens only have no graph in llama.cpp with learned positions",
}
#: Activations that llama.cpp's table of the tanh GELU stands for: it has 11 bits, and the formulas differ by less.
GELUS = ("gelu_tanh", "gelu_erf")
#: Kinds of rotary scaling that are the plain rotation up to the context length, or have a key.
SCALINGS = ("dynamic", "linear")


def why_not(config: GPTConfig) -> list[str]:
    """All reasons why llama.cpp cannot compute a model of one of the families in :data:`ARCHITECTURES`."""
    architecture = ARCHITECTURES[config.family]
    reasons = []
    if config.task != "text-generation":
        reasons.append(f"it is a model for {config.task}, not a language model")
    if config.activation not in GELUS:
        reasons.append(f"activation is {config.activation!r}, not a GELU")
    if any(window is not None and window < config.n_ctx for window in config.attn_window):
        reasons.append("attention is limited to nearby tokens")
    if config.has_lm_head and config.head_bias and not architecture.head_bias:
        reasons.append("its head has a bias")
    if config.rotary is not None:
        scaling = config.rotary.scaling
        if scaling is not None and scaling.kind not in SCALINGS:
            reasons.append(f"rotary positions are scaled ({scaling.kind})")
        if not config.rotary.dim or config.rotary.dim % 2:
            reasons.append(f"the number of rotated features per head is {config.rotary.dim}, not even and above 0")
    return reasons


def type_of(kind: str, name: str, shape: Shape) -> str:
    """The type of a weight in a file of type ``kind`` (``Q4_0``): norms, biases and positions stay float32."""
    if len(shape) < 2 or name == "wpe.weight":
        return "F32"
    if TYPES[kind].dtype is not None:
        return kind
    if shape[1] % BLOCK:
        return FALLBACK
    return OF_VOCABULARY if name in VOCABULARY else kind


def as_computed(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with attention scores divided by the square root of the head size, as llama.cpp does.

    Another factor of a layer's scores becomes one of its query weights, rounded once to float32.
    """
    config = checkpoint.config
    usual = config.head_dim**-0.5
    factors = [scale / usual for scale in config.attn_scale]
    if all(factor == 1 for factor in factors):
        return checkpoint
    weights = dict(checkpoint.weights)
    for layer, factor in enumerate(factors):
        for name in (f"h.{layer}.attn.c_attn.{kind}" for kind in ("weight", "bias")):
            if factor != 1 and name in weights:
                weights[name] = _scaled(weights[name], config.n_embd, factor)
    config = dataclasses.replace(config, attn_scale=(usual,) * config.n_layer)
    return dataclasses.replace(checkpoint, config=config, weights=weights)


def _scaled(weight: LazyTensor, rows: int, factor: float) -> LazyTensor:
    """The first ``rows`` of a weight times ``factor``, in float32."""

    def read(box: Box) -> Array:
        values = weight.read(box).astype(np.float64)
        values[: max(0, rows - box[0].start)] *= factor
        return values.astype(F32)

    return Computed(read, F32, weight.shape)


def stored_as(checkpoint: Checkpoint, type_of: Callable[[str, Shape], str]) -> Checkpoint:
    """The checkpoint with its weights as they are in a file in which each has this type."""

    def stored(name: str, weight: LazyTensor) -> LazyTensor:
        kind = TYPES[type_of(name, weight.shape)]
        if kind.dtype is not None:
            return cast(weight, kind.dtype)
        form = FORMATS[kind.name]
        return form.decode(form.encode(weight), weight.shape)

    weights = {name: stored(name, weight) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


@dataclass(frozen=True)
class Item:
    """One tensor of a file.

    Attributes:
        name: GGUF's.
        type: how it is stored.
        shape: of its elements.
        tensor: its bytes.
        weight: canonical name of the weight that it stores; None for zeros.
    """

    name: str
    type: TensorType
    shape: Shape
    tensor: LazyTensor
    weight: str | None


def items_of(checkpoint: Checkpoint) -> Iterator[Item]:
    """The tensors of a model as stored (:func:`stored_as`): the embedding, the layers, the final norm, the head."""
    config, architecture = checkpoint.config, ARCHITECTURES[checkpoint.config.family]
    tops = [name for name in checkpoint.weights if not name.startswith("h.")]
    for name in sorted(name for name in tops if name.startswith(("wte.", "wpe."))):
        yield _item(checkpoint, name)
    for layer in range(config.n_layer):
        prefix = f"h.{layer}."
        for name in sorted(name for name in checkpoint.weights if name.startswith(prefix)):
            yield _item(checkpoint, name)
        if not config.qkv_bias:
            yield _zeros(f"{prefix}attn.c_attn.bias", 3 * config.n_embd)
        if not config.attn_out_bias:
            yield _zeros(f"{prefix}attn.c_proj.bias", config.n_embd)
    for name in sorted(name for name in tops if name.startswith("ln_f.")):
        yield _item(checkpoint, name)
    if config.tied_head and architecture.own_head:
        yield dataclasses.replace(_item(checkpoint, "wte.weight"), name=OUTPUT)
    for name in sorted(name for name in tops if name.startswith("lm_head.")):
        yield _item(checkpoint, name)
    if architecture.head_bias and not config.head_bias:
        yield _zeros("lm_head.bias", config.vocab_size)


def _zeros(name: str, size: int) -> Item:
    """A bias that the graph requires and the model lacks."""
    return Item(gguf_name(name), TYPES["F32"], (size,), filled(0.0, F32, (size,)), None)


def _item(checkpoint: Checkpoint, name: str) -> Item:
    weight = checkpoint.weights[name]
    if isinstance(weight, GgmlQuantised):
        kind, tensor = TYPES[weight.format.name], weight.encoded
    else:
        kind, tensor = next(kind for kind in TYPES.values() if kind.dtype == weight.dtype), weight
    return Item(gguf_name(name), kind, weight.shape, in_file_order(checkpoint.config, name, tensor), name)


def in_file_order(config: GPTConfig, name: str, tensor: LazyTensor) -> LazyTensor:
    """A weight, or its bytes, with the rows of adjacent rotary pairs of q and k moved to two halves of each head."""
    size, rotary = config.n_embd, config.rotary
    if ".attn.c_attn." not in name or rotary is None or not rotary.interleaved:
        return tensor
    runs: list[tuple[int, int]] = []
    for head in range(0, 2 * size, config.head_dim):  # of q, then of k
        for first in (0, 1):
            runs += [(row, row + 1) for row in range(head + first, head + rotary.width, 2)]
        runs.append((head + rotary.width, head + config.head_dim))
    return take_rows(tensor, [*(run for run in runs if run[0] < run[1]), (2 * size, 3 * size)])
