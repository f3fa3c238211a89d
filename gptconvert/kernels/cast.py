"""Conversion from float32 to float16 by onnxruntime, fifty times as fast as by numpy.

Only what is written to files uses it. Verification casts with numpy, and so is an independent check of these bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.protobuf import bytes_field, integer_field
from gptconvert.kernels.library import import_onnxruntime
from gptconvert.model.dtypes import is_finite
from gptconvert.model.tensors import Array, Box, Cast, Joined, LazyTensor, LeadingAxis, Rows, Transposed

#: Elements of the smallest tensor for which loading onnxruntime pays.
LARGE = 1 << 20
#: Elements converted at once: few enough for the processor's cache.
_BLOCK = 1 << 17
_FLOAT, _HALF = np.dtype(np.float32), np.dtype(np.float16)


def with_fast_casts(tensor: LazyTensor) -> LazyTensor:
    """The same tensor, with its casts from float32 to float16 computed by onnxruntime if it is large."""
    if tensor.size < LARGE:
        return tensor
    match tensor:
        case Cast(base) if (base.dtype, tensor.dtype) == (_FLOAT, _HALF):
            return FastCast(with_fast_casts(base), _HALF)
        case Cast(base) | Transposed(base) | LeadingAxis(base) | Rows(base):
            return replace(tensor, base=with_fast_casts(base))
        case Joined(parts):
            return replace(tensor, parts=tuple(map(with_fast_casts, parts)))
    return tensor


@dataclass(frozen=True, slots=True)
class FastCast(Cast):
    """A cast from float32 to float16, with the bits of numpy's."""

    def read(self, box: Box | None = None) -> Array:
        values = self.base.read(box)
        result = np.empty_like(values, _HALF)
        if not values.size:
            return result
        axes = sorted(range(values.ndim), key=lambda axis: -values.strides[axis])
        source, target = np.atleast_2d(values.transpose(axes)), np.atleast_2d(result.transpose(axes))
        step = max(1, _BLOCK // source[0].size)
        for start in range(0, len(source), step):
            rows = slice(start, start + step)
            _to_half(source[rows].reshape(-1), target[rows].reshape(-1))
        return result


def _to_half(values: NDArray[np.generic], halves: NDArray[np.generic]) -> None:
    """Convert contiguous values, by numpy where one is not finite: the bits of NaN differ between processors."""
    run = _kernel()
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        rounded = run(block)
        halves[start : start + block.size] = rounded if is_finite(rounded).all() else block.astype(_HALF)


@cache
def _kernel() -> Callable[[Array], Array]:
    """The function that converts a 1-D array on the calling thread."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_model(), options, providers=["CPUExecutionProvider"])
    return lambda values: session.run(None, {"x": values})[0]


def _model() -> bytes:
    """An ONNX model of one Cast. Field numbers: onnx.proto, and TensorProto.DataType for the types."""
    float32, float16, integer = 1, 10, 2
    to = bytes_field(1, b"to") + integer_field(3, float16) + integer_field(20, integer)
    node = bytes_field(1, b"x") + bytes_field(2, b"y") + bytes_field(4, b"Cast") + bytes_field(5, to)
    graph = bytes_field(1, node) + bytes_field(2, b"cast")
    graph += bytes_field(11, _value(b"x", float32)) + bytes_field(12, _value(b"y", float16))
    opset = integer_field(2, 13)
    return integer_field(1, 7) + bytes_field(7, graph) + bytes_field(8, opset)


def _value(name: bytes, element: int) -> bytes:
    """A ValueInfoProto of shape [n]."""
    shape = bytes_field(1, bytes_field(2, b"n"))
    return bytes_field(1, name) + bytes_field(2, bytes_field(1, integer_field(1, element) + bytes_field(2, shape)))
