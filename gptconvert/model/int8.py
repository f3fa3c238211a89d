"""Matrices of 8 bits with one scale per row, as LiteRT's dynamic-range kernels take them.

A row's element of largest magnitude gets the code 127 or -127; codes are rounded to nearest, halves away from zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gptconvert.model.blocks import CODES, SCALES, by_slabs
from gptconvert.model.tensors import Array, Box, LazyTensor, Shape

#: Largest code.
LARGEST = 127

Floats = NDArray[np.float32]


def scales_of(values: Array) -> Floats:
    """The scale of each row of a matrix [N, K]; 1 if all its elements are 0, or too small for a normal scale."""
    largest = np.abs(np.asarray(values, np.float32)).max(axis=1)
    scales = largest / np.float32(LARGEST)
    return np.where(scales >= np.finfo(np.float32).tiny, scales, np.float32(1)).astype(np.float32)


def codes_of(values: Array, scales: Floats) -> NDArray[np.int8]:
    """The codes [N, K] for given scales [N]."""
    scaled = np.divide(values, scales[:, None], dtype=np.float64)
    size = np.minimum(np.floor(np.abs(scaled) + 0.5), LARGEST)
    return np.copysign(size, scaled).astype(np.int8)


@dataclass(frozen=True, slots=True)
class _Computed(LazyTensor):
    """The codes or the scales of a matrix, computed when they are read."""

    weight: LazyTensor
    part: str
    shape: Shape = field(init=False)
    dtype: np.dtype[np.generic] = field(init=False)

    def __post_init__(self) -> None:
        scales = self.part == SCALES
        object.__setattr__(self, "shape", self.weight.shape[:1] if scales else self.weight.shape)
        object.__setattr__(self, "dtype", np.dtype(np.float32 if scales else np.int8))

    def read(self, box: Box | None = None) -> Array:
        rows = slice(0, self.shape[0]) if box is None else box[0]
        found = by_slabs(self.weight, rows, lambda _, values: self._computed(values))
        return found if box is None else found[(slice(None), *box[1:])]

    def _computed(self, values: Array) -> Array:
        scales = scales_of(values)
        return scales if self.part == SCALES else codes_of(np.asarray(values, np.float32), scales)


@dataclass(frozen=True, slots=True)
class Int8Rows(LazyTensor):
    """A float32 matrix [N, K], stored as codes [N, K] and scales [N]."""

    codes: LazyTensor
    scales: LazyTensor
    shape: Shape
    dtype: np.dtype[np.generic] = field(default=np.dtype(np.float32), init=False)

    @classmethod
    def of(cls, weight: LazyTensor) -> Int8Rows:
        """The matrix that is stored for ``weight``."""
        return cls(_Computed(weight, CODES), _Computed(weight, SCALES), weight.shape)

    @property
    def parts(self) -> dict[str, LazyTensor]:
        """Suffix → stored tensor."""
        return {CODES: self.codes, SCALES: self.scales}

    def read(self, box: Box | None = None) -> Array:
        rows = slice(0, self.shape[0]) if box is None else box[0]
        columns = slice(0, self.shape[1]) if box is None else box[1]
        codes = np.asarray(self.codes.read((rows, columns)), np.float32)
        return codes * np.asarray(self.scales.read((rows,)), np.float32)[:, None]
