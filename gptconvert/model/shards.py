"""Join the parts of a tensor stored in several shards, and split a tensor into parts.

A trainer that distributes a model over devices saves each device's share: a block of a matrix, a summand, a copy.
Readers return :class:`Parts`; each row of the name table has the rule that joins them. Rules are records, like
transforms: parts concatenated along axis 0 can still be copied as bytes, and no values are read until needed, except
vectors whose copies are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gptconvert.model.tensors import (
    Array,
    Box,
    Computed,
    FileChecksum,
    LazyTensor,
    Shape,
    filled,
    total,
)
from gptconvert.model.transforms import concatenate, split, transpose


@dataclass(frozen=True, slots=True)
class Parts(LazyTensor):
    """The parts of one tensor, not joined yet: it has ``dtype`` and ``shape`` but cannot be read.

    Attributes:
        parts: one per shard, in shard order; None if a shard has none.
        unit: the trainer's word for a shard (``rank``), used in error messages.
        checksums: recorded checksums of the parts' bytes, if the format has them per tensor.
        axis: the axis along which the parts are concatenated; None: each part has the whole shape.
    """

    parts: tuple[LazyTensor | None, ...]
    unit: str = "shard"
    checksums: tuple[FileChecksum, ...] = ()
    axis: int | None = None
    dtype: np.dtype[np.generic] = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        held = self.held
        shape = list(held[0].shape) if held else []
        if self.axis is not None and self.axis < len(shape):
            shape[self.axis] = sum(part.shape[self.axis] for part in held if len(part.shape) == len(shape))
        object.__setattr__(self, "dtype", held[0].dtype if held else np.dtype(np.void))
        object.__setattr__(self, "shape", tuple(shape))

    @property
    def held(self) -> tuple[LazyTensor, ...]:
        """The parts that are present."""
        return tuple(part for part in self.parts if part is not None)


class Shards(Protocol):
    """A rule that joins parts. ``axis`` is the axis along which they are cut (0 if not fixed); None: they are not cut."""

    @property
    def axis(self) -> int | None: ...
    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        """The tensor, of the expected ``shape``, from two or more parts."""

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        """``count`` parts from which :meth:`merge` restores ``tensor``."""


@dataclass(frozen=True)
class Cut:
    """Every shard holds a block; the blocks are concatenated along ``axis``."""

    axis: int

    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        return concatenate(parts, self.axis)

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        if self.axis == 0:
            return split(tensor, count)
        return tuple(transpose(part) for part in split(transpose(tensor), count))


@dataclass(frozen=True)
class CutEitherWay:
    """Every shard holds a block of rows or of columns, depending on the training run; the shape shows which."""

    axis: int = 0

    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        across = len(shape) == len(parts[0].shape) == 2 and parts[0].shape[1] != shape[1]
        return concatenate(parts, 1 if across else 0)

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        return split(tensor, count)


@dataclass(frozen=True)
class Sum:
    """Every shard holds a summand: a bias that it adds before the sum over shards."""

    axis: None = None

    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        return total(parts)

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        return (tensor, *[filled(0.0, tensor.dtype, tensor.shape)] * (count - 1))


@dataclass(frozen=True)
class Copies:
    """Every shard holds a copy of the whole tensor.

    Attributes:
        what: plural name of these tensors, used in the note that copies differ; "": only the first shard's copy was
            trained, and the others are not compared.
        averaged: if the copies differ, take their mean instead of the first shard's copy.
    """

    what: str = ""
    averaged: bool = False
    axis: None = None

    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        return mean(parts) if self.averaged and self.differ(parts) else parts[0]

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        return (tensor,) * count

    def differ(self, parts: Sequence[LazyTensor]) -> bool:
        """Whether copies that should be equal differ. Reads them whole, so only for vectors."""
        first = parts[0].read().tobytes() if self.what else b""
        return bool(self.what) and any(part.read().tobytes() != first for part in parts[1:])

    def note(self, names: Sequence[str], unit: str) -> str:
        """A note for the user about copies that differ."""
        how = "their mean was taken" if self.averaged else f"those of {unit} 0 were taken"
        same = f"{len(names)} {self.what} that should be equal on every {unit} differ"
        return f"{same} ({names[0]} first): {how}"


ROWS, COLUMNS, EITHER = Cut(0), Cut(1), CutEitherWay()
SUM, FIRST = Sum(), Copies()


@dataclass(frozen=True)
class Merge:
    """How to join the parts of one tensor of a file.

    Attributes:
        shards: the rule.
        shape: the expected shape of the whole tensor.
        added: name of the tensor whose parts are added to every row; None if none.
    """

    shards: Shards = FIRST
    shape: Shape = ()
    added: str | None = None


def merge_parts(
    tensors: Mapping[str, LazyTensor], merges: Mapping[str, Merge]
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Join the parts of every tensor; also return notes for the user.

    Args:
        tensors: by name; some are :class:`Parts`, with a part from every shard.
        merges: by name. For any other tensor, which is dropped later, the first shard's part is used.
    """
    whole: dict[str, LazyTensor] = {}
    differing: dict[Copies, list[str]] = {}
    unit, added = "shard", {merge.added for merge in merges.values()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Parts):
            whole[name] = tensor
        elif name not in added:
            merge, unit = merges.get(name, Merge()), tensor.unit
            copies = merge.shards if isinstance(merge.shards, Copies) else None
            if copies is not None and not copies.differ(tensor.held):
                whole[name] = tensor.held[0]
                continue
            if copies is not None:
                differing.setdefault(copies, []).append(name)
            whole[name] = _merged(tensor, merge, tensors)
    return whole, tuple(copies.note(names, unit) for copies, names in differing.items())


def _merged(parts: Parts, merge: Merge, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    whole = parts.held[0] if len(parts.held) == 1 else merge.shards.merge(parts.held, merge.shape)
    added = None if merge.added is None else tensors[merge.added]
    return added_to_rows(whole, added.held) if isinstance(added, Parts) else whole


def mean(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The element-wise mean of tensors of one shape, computed in float64 and rounded once."""
    dtype, shape = parts[0].dtype, parts[0].shape

    def read(box: Box) -> Array:
        result: Array = np.mean([part.read(box).astype(np.float64) for part in parts], axis=0).astype(dtype)
        return result

    return Computed(read, dtype, shape)


def added_to_rows(table: LazyTensor, biases: Sequence[LazyTensor]) -> LazyTensor:
    """``table`` [V, D] + the sum of ``biases`` [D], computed in float32 or wider and rounded once."""
    wide = np.promote_types(table.dtype, np.float32)

    def read(box: Box) -> Array:
        bias = sum(part.read(box[1:]).astype(wide) for part in biases)
        return (table.read(box).astype(wide) + bias).astype(table.dtype)

    return Computed(read, table.dtype, table.shape)
