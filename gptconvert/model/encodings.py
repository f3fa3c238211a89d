"""Encodings, the lossy counterparts of transforms: a weight is stored as parts, and the parts decode to a weight.

Verification compares the stored parts byte for byte with the encoded source weight, and runs the reference model on
the decoded weights. A new storage type takes one encoding, and one line in :data:`CASTS` or :data:`QUANTISED`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gptconvert.model.blocks import CODES, BlockEncoding, BlockFormat, Quantised
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import ELEMENT_TYPES
from gptconvert.model.tensors import LazyTensor, Shape
from gptconvert.model.transforms import cast
from reference_model.config import GPTConfig

#: Suffix of a part's name → the part. A weight stored as one tensor has the single suffix "".
Parts = Mapping[str, LazyTensor]


class Encoding(Protocol):
    """How a weight is stored."""

    def encode(self, weight: LazyTensor) -> Parts:
        """The tensors to store, lazily."""
        ...

    def decode(self, parts: Parts, shape: Shape) -> LazyTensor:
        """The weight of this shape that the stored tensors represent, lazily."""
        ...


@dataclass(frozen=True)
class CastTo:
    """Storage in another float type, rounded to nearest even."""

    dtype: np.dtype[np.generic]

    def encode(self, weight: LazyTensor) -> Parts:
        return {"": cast(weight, self.dtype)}

    def decode(self, parts: Parts, shape: Shape) -> LazyTensor:
        return parts[""]


@dataclass(frozen=True)
class Quantisation:
    """A choice of block encodings for the matrices of a model.

    Attributes:
        option: as in ``--quantize``.
        variant: suffix of the file name, which is transformers.js's.
        js_dtype: the ``dtype`` by which transformers.js loads it.
        bits: of most matrices of the blocks.
        search: whether scales of 4-bit codes are searched.
        mixed: whether some matrices of the first and last blocks, which lose most, have 8 bits.
        max_kl: default limit of the mean KL divergence from the source model, in nats per token.
        title: in tables.
    """

    option: str
    variant: str
    js_dtype: str
    bits: int
    search: bool
    mixed: bool
    max_kl: float
    title: str

    def encoding(self, config: GPTConfig, weight: str, block: int, columns: int) -> BlockEncoding | None:
        """The encoding of a weight; None for weights that stay float: norms, biases, positions and small heads.

        Args:
            config: of the model.
            weight: canonical name.
            block: elements that share a scale, as in ``--block-size``.
            columns: of the weight.
        """
        bits = self._bits(config, weight)
        if bits is None:
            return None
        if bits > self.bits:
            block = _wider(block, columns)
        return BlockEncoding(BlockFormat(bits, block), self.search and bits < 8)

    def _bits(self, config: GPTConfig, weight: str) -> int | None:
        if (
            weight in VOCABULARY
        ):  # decides every token, and an embedding of 4 bits needs operators that are not portable
            return 8
        _, _, name = weight.rpartition(".attn.") if ".attn." in weight else weight.rpartition(".mlp.")
        if name not in MATRICES:
            return None
        layer, edge = int(weight.split(".")[1]), max(1, config.n_layer // 8)
        outer = layer < edge or layer >= config.n_layer - edge
        sensitive = weight.endswith((".attn.c_attn.weight", ".mlp.c_proj.weight"))
        return 8 if self.mixed and outer and sensitive else self.bits


#: Matrices with a row per token of the vocabulary.
VOCABULARY = ("wte.weight", "lm_head.weight")
#: Matrices of a block, after ``attn.`` or ``mlp.``.
MATRICES = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
#: Value of ``--dtype`` → encoding of every weight.
CASTS: Mapping[str, Encoding] = {row.option: CastTo(row.dtype) for row in ELEMENT_TYPES if row.option is not None}
#: Value of ``--quantize`` → the quantisation.
QUANTISED: Mapping[str, Quantisation] = {
    q.option: q
    for q in (
        Quantisation("q8", "quantized", "q8", 8, False, False, 0.01, "8 bits"),
        Quantisation("q4", "q4", "q4", 4, True, True, 0.2, "4 bits, 8 where they matter most"),
        Quantisation("q4:plain", "q4", "q4", 4, False, False, 0.2, "4 bits, embedding and head 8"),
    )
}


def _wider(block: int, columns: int) -> int:
    """The block of 8-bit matrices in a 4-bit graph: up to four times as wide, if no row then needs padding.

    Scales are a ninth of an 8-bit matrix in blocks of 32. In blocks of 128, GPT-2 124M is 4 % smaller, its mean KL
    divergence 1 % larger, and decoding as fast.
    """
    return max((wide for wide in (2 * block, 4 * block) if wide <= 128 and columns % wide == 0), default=block)


class Calibrator(Protocol):
    """Chooses the 4-bit codes of a model."""

    def codes(self, name: str, encoding: BlockEncoding) -> LazyTensor:
        """The packed codes of a weight for the scales of ``encoding``."""
        ...


def quantised(
    checkpoint: Checkpoint, recipe: Quantisation, block: int, calibrator: Calibrator | None = None
) -> Checkpoint:
    """The checkpoint with its matrices in blocks of ``block`` elements, and all other weights in float32.

    ``calibrator`` chooses the 4-bit codes; by default, each is the nearest.
    """

    def stored(name: str, weight: LazyTensor) -> LazyTensor:
        encoding = recipe.encoding(checkpoint.config, name, block, weight.shape[-1])
        if encoding is None:
            return cast(weight, np.dtype(np.float32))
        parts = encoding.encode(weight)
        if calibrator is not None and encoding.format.bits < 8:
            parts = {**parts, CODES: calibrator.codes(name, encoding)}
        return encoding.decode(parts, weight.shape)

    weights = {name: stored(name, weight) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def stored_tensors(checkpoint: Checkpoint) -> Iterator[LazyTensor]:
    """The tensors that store the weights: parts of quantised ones, and the others themselves."""
    for weight in checkpoint.weights.values():
        yield from weight.parts.values() if isinstance(weight, Quantised) else (weight,)


def cast_to(checkpoint: Checkpoint, name: str | None) -> Checkpoint:
    """The checkpoint with its weights in the type ``name`` of :data:`CASTS`; None keeps them unchanged."""
    if name is None:
        return checkpoint
    weights = {
        key: CASTS[name].decode(CASTS[name].encode(weight), weight.shape)
        for key, weight in checkpoint.weights.items()
    }
    return dataclasses.replace(checkpoint, weights=weights)
