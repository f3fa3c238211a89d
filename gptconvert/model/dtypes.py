"""Element types and their names in each file format, in the one table that all readers and writers use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: Exponent bits of the 16-bit floats, all set only in NaN and infinities. Ten times as fast as numpy.isfinite.
_EXPONENT = {np.dtype(np.float16): np.uint16(0x7C00), BFLOAT16: np.uint16(0x7F80)}


@dataclass(frozen=True)
class ElementType:
    """One element type and its names; None if a format lacks the type, or it is not read from that format.

    Attributes:
        dtype: in little-endian byte order, as the formats below store it.
        torch: PyTorch's name, which is also Flax's.
        safetensors: name in a safetensors header.
        tensorflow: ``tensorflow.DataType``.
        storage: PyTorch's storage class.
        option: value of ``--dtype``.
    """

    dtype: np.dtype[np.generic]
    torch: str | None = None
    safetensors: str | None = None
    tensorflow: int | None = None
    storage: str | None = None
    option: str | None = None


ELEMENT_TYPES: tuple[ElementType, ...] = (
    ElementType(np.dtype("<f8"), "float64", "F64", 2, "DoubleStorage"),
    ElementType(np.dtype("<f4"), "float32", "F32", 1, "FloatStorage", "fp32"),
    ElementType(np.dtype("<f2"), "float16", "F16", 19, "HalfStorage", "fp16"),
    ElementType(BFLOAT16, "bfloat16", "BF16", 14, "BFloat16Storage", "bf16"),
    ElementType(np.dtype("<i8"), "int64", "I64", 9, "LongStorage"),
    ElementType(np.dtype("<i4"), "int32", "I32", 3, "IntStorage"),
    ElementType(np.dtype("<i2"), "int16", "I16", 5, "ShortStorage"),
    ElementType(np.dtype("i1"), "int8", "I8", 6, "CharStorage"),
    ElementType(np.dtype("<u8"), "uint64", "U64", 23),
    ElementType(np.dtype("<u4"), "uint32", "U32", 22),
    ElementType(np.dtype("<u2"), "uint16", "U16", 17),
    ElementType(np.dtype("u1"), "uint8", "U8", 4, "ByteStorage"),
    ElementType(np.dtype("?"), "bool", "BOOL", 10, "BoolStorage"),
    ElementType(np.dtype("<c8"), tensorflow=8),
    ElementType(np.dtype("<c16"), tensorflow=18),
    ElementType(np.dtype(ml_dtypes.float8_e5m2), "float8_e5m2", "F8_E5M2", 24),
    ElementType(np.dtype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn", "F8_E4M3", 25),
)
#: The types a weight may have.
FLOATS: tuple[np.dtype[np.generic], ...] = (np.dtype("<f8"), np.dtype("<f4"), np.dtype("<f2"), BFLOAT16)


def is_finite(array: NDArray[np.generic]) -> NDArray[np.bool_]:
    """numpy.isfinite for every dtype, including those of ml_dtypes."""
    mask = _EXPONENT.get(array.dtype)
    if mask is not None:
        return np.asarray((array.view(np.uint16) & mask) != mask)
    return np.asarray(np.isfinite(array.astype(np.float32) if array.dtype.kind == "V" else array))


def holding_all(dtypes: Iterable[np.dtype[np.generic]]) -> np.dtype[np.generic]:
    """The smallest type that holds every value of these types, in native byte order; one type stays as it is.

    float16 has the longer fraction and bfloat16 the longer exponent, so together they need float32, as in PyTorch.

    Raises:
        ValueError: different types, of which one is not in :data:`FLOATS`.
    """
    return reduce(_holding_both, dict.fromkeys(dtypes))


def _holding_both(first: np.dtype[np.generic], second: np.dtype[np.generic]) -> np.dtype[np.generic]:
    a, b = first.newbyteorder("="), second.newbyteorder("=")
    if a == b:
        return a
    if a not in FLOATS or b not in FLOATS:
        raise ValueError(f"{a} and {b} cannot be combined: weights have float types")
    both = {FLOATS.index(a), FLOATS.index(b)}
    return FLOATS[1] if both == {2, 3} else FLOATS[min(both)]
