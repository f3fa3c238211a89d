"""Invertible operations on lazy tensors: recorded, not executed.

The functions keep a tensor *stored* (copyable without passing through Python) whenever its layout allows it; two
transposes cancel. The families' name tables use the classes: ``forward`` converts a tensor from a file's layout to
the canonical one, ``inverse`` converts it back, and ``shape`` gives the shape that ``forward`` returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gptconvert.model.dtypes import holding_all
from gptconvert.model.tensors import (
    Array,
    Box,
    Cast,
    Computed,
    Joined,
    LazyTensor,
    LeadingAxis,
    Rows,
    Shape,
    Stored,
    Transposed,
    WithoutLeadingAxis,
    merge_segments,
)

Sizes = Mapping[str, int]


def transpose(tensor: LazyTensor) -> LazyTensor:
    """[a, b] → [b, a]."""
    return tensor.base if isinstance(tensor, Transposed) else Transposed(tensor)


def drop_leading_axis(tensor: LazyTensor) -> LazyTensor:
    """[1, ...] → [...]. Axis 0 only: squeezing every axis would break models with other sizes of 1."""
    if isinstance(tensor, LeadingAxis):
        return tensor.base
    if isinstance(tensor, Cast):
        return Cast(drop_leading_axis(tensor.base), tensor.dtype)
    if isinstance(tensor, Stored):
        return Stored(tensor.parts, tensor.dtype, tensor.shape[1:], tensor.crc32c)
    return WithoutLeadingAxis(tensor)  # partitioned variables and computed tensors


def take_rows(tensor: LazyTensor, runs: Sequence[tuple[int, int]]) -> LazyTensor:
    """Rows ``start``–``stop`` of each run, in order, along axis 0."""
    if list(runs) == [(0, tensor.shape[0])]:
        return tensor
    if not isinstance(tensor, Stored):
        return Rows(tensor, tuple(runs))
    row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    parts = [part for start, stop in runs for part in tensor.slice_bytes(start * row, stop * row)]
    rows = sum(stop - start for start, stop in runs)
    return Stored(merge_segments(parts), tensor.dtype, (rows, *tensor.shape[1:]))


def concatenate(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Tensors concatenated along ``axis``; stored tensors stay stored along axis 0.

    Tensors of different types are converted to the type that holds them all.
    """
    if len(tensors) == 1:
        return tensors[0]
    if len({t.dtype for t in tensors}) > 1:
        dtype = holding_all(t.dtype for t in tensors)
        tensors = [cast(t, dtype) for t in tensors]
    stored = [t for t in tensors if isinstance(t, Stored)]
    if axis == 0 and len(stored) == len(tensors) and len({t.dtype for t in stored}) == 1:
        parts = merge_segments([part for t in stored for part in t.parts])
        return Stored(parts, stored[0].dtype, (sum(t.shape[0] for t in stored), *stored[0].shape[1:]))
    if all(isinstance(t, Transposed) for t in tensors) and axis in (0, 1):
        return transpose(concatenate([transpose(t) for t in tensors], 1 - axis))
    return Joined(tuple(tensors), axis)


def run_of(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Elements ``start`` to ``stop`` in row-major order, as a tensor of one axis."""
    if isinstance(tensor, LeadingAxis):
        return run_of(tensor.base, start, stop)
    if isinstance(tensor, Stored):
        item = tensor.dtype.itemsize
        return Stored(tensor.slice_bytes(start * item, stop * item), tensor.dtype, (stop - start,))
    row, rest = math.prod(tensor.shape[1:]), tuple(slice(0, n) for n in tensor.shape[1:])

    def read(box: Box) -> Array:
        low, high = start + box[0].start, start + box[0].stop
        rows = tensor.read((slice(low // row, -(-high // row)), *rest))
        skip = low - low // row * row
        return np.ascontiguousarray(rows).reshape(-1)[skip : skip + high - low]

    return Computed(read, tensor.dtype, (stop - start,))


def split(tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
    """``count`` equal blocks along axis 0."""
    rows = tensor.shape[0] // count
    return tuple(take_rows(tensor, [(i * rows, (i + 1) * rows)]) for i in range(count))


def cast(tensor: LazyTensor, dtype: np.dtype[np.generic]) -> LazyTensor:
    """The same values in ``dtype``; the tensor itself if it has that dtype. A transpose stays outermost."""
    if tensor.dtype == dtype:
        return tensor
    if isinstance(tensor, Transposed):
        return Transposed(cast(tensor.base, dtype))
    return Cast(tensor, dtype)


def in_native_order(tensor: LazyTensor) -> LazyTensor:
    """The same values in the machine's byte order. A big-endian tensor is no longer copied raw."""
    return cast(tensor, tensor.dtype.newbyteorder("="))


class Transform(Protocol):
    """One step between a file's layout and the canonical one. ``sizes`` maps symbols of shapes (V, D …) to sizes."""

    def forward(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor: ...
    def inverse(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor: ...
    def shape(self, shape: Shape, sizes: Sizes) -> Shape: ...


@dataclass(frozen=True)
class Transpose:
    """[in, out] (TensorFlow, Conv1D) ↔ [out, in] (torch.nn.Linear)."""

    def forward(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return transpose(tensor)

    def inverse(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return transpose(tensor)

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        return shape[::-1]


@dataclass(frozen=True)
class DropLeadingAxis:
    """[1, ...] (a TensorFlow width-1 convolution) ↔ [...]."""

    def forward(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return drop_leading_axis(tensor)

    def inverse(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return LeadingAxis(tensor)

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        return shape[1:]


@dataclass(frozen=True)
class DeinterleaveHeads:
    """Rows [H, parts, head, ...] (GPT-NeoX: each head's q, k, v together) ↔ [parts, H, head, ...]."""

    parts: int = 3

    def forward(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return _swap_rows(tensor, sizes["H"], self.parts)

    def inverse(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return _swap_rows(tensor, self.parts, sizes["H"])

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        return shape


@dataclass(frozen=True)
class DeinterleaveFeatures:
    """Rows [H, head, parts] (Megatron-LM's version 1: each feature's q, k, v together) ↔ [parts, H, head]."""

    parts: int = 3

    def forward(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return _swap_rows(tensor, tensor.shape[0] // self.parts, self.parts)

    def inverse(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return _swap_rows(tensor, self.parts, tensor.shape[0] // self.parts)

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        return shape


def _swap_rows(tensor: LazyTensor, outer: int, inner: int) -> LazyTensor:
    """Rows as [outer, inner, n] → [inner, outer, n]."""
    n = tensor.shape[0] // (outer * inner)
    starts = [(o * inner + i) * n for i in range(inner) for o in range(outer)]
    return take_rows(tensor, [(start, start + n) for start in starts])
