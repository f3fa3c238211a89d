"""Encodings, the lossy counterparts of transforms: a weight is stored as parts, and the parts decode to a weight.

Verification compares the stored parts byte for byte with the encoded source weight, and runs the reference model on
the decoded weights. A new storage type takes one encoding here and one name in :data:`ENCODINGS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import ELEMENT_TYPES
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import cast

#: Suffix of a part's name → the part. A weight stored as one tensor has the single suffix "".
Parts = Mapping[str, LazyTensor]


class Encoding(Protocol):
    """How a weight is stored."""

    def encode(self, weight: LazyTensor) -> Parts:
        """The tensors to store, lazily."""
        ...

    def decode(self, parts: Parts) -> LazyTensor:
        """The weight that the stored tensors represent, lazily."""
        ...


@dataclass(frozen=True)
class CastTo:
    """Storage in another float type, rounded to nearest even."""

    dtype: np.dtype[np.generic]

    def encode(self, weight: LazyTensor) -> Parts:
        return {"": cast(weight, self.dtype)}

    def decode(self, parts: Parts) -> LazyTensor:
        return parts[""]


#: Value of ``--dtype`` → encoding of every weight.
ENCODINGS: Mapping[str, Encoding] = {row.option: CastTo(row.dtype) for row in ELEMENT_TYPES if row.option is not None}


def encoded(checkpoint: Checkpoint, name: str | None) -> Checkpoint:
    """The checkpoint with its weights as stored by the encoding ``name``; None keeps them unchanged."""
    if name is None:
        return checkpoint
    encoding = ENCODINGS[name]
    weights = {key: encoding.decode(encoding.encode(weight)) for key, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)
