"""Block quantisation: a matrix stored as 4- or 8-bit codes, with one float32 scale for each block of a row.

Layout and arithmetic are those of onnxruntime's ``MatMulNBits`` (com.microsoft, version 1): codes are unsigned with
the zero point ``2 ** (bits - 1)``, low nibble first, and ``weight = (code - zero point) * scale``.

The bytes are the same on every machine: the recipe uses only single float32 operations (+, -, *, /, floor, compare),
which IEEE 754 defines exactly, and sums in a fixed order. It uses no BLAS and no ``numpy.sum``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gptconvert.model.tensors import Array, Box, LazyTensor, Shape

#: Suffixes of the stored parts.
CODES, SCALES = "codes", "scales"
#: Source bytes quantised at a time, and rows per step of the search: few enough to stay in the processor's cache.
SLAB_BYTES, SEARCH_ROWS = 8 << 20, 64
#: Multiples of the plain scale that the search tries. Each is then refitted to its codes by least squares.
CANDIDATES = (1.04, 0.96, 0.9, 0.84, 0.78)

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockFormat:
    """How the codes of a matrix are stored.

    Attributes:
        bits: of a code, 4 or 8.
        block: elements of a row that share one scale: a power of two, at least 16.
    """

    bits: int
    block: int

    @property
    def zero(self) -> int:
        """The code of 0.0."""
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        """Blocks of a row; zeros fill the last."""
        return -(-columns // self.block)

    def codes_shape(self, shape: Shape) -> Shape:
        """[N, K] → [N, blocks, bytes]."""
        return shape[0], self.blocks(shape[1]), self.block * self.bits // 8

    def scales_shape(self, shape: Shape) -> Shape:
        """[N, K] → [N, blocks]."""
        return shape[0], self.blocks(shape[1])

    def in_blocks(self, rows: Array) -> Floats:
        """[n, K] → float32 [n, blocks, block], padded with zeros."""
        values = np.ascontiguousarray(rows, np.float32)
        missing = -values.shape[1] % self.block
        if missing:
            values = np.pad(values, ((0, 0), (0, missing)))
        return values.reshape(len(values), -1, self.block)

    def encode(self, blocks: Floats, scales: Floats) -> Codes:
        """The nearest codes for given scales: [n, blocks, block], [n, blocks] → unpacked codes [n, blocks, block]."""
        scaled = np.multiply(blocks, _reciprocal(scales)[..., None])
        scaled += np.float32(self.zero + 0.5)
        np.floor(scaled, out=scaled)
        np.clip(scaled, 0, 2 * self.zero - 1, out=scaled)
        return scaled.astype(np.uint8)

    def decode(self, codes: Codes, scales: Floats) -> Floats:
        """Unpacked codes [n, blocks, block] → float32 values of the same shape."""
        centred = codes.astype(np.float32)
        centred -= np.float32(self.zero)
        centred *= scales[..., None]
        return centred

    def pack(self, codes: Codes) -> Codes:
        """[n, blocks, block] → [n, blocks, bytes]."""
        return codes if self.bits == 8 else np.bitwise_or(codes[..., ::2], codes[..., 1::2] << 4, dtype=np.uint8)

    def unpack(self, packed: Codes) -> Codes:
        """[n, blocks, bytes] → [n, blocks, block]."""
        if self.bits == 8:
            return packed
        codes = np.empty((*packed.shape[:-1], self.block), np.uint8)
        codes[..., ::2], codes[..., 1::2] = packed & 15, packed >> 4
        return codes

    def plain_scales(self, blocks: Floats) -> Floats:
        """The scale that gives the element of largest magnitude the code 0, whose range is one step longer."""
        high, low = blocks.max(axis=-1), blocks.min(axis=-1)
        extreme = np.where(high > -low, high, low)
        return np.asarray(extreme / np.float32(-self.zero), np.float32)

    def searched_scales(self, blocks: Floats) -> Floats:
        """The scale with the least squared error, among the candidates and their least-squares refits."""
        plain = self.plain_scales(blocks)
        best, least = plain, self._error(blocks, plain)
        for factor in CANDIDATES:
            codes = self.encode(blocks, plain * np.float32(factor)).astype(np.float32)
            codes -= np.float32(self.zero)
            fit = ordered_sum(codes * blocks) * _reciprocal(ordered_sum(codes * codes))
            error = self._error(blocks, fit)
            better = (error < least) & (fit != 0)
            best, least = np.where(better, fit, best), np.where(better, error, least)
        return np.asarray(best, np.float32)

    def _error(self, blocks: Floats, scales: Floats) -> Floats:
        difference = self.decode(self.encode(blocks, scales), scales)
        difference -= blocks
        difference *= difference
        return ordered_sum(difference)


def ordered_sum(values: Floats) -> Floats:
    """Sum over the last axis, whose length is a power of two, in an order that does not depend on the machine."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _reciprocal(values: Floats) -> Floats:
    """1 / values; 0 where that is infinite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / values
    return np.where(np.isfinite(inverse), inverse, np.float32(0)).astype(np.float32)


@dataclass(frozen=True)
class BlockEncoding:
    """A lossy storage form of matrices.

    Attributes:
        format: of the codes.
        search: whether the scales are searched; otherwise they follow from the largest element of each block.
    """

    format: BlockFormat
    search: bool = False

    def encode(self, weight: LazyTensor) -> dict[str, LazyTensor]:
        """The parts to store, computed when they are read: codes [N, blocks, bytes] and scales [N, blocks].

        ``weight`` is [N, K], of any float type.
        """
        scales = _Scales(weight, self)
        return {CODES: _Codes(weight, scales, self.format), SCALES: scales}

    def decode(self, parts: dict[str, LazyTensor], shape: Shape) -> Quantised:
        """The matrix [N, K] that the parts represent."""
        return Quantised(parts[CODES], parts[SCALES], self.format, shape)


@dataclass(frozen=True, slots=True)
class Quantised(LazyTensor):
    """A float32 matrix [N, K], stored as codes and scales."""

    codes: LazyTensor
    scales: LazyTensor
    format: BlockFormat
    shape: Shape
    dtype: np.dtype[np.generic] = field(default=np.dtype(np.float32), init=False)

    @property
    def parts(self) -> dict[str, LazyTensor]:
        """Suffix → stored tensor."""
        return {CODES: self.codes, SCALES: self.scales}

    def read(self, box: Box | None = None) -> Array:
        rows = slice(0, self.shape[0]) if box is None else box[0]
        columns = slice(0, self.shape[1]) if box is None else box[1]
        codes = np.asarray(_rows(self.codes, rows), np.uint8)
        values = self.format.decode(self.format.unpack(codes), np.asarray(_rows(self.scales, rows), np.float32))
        return values.reshape(len(values), -1)[:, : self.shape[1]][:, columns]


class _Scales(LazyTensor):
    """The scales of a matrix.

    Codes and scales are read one after the other, so the scales that the codes needed are kept until they have been
    read themselves: a search runs once.
    """

    def __init__(self, weight: LazyTensor, encoding: BlockEncoding) -> None:
        self.weight, self.encoding = weight, encoding
        self.shape, self.dtype = encoding.format.scales_shape(weight.shape), np.dtype(np.float32)
        self._kept: dict[int, Floats] = {}  # row → its scales
        self._lock = threading.Lock()

    def read(self, box: Box | None = None) -> Array:
        rows = slice(0, self.shape[0]) if box is None else box[0]
        with self._lock:
            kept = [self._kept.pop(row, None) for row in range(rows.start, rows.stop)]
        found = [scales for scales in kept if scales is not None]
        if len(found) == len(kept) and kept:
            scales: Array = np.stack(found)
        else:
            scales = by_slabs(self.weight, rows, lambda start, values: self._computed(self._blocks(values)))
        return scales if box is None else scales[:, box[1]]

    def of(self, start: int, blocks: Floats) -> Floats:
        """The scales [n, blocks] of ``blocks`` [n, blocks, block], the rows from ``start``; they are kept."""
        scales = self._computed(blocks)
        if self.encoding.search:
            with self._lock:
                self._kept.update(enumerate(scales, start))
        return scales

    def _blocks(self, values: Array) -> Floats:
        return self.encoding.format.in_blocks(values)

    def _computed(self, blocks: Floats) -> Floats:
        form = self.encoding.format
        if not self.encoding.search:
            return form.plain_scales(blocks)
        steps = range(0, len(blocks), SEARCH_ROWS)
        return np.concatenate([form.searched_scales(blocks[i : i + SEARCH_ROWS]) for i in steps])


@dataclass(frozen=True, slots=True, eq=False)
class _Codes(LazyTensor):
    """The packed codes of a matrix."""

    weight: LazyTensor
    scales: _Scales
    format: BlockFormat
    shape: Shape = field(init=False)
    dtype: np.dtype[np.generic] = field(default=np.dtype(np.uint8), init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.format.codes_shape(self.weight.shape))

    def read(self, box: Box | None = None) -> Array:
        wanted = slice(0, self.shape[0]) if box is None else box[0]

        def encode(start: int, values: Array) -> Array:
            blocks = self.format.in_blocks(values)
            return self.format.pack(self.format.encode(blocks, self.scales.of(start, blocks)))

        found = by_slabs(self.weight, wanted, encode)
        return found if box is None else found[(slice(None), *box[1:])]


def _rows(tensor: LazyTensor, rows: slice) -> Array:
    return tensor.read((rows, *(slice(0, n) for n in tensor.shape[1:])))


def by_slabs(weight: LazyTensor, rows: slice, function: Callable[[int, Array], Array]) -> Array:
    """``function`` of the first row's number and the rows, a slab of a matrix at a time, concatenated."""
    step = max(1, SLAB_BYTES // max(1, weight.shape[1] * 4) // SEARCH_ROWS) * SEARCH_ROWS
    starts = range(rows.start, rows.stop, step)
    columns = slice(0, weight.shape[1])
    return np.concatenate([function(i, weight.read((slice(i, min(i + step, rows.stop)), columns))) for i in starts])
