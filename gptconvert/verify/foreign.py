"""What can be inferred of an artifact that somebody else wrote, from its bytes alone.

For our own artifacts nothing is inferred: the :class:`~gptconvert.model.export.Export` says how each is stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import cast, transpose
from gptconvert.verify.weights import WeightReport, difference

#: Types that weights are stored in.
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


def match_by_content(found: Mapping[str, LazyTensor], weights: Mapping[str, LazyTensor]) -> WeightReport:
    """How many weights are stored somewhere in the file, under any name and in either orientation.

    Most comparisons end at the first element.
    """
    report = WeightReport(len(weights), strict=False)
    free = dict(found)
    for weight in weights.values():
        ways = [weight, transpose(weight)] if len(weight.shape) == 2 else [weight]
        for name, tensor in free.items():
            if any(difference(name, way, tensor) is None for way in ways):
                report.equal, report.nbytes = report.equal + 1, report.nbytes + weight.nbytes
                del free[name]
                break
    return report


def as_stored(checkpoint: Checkpoint, tensors: Iterable[LazyTensor]) -> Checkpoint:
    """The checkpoint in the type in which ``tensors`` are, most of them: rounding on storage is no error.

    A checkpoint of several types stays as it is where there is as much of each among ``tensors``.
    """
    sizes, own = _bytes_by_type(tensors), _bytes_by_type(checkpoint.weights.values())
    dtype = max(FLOATS, key=lambda d: sizes[d])
    if not sizes[dtype] or all(sizes[d] >= nbytes for d, nbytes in own.items()):
        return checkpoint
    weights = {name: cast(weight, dtype) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def _bytes_by_type(tensors: Iterable[LazyTensor]) -> dict[np.dtype[np.generic], int]:
    """Type that weights are stored in → bytes."""
    sizes = dict.fromkeys(FLOATS, 0)
    for tensor in tensors:
        dtype = tensor.dtype.newbyteorder("=")
        if dtype in sizes:
            sizes[dtype] += tensor.nbytes
    return sizes
