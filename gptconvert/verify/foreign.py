"""What can be inferred about another exporter's artifact from its bytes alone.

Nothing is inferred about our own: the :class:`~gptconvert.model.export.Export` describes how each is stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import cast

#: Types that weights are stored in.
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


def as_stored(checkpoint: Checkpoint, tensors: Iterable[LazyTensor]) -> Checkpoint:
    """The checkpoint cast to the type of most of ``tensors``: rounding on storage is not an error.

    A checkpoint of several types is returned unchanged if ``tensors`` hold at least as many bytes of each.
    """
    sizes, own = _bytes_by_type(tensors), _bytes_by_type(checkpoint.weights.values())
    dtype = max(FLOATS, key=lambda d: sizes[d])
    if not sizes[dtype] or all(sizes[d] >= nbytes for d, nbytes in own.items()):
        return checkpoint
    weights = {name: cast(weight, dtype) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def _bytes_by_type(tensors: Iterable[LazyTensor]) -> dict[np.dtype[np.generic], int]:
    """Type in :data:`FLOATS` → bytes."""
    sizes = dict.fromkeys(FLOATS, 0)
    for tensor in tensors:
        dtype = tensor.dtype.newbyteorder("=")
        if dtype in sizes:
            sizes[dtype] += tensor.nbytes
    return sizes
