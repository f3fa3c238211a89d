"""ggml's block types: rows in blocks of 32, each with one float16 scale before its codes. Bytes are llama.cpp's.

The arithmetic is that of the reference quantisers (``ggml/src/ggml-quants.c``), in single float32 operations, so the
bytes are the same on every machine. A row whose length is not a multiple of 32 has no block form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import UnsupportedError
from gptconvert.model.blocks import by_slabs
from gptconvert.model.tensors import Array, Box, LazyTensor, Shape

#: Elements of a block.
BLOCK = 32

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class GgmlFormat:
    """One block type.

    Attributes:
        name: llama.cpp's.
        nbytes: of a block.
        quantise: blocks [n, 32] → scales [n], and the bytes after each [n, nbytes - 2].
        codes: the bytes after the scales → signed codes [n, 32], as float32.
    """

    name: str
    nbytes: int
    quantise: Callable[[Floats], tuple[Floats, Bytes]]
    codes: Callable[[Bytes], Floats]

    def encode(self, weight: LazyTensor) -> dict[str, LazyTensor]:
        """The bytes to store for a matrix [N, K], computed when they are read: uint8 [N, bytes of a row]."""
        return {"": _Encoded(weight, self)}

    def decode(self, parts: Mapping[str, LazyTensor], shape: Shape) -> GgmlQuantised:
        """The matrix [N, K] that stored bytes represent."""
        return GgmlQuantised(parts[""], self, shape)


def _symmetric(zero: int) -> Callable[[Floats], tuple[Floats, NDArray[np.uint8]]]:
    """Scales and codes [n, 32] from 0 to 2 ``zero`` - 1; the element of largest magnitude gets the code 0."""

    def quantise(blocks: Floats) -> tuple[Floats, NDArray[np.uint8]]:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
        scales = largest / np.float32(-zero)
        scaled = blocks * _reciprocal(scales)
        scaled += np.float32(zero + 0.5)
        return scales[:, 0], np.minimum(np.trunc(scaled), 2 * zero - 1).astype(np.uint8)

    return quantise


_FOUR, _FIVE = _symmetric(8), _symmetric(16)


def _reciprocal(scales: Floats) -> Floats:
    """1 / scales; 0 where that is infinite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0)).astype(np.float32)


def _halves(codes: NDArray[np.uint8]) -> Bytes:
    """Low four bits of the codes [n, 32] → [n, 16]: elements 0 to 15 in the low halves, 16 to 31 in the high ones."""
    packed: Bytes = np.bitwise_or(codes[:, :16] & 15, (codes[:, 16:] & 15) << 4, dtype=np.uint8)
    return packed


def _unhalve(packed: Bytes) -> NDArray[np.uint8]:
    return np.concatenate((packed & 15, packed >> 4), 1)


def _quantise_q8(blocks: Floats) -> tuple[Floats, Bytes]:
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    scaled = blocks * _reciprocal(scales)
    size = np.abs(scaled)
    whole = np.floor(size)
    size -= whole
    size *= 2
    whole += np.floor(size)  # halves are rounded away from zero
    return scales[:, 0], np.copysign(whole, scaled).astype(np.int8).view(np.uint8)


def _quantise_q4(blocks: Floats) -> tuple[Floats, Bytes]:
    scales, codes = _FOUR(blocks)
    return scales, _halves(codes)


def _quantise_q5(blocks: Floats) -> tuple[Floats, Bytes]:
    scales, codes = _FIVE(blocks)
    high = np.packbits(codes >> 4, axis=-1, bitorder="little")  # [n, 4]
    return scales, np.concatenate((high, _halves(codes)), 1)


def _codes_q5(packed: Bytes) -> Floats:
    high = np.unpackbits(packed[:, :4], axis=-1, bitorder="little")  # [n, 32]
    return (_unhalve(packed[:, 4:]) | high << 4).astype(np.float32) - np.float32(16)


FORMATS: Mapping[str, GgmlFormat] = {
    form.name: form
    for form in (
        GgmlFormat("Q8_0", 34, _quantise_q8, lambda packed: packed.view(np.int8).astype(np.float32)),
        GgmlFormat("Q5_0", 22, _quantise_q5, _codes_q5),
        GgmlFormat("Q4_0", 18, _quantise_q4, lambda p: _unhalve(p).astype(np.float32) - np.float32(8)),
    )
}


@dataclass(frozen=True, slots=True)
class _Encoded(LazyTensor):
    """The stored bytes of a matrix."""

    weight: LazyTensor
    format: GgmlFormat
    shape: Shape = field(init=False)
    dtype: np.dtype[np.generic] = field(default=np.dtype(np.uint8), init=False)

    def __post_init__(self) -> None:
        rows, columns = self.weight.shape
        object.__setattr__(self, "shape", (rows, columns // BLOCK * self.format.nbytes))

    def read(self, box: Box | None = None) -> Array:
        rows = slice(0, self.shape[0]) if box is None else box[0]
        found = by_slabs(self.weight, rows, lambda _, values: self._encode(values))
        return found if box is None else found[:, box[1]]

    def _encode(self, values: Array) -> Array:
        blocks = np.ascontiguousarray(values, np.float32).reshape(-1, BLOCK)
        scales, codes = self.format.quantise(blocks)
        with np.errstate(over="ignore"):
            halves = scales.astype("<f2")
        if not np.isfinite(halves).all() and np.isfinite(blocks).all():  # the scan of the source finds NaN
            raise UnsupportedError(
                f"a weight is too large for {self.format.name}, whose scales are float16",
                found=f"{np.abs(blocks).max():.4g}",
                hint="choose another --gguf-type, such as f32",
            )
        joined = np.concatenate((halves.view(np.uint8).reshape(-1, 2), codes), 1)
        return joined.reshape(len(values), -1)


@dataclass(frozen=True, slots=True)
class GgmlQuantised(LazyTensor):
    """A float32 matrix [N, K], stored in blocks.

    Attributes:
        encoded: the stored bytes.
        format: of the blocks.
    """

    encoded: LazyTensor
    format: GgmlFormat
    shape: Shape
    dtype: np.dtype[np.generic] = field(default=np.dtype(np.float32), init=False)

    def read(self, box: Box | None = None) -> Array:
        rows = slice(0, self.shape[0]) if box is None else box[0]
        whole = by_slabs(self.encoded, rows, lambda _, packed: self._decode(packed))
        return whole if box is None else whole[:, box[1]]

    def _decode(self, packed: Array) -> Array:
        blocks = np.ascontiguousarray(packed, np.uint8).reshape(-1, self.format.nbytes)
        scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        values = self.format.codes(np.ascontiguousarray(blocks[:, 2:]))
        values *= scales
        return values.reshape(len(packed), self.shape[1])
