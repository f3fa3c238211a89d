"""Checks of tensor values: NaN and infinities, all zeros, overflow in a cast to a narrower dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptconvert.errors import UnsupportedError
from gptconvert.model.dtypes import is_finite
from gptconvert.model.tensors import (
    CHUNK_BYTES,
    Array,
    Cast,
    Joined,
    LazyTensor,
    LeadingAxis,
    Rows,
    Shape,
    Transposed,
)


def is_float(dtype: np.dtype[np.generic]) -> bool:
    """Whether the dtype can hold a NaN; by name, because ``kind`` does not identify all floats of ml_dtypes."""
    return "float" in dtype.name


def raw_bytes(array: Array) -> memoryview:
    """The bytes of a contiguous array, even if its dtype has no buffer interface."""
    return array.reshape(-1).view(np.uint8).data


class FiniteCheck:
    """Check a tensor's values as its bytes are read.

    Attributes:
        nonfinite: number of elements that are NaN or infinite.
        first: index of the first such element in the flattened tensor.
        nonzero: whether any element is not zero.
    """

    def __init__(self, dtype: np.dtype[np.generic]) -> None:
        self.nonfinite, self.first, self.nonzero = 0, -1, False
        self._dtype, self._seen, self._rest = dtype, 0, b""

    def update(self, data: bytes) -> None:
        """Check the next bytes, which may end in the middle of an element."""
        if self._rest or len(data) % self._dtype.itemsize:
            data = self._rest + data
            whole = len(data) - len(data) % self._dtype.itemsize
            data, self._rest = data[:whole], data[whole:]
        self.update_array(np.frombuffer(data, self._dtype))

    def update_array(self, array: Array) -> None:
        """Check the next elements."""
        good = is_finite(array)
        if not good.all():
            if not self.nonfinite:
                self.first = self._seen + int(np.argmin(good))
            self.nonfinite += int(good.size - np.count_nonzero(good))
        self._seen += array.size
        self.nonzero = self.nonzero or bool(array.any())

    def problem(self, shape: Shape) -> str | None:
        """A description of the values that are not finite; None if all are finite."""
        if not self.nonfinite:
            return None
        where = [int(i) for i in np.unravel_index(self.first, shape)] if shape else []
        return f"{self.nonfinite} of {math.prod(shape)} values are NaN or infinite, the first at {where}"


def checked_chunks(name: str, tensor: LazyTensor, max_bytes: int = CHUNK_BYTES) -> Iterator[Array]:
    """The chunks of ``tensor``, checked for casts that turn finite values into infinities.

    Raises:
        UnsupportedError: a value does not fit the dtype it is cast to. The error names the tensor ``name``.
    """
    casts, chunks = _casts(tensor), tensor.chunks(max_bytes)
    while True:
        with np.errstate(over="ignore", invalid="ignore"):
            chunk = next(chunks, None)
        if chunk is None:
            return
        if casts and not is_finite(chunk).all():
            for cast in casts:
                _refuse_overflow(name, cast)
        yield chunk


def _casts(tensor: LazyTensor) -> list[Cast]:
    """Every cast to a float dtype on the way to ``tensor``."""
    if isinstance(tensor, Cast):
        inner = _casts(tensor.base)
        return [tensor, *inner] if is_float(tensor.dtype) else inner
    if isinstance(tensor, Transposed | LeadingAxis | Rows):
        return _casts(tensor.base)
    if isinstance(tensor, Joined):
        return [cast for part in tensor.parts for cast in _casts(part)]
    return []


def _refuse_overflow(name: str, cast: Cast) -> None:
    """Raise if the cast makes a finite value infinite; values that were infinite before do not count."""
    largest: Any = 0.0
    for chunk in cast.base.chunks():
        magnitudes = np.abs(chunk[is_finite(chunk)])
        largest = max(largest, magnitudes.max(initial=0))
    with np.errstate(over="ignore"):
        fits = bool(is_finite(np.asarray(largest, cast.base.dtype).reshape(1).astype(cast.dtype)).all())
    if not fits:
        raise UnsupportedError(
            f"a value is too large for {cast.dtype.name}",
            item=name,
            expected=f"at most {float(np.finfo(np.float16).max) if cast.dtype == np.float16 else cast.dtype.name}",
            found=f"{float(largest):g}",
            hint="use --dtype bf16, or keep the stored dtype",
        )
