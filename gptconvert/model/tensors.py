"""Lazy tensors: the names, types and shapes of a checkpoint's tensors, whose bytes are read on demand.

A tensor is either *stored* (its row-major bytes are one or more file segments, which a writer can copy inside the
kernel with ``copy_file_range``) or *computed* block by block from other tensors. Memory is bounded by the block size,
not by the tensor size.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import InputError, os_errors_as
from gptconvert.model.dtypes import holding_all

#: Maximum size in bytes of one block yielded by :meth:`LazyTensor.chunks`. Temporaries of this size stay in the heap.
CHUNK_BYTES = 2 << 20
#: Maximum size in bytes of the columns that :class:`Transposed` reads at once.
_SLAB_BYTES = 32 << 20
#: Columns that :func:`row_major` copies at once: enough bytes to fill whole cache lines of its source.
_PANEL = 64

Shape = tuple[int, ...]
Box = tuple[slice, ...]
Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Segment:
    """``nbytes`` bytes at ``offset`` of the file ``path``."""

    path: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def merge_segments(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The same bytes in the same order, with adjacent segments merged."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last is not None and last.path == segment.path and last.end == segment.offset:
            merged[-1] = Segment(last.path, last.offset, last.nbytes + segment.nbytes)
        elif segment.nbytes:
            merged.append(segment)
    return tuple(merged)


def map_segment(segment: Segment) -> NDArray[np.uint8]:
    """The segment's bytes, memory-mapped read-only; unmapped when the array is dropped.

    Raises:
        InputError: the file cannot be read or is too short.
    """
    if segment.nbytes == 0:
        return np.empty(0, np.uint8)
    start = segment.offset - segment.offset % mmap.ALLOCATIONGRANULARITY
    with os_errors_as(InputError, "cannot be read", segment.path):
        descriptor = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size < segment.end:
                raise InputError(
                    "file is truncated", path=segment.path, expected=f"{segment.end} bytes", found=f"{size} bytes"
                )
            mapped = mmap.mmap(descriptor, segment.end - start, access=mmap.ACCESS_READ, offset=start)
        except ValueError as error:  # truncated since its size was read
            raise InputError("file is truncated", path=segment.path, expected=f"{segment.end} bytes") from error
        finally:
            with suppress(OSError):
                os.close(descriptor)
    return np.frombuffer(mapped, np.uint8, count=segment.nbytes, offset=segment.offset - start)


def row_major(array: Array) -> Array:
    """``numpy.ascontiguousarray``, but up to four times as fast if ``array`` is the transpose of a matrix."""
    if array.ndim != 2 or array.strides[0] >= array.strides[1]:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], _PANEL):
        result[:, start : start + _PANEL] = array[:, start : start + _PANEL]
    return result


class LazyTensor:
    """A tensor read on demand: ``dtype``, ``shape``, and access to its elements."""

    dtype: np.dtype[np.generic]
    shape: Shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the packed elements in bytes."""
        return self.size * self.dtype.itemsize

    def segments(self) -> tuple[Segment, ...] | None:
        """The file segments that store the row-major little-endian bytes, in order; None if they must be computed."""
        return None

    def read(self, box: Box | None = None) -> Array:
        """The elements inside ``box`` (one ``slice(start, stop)`` per axis; default: all). Treat as read-only."""
        raise NotImplementedError

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Array]:
        """Contiguous arrays whose concatenated bytes are the tensor's, each of at most about ``max_bytes``."""
        if not self.shape:
            yield np.ascontiguousarray(self.read())
            return
        row_bytes = max(1, self.nbytes // max(1, self.shape[0]))
        step = max(1, max_bytes // row_bytes)
        rest = tuple(slice(0, n) for n in self.shape[1:])
        for start in range(0, self.shape[0], step):
            yield row_major(self.read((slice(start, min(start + step, self.shape[0])), *rest)))


@dataclass(frozen=True, slots=True)
class Stored(LazyTensor):
    """A tensor whose row-major bytes are the concatenation of ``parts``.

    ``dtype`` may be big-endian (old npy files); such bytes are swapped on reading and never copied raw.
    ``crc32c`` is the checksum that the container records for the bytes, if any.
    """

    parts: tuple[Segment, ...]
    dtype: np.dtype[np.generic]
    shape: Shape
    crc32c: int | None = None

    def segments(self) -> tuple[Segment, ...] | None:
        return self.parts if self.dtype.isnative else None

    def read(self, box: Box | None = None) -> Array:
        if box is None:
            return self._elements(0, self.size).reshape(self.shape)
        first, rest = box[0], box[1:]
        row = math.prod(self.shape[1:])
        rows = self._elements(first.start * row, first.stop * row)
        return rows.reshape((first.stop - first.start, *self.shape[1:]))[(slice(None), *rest)]

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Array]:
        step = max(1, max_bytes // self.dtype.itemsize)
        for start in range(0, self.size, step):
            yield self._elements(start, min(start + step, self.size))

    def slice_bytes(self, start: int, stop: int) -> tuple[Segment, ...]:
        """The segments of bytes ``start`` to ``stop`` of the tensor."""
        found = []
        for part in self.parts:
            low, high = max(0, start), min(part.nbytes, stop)
            if low < high:
                found.append(Segment(part.path, part.offset + low, high - low))
            start, stop = start - part.nbytes, stop - part.nbytes
        return tuple(found)

    def _elements(self, start: int, stop: int) -> Array:
        size = self.dtype.itemsize
        pieces = [map_segment(s) for s in self.slice_bytes(start * size, stop * size)]
        raw = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint8), *pieces])
        # Bundles pack tensors without padding, so floats may be unaligned.
        values = np.require(raw.view(self.dtype), requirements="A")
        return values if self.dtype.isnative else values.astype(self.dtype.newbyteorder("="))


@dataclass(frozen=True, slots=True)
class Transposed(LazyTensor):
    """``base`` [a, b] seen as [b, a]."""

    base: LazyTensor
    dtype: np.dtype[np.generic] = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.base.dtype)
        object.__setattr__(self, "shape", self.base.shape[::-1])

    def read(self, box: Box | None = None) -> Array:
        return self.base.read(None if box is None else box[::-1]).T

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Array]:
        if len(self.shape) != 2:
            yield from LazyTensor.chunks(self, max_bytes)
            return
        # Reading some columns of a stored base visits every page of it, so read as many as memory allows.
        rows, row_bytes = self.shape[0], max(1, self.shape[1] * self.dtype.itemsize)
        wide, step = max(1, _SLAB_BYTES // row_bytes), max(1, max_bytes // row_bytes)
        for first in range(0, rows, wide):
            slab = self.read((slice(first, min(first + wide, rows)), slice(0, self.shape[1])))
            for start in range(0, slab.shape[0], step):
                yield row_major(slab[start : start + step])


@dataclass(frozen=True, slots=True)
class LeadingAxis(LazyTensor):
    """``base`` [...] seen as [1, ...]."""

    base: LazyTensor
    dtype: np.dtype[np.generic] = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.base.dtype)
        object.__setattr__(self, "shape", (1, *self.base.shape))

    def segments(self) -> tuple[Segment, ...] | None:
        return self.base.segments()

    def read(self, box: Box | None = None) -> Array:
        return self.base.read(None if box is None else box[1:])[None]

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[Array]:
        return self.base.chunks(max_bytes)


@dataclass(frozen=True, slots=True)
class WithoutLeadingAxis(LazyTensor):
    """``base`` [1, ...] seen as [...]."""

    base: LazyTensor
    dtype: np.dtype[np.generic] = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.base.dtype)
        object.__setattr__(self, "shape", self.base.shape[1:])

    def segments(self) -> tuple[Segment, ...] | None:
        return self.base.segments()

    def read(self, box: Box | None = None) -> Array:
        elements: Array = self.base.read(None if box is None else (slice(0, 1), *box))[0, ...]
        return elements


@dataclass(frozen=True, slots=True)
class Rows(LazyTensor):
    """The rows of ``base`` in each (start, stop) of ``runs``, in that order; the other axes are whole."""

    base: LazyTensor
    runs: tuple[tuple[int, int], ...]
    dtype: np.dtype[np.generic] = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.base.dtype)
        rows = sum(stop - start for start, stop in self.runs)
        object.__setattr__(self, "shape", (rows, *self.base.shape[1:]))

    def read(self, box: Box | None = None) -> Array:
        first = slice(0, self.shape[0]) if box is None else box[0]
        rest = tuple(slice(0, n) for n in self.shape[1:]) if box is None else box[1:]
        pieces, position = [], 0
        for start, stop in self.runs:
            low, high = max(first.start, position), min(first.stop, position + stop - start)
            if low < high:
                pieces.append(self.base.read((slice(start + low - position, start + high - position), *rest)))
            position += stop - start
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True, slots=True)
class Joined(LazyTensor):
    """``parts``, which have one type, concatenated along ``axis``.

    Raises:
        ValueError: the parts have different types; :func:`~gptconvert.model.transforms.concatenate` converts them.
    """

    parts: tuple[LazyTensor, ...]
    axis: int
    dtype: np.dtype[np.generic] = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        if len({part.dtype for part in self.parts}) > 1:
            raise ValueError(f"parts of different types: {', '.join(str(part.dtype) for part in self.parts)}")
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        object.__setattr__(self, "dtype", self.parts[0].dtype)
        object.__setattr__(self, "shape", tuple(shape))

    def read(self, box: Box | None = None) -> Array:
        wanted = tuple(slice(0, n) for n in self.shape) if box is None else box
        along, position, pieces = wanted[self.axis], 0, []
        for part in self.parts:
            width = part.shape[self.axis]
            low, high = max(along.start, position), min(along.stop, position + width)
            if low < high:
                inside = slice(low - position, high - position)
                pieces.append(part.read((*wanted[: self.axis], inside, *wanted[self.axis + 1 :])))
            position += width
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)


@dataclass(frozen=True, slots=True)
class Cast(LazyTensor):
    """``base`` converted to ``dtype``, rounding to nearest even."""

    base: LazyTensor
    dtype: np.dtype[np.generic]
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.base.shape)

    def read(self, box: Box | None = None) -> Array:
        return self.base.read(box).astype(self.dtype)


@dataclass(frozen=True, slots=True)
class Computed(LazyTensor):
    """Elements computed by ``function(box)``: for compressed containers, and for sums of tensors."""

    function: Callable[[Box], Array]
    dtype: np.dtype[np.generic]
    shape: Shape

    def read(self, box: Box | None = None) -> Array:
        return self.function(tuple(slice(0, n) for n in self.shape) if box is None else box)


def filled(value: float, dtype: np.dtype[np.generic], shape: Shape) -> LazyTensor:
    """A tensor of one repeated value, not stored in any file."""

    def read(box: Box) -> Array:
        return np.full(tuple(s.stop - s.start for s in box), value, dtype)

    return Computed(read, dtype, shape)


def total(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The element-wise sum of tensors of the same shape, added in at least float32 and rounded once.

    Summands of different types give the type that holds them all.
    """
    dtype = holding_all(part.dtype for part in parts)
    wide = np.promote_types(dtype, np.float32)

    def read(box: Box) -> Array:
        result = parts[0].read(box).astype(wide)
        for part in parts[1:]:
            result = result + part.read(box).astype(wide)
        return result.astype(dtype)

    return Computed(read, dtype, parts[0].shape)


@dataclass(frozen=True, slots=True)
class FileChecksum:
    """A checksum that a container records for a byte range, which need not be one tensor.

    Attributes:
        segment: the byte range.
        algorithm: ``crc32`` (zip) or ``crc32c`` (TensorFlow).
        value: the recorded checksum.
        what: name of the byte range inside the container (``archive/data/3``), used in error messages.
    """

    segment: Segment
    algorithm: str
    value: int
    what: str


@dataclass(frozen=True)
class TensorSet(Mapping[str, LazyTensor]):
    """The tensors found by one reader, by their names in the file.

    Attributes:
        tensors: name → tensor, in the container's order.
        files: every file that stores tensors (for digests, and to detect changes during the run).
        notes: what the user should know, one sentence each.
        checksums: recorded checksums of the tensors' bytes, not yet verified.
        ignored: name → reason, for tensors left out at the user's request.
    """

    tensors: Mapping[str, LazyTensor]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    checksums: tuple[FileChecksum, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
