"""Element types and their names in each file format, in the one table that all readers and writers use."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


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
    ElementType(np.dtype(ml_dtypes.float8_e5m2), tensorflow=24),
    ElementType(np.dtype(ml_dtypes.float8_e4m3fn), tensorflow=25),
)
#: The types a weight may have.
FLOATS: tuple[np.dtype[np.generic], ...] = (np.dtype("<f8"), np.dtype("<f4"), np.dtype("<f2"), BFLOAT16)
