"""Rules that merge the parts of a sharded tensor, and split a tensor into parts.

A trainer that spreads a model over devices saves each device's share: a block of a matrix, a summand, a copy. Readers
return these as :class:`Parts`; each row of a name table gives the rule that merges them. Like transforms, rules are
recorded: parts concatenated along axis 0 stay copyable, and only replicated vectors are read early, to compare them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gptconvert.model.dtypes import FLOATS, holding_all
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
from gptconvert.model.transforms import cast, concatenate, split, transpose


@dataclass(frozen=True, slots=True)
class Parts(LazyTensor):
    """One tensor's parts, not merged yet: ``dtype`` and ``shape`` are known, but elements cannot be read.

    ``dtype`` holds the values of all parts; weights of other than float types are refused before any merge.

    Attributes:
        parts: one per shard, in order; None for a shard that lacks the tensor.
        unit: the trainer's name for a shard (``rank``), used in messages.
        checksums: recorded checksums of the parts' bytes, if they are recorded per tensor.
        axis: the axis along which the parts are concatenated; None if each has the full shape.
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
        floats = [part.dtype for part in held if part.dtype.newbyteorder("=") in FLOATS]
        mixed = holding_all(floats) if len(floats) == len(held) > 0 else None
        object.__setattr__(self, "dtype", mixed or (held[0].dtype if held else np.dtype(np.void)))
        object.__setattr__(self, "shape", tuple(shape))

    @property
    def held(self) -> tuple[LazyTensor, ...]:
        """The parts that are not None."""
        return tuple(part for part in self.parts if part is not None)


class Shards(Protocol):
    """A merge rule. ``axis`` is the axis along which parts are cut by default; None if each has the full shape."""

    @property
    def axis(self) -> int | None: ...
    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        """The tensor of the expected ``shape``, from two or more parts."""

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        """``count`` parts that :meth:`merge` turns back into ``tensor``."""


@dataclass(frozen=True)
class Cut:
    """Every shard holds a block; blocks are concatenated along ``axis``."""

    axis: int

    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        return concatenate(parts, self.axis)

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        if self.axis == 0:
            return split(tensor, count)
        return tuple(transpose(part) for part in split(transpose(tensor), count))


@dataclass(frozen=True)
class CutEitherWay:
    """Every shard holds a block of rows or of columns, depending on the training run; the shape determines which."""

    axis: int = 0

    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        across = len(shape) == len(parts[0].shape) == 2 and parts[0].shape[1] != shape[1]
        return concatenate(parts, 1 if across else 0)

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        return split(tensor, count)


@dataclass(frozen=True)
class Sum:
    """Every shard holds a summand: each adds its own bias before results are summed over shards."""

    axis: None = None

    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        return total(parts)

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        return (tensor, *[filled(0.0, tensor.dtype, tensor.shape)] * (count - 1))


@dataclass(frozen=True)
class Copies:
    """Every shard holds a full copy.

    Attributes:
        what: plural name of these tensors, used in the note about differing copies. If empty, only the first shard's
            copy was trained, and the others are ignored.
        averaged: whether differing copies are replaced by their mean instead of the first shard's.
    """

    what: str = ""
    averaged: bool = False
    axis: None = None

    def merge(self, parts: Sequence[LazyTensor], shape: Shape) -> LazyTensor:
        return mean(parts) if self.averaged and self.differ(parts) else parts[0]

    def split(self, tensor: LazyTensor, count: int) -> tuple[LazyTensor, ...]:
        return (tensor,) * count

    def differ(self, parts: Sequence[LazyTensor]) -> bool:
        """Whether copies that should be identical differ. They are read whole, so they must be vectors."""
        if not self.what:
            return False
        dtype = holding_all(part.dtype for part in parts)
        first, *others = (cast(part, dtype).read().tobytes() for part in parts)
        return any(other != first for other in others)

    def note(self, names: Sequence[str], unit: str) -> str:
        """A note about copies that differ."""
        used = "their mean" if self.averaged else f"the copies of {unit} 0"
        return f"{len(names)} {self.what} differ between {unit}s but should not (first: {names[0]}); used {used}"


ROWS, COLUMNS, EITHER = Cut(0), Cut(1), CutEitherWay()
SUM, FIRST = Sum(), Copies()


@dataclass(frozen=True)
class Merge:
    """How to merge the parts of one tensor.

    Attributes:
        shards: the rule.
        shape: expected shape of the merged tensor.
        added: name of the tensor whose parts are added to every row, if any.
    """

    shards: Shards = FIRST
    shape: Shape = ()
    added: str | None = None


def merge_parts(
    tensors: Mapping[str, LazyTensor], merges: Mapping[str, Merge]
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """All tensors with their parts merged, and notes on copies that differ.

    Args:
        tensors: by name; every shard must have a part of each :class:`Parts`.
        merges: by name. Tensors without an entry will be dropped later, so only their first part is kept.
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
    """The element-wise mean of tensors of the same shape, computed in float64 and rounded once.

    Tensors of different types give the type that holds them all.
    """
    dtype, shape = holding_all(part.dtype for part in parts), parts[0].shape

    def read(box: Box) -> Array:
        result: Array = np.mean([part.read(box).astype(np.float64) for part in parts], axis=0).astype(dtype)
        return result

    return Computed(read, dtype, shape)


def added_to_rows(table: LazyTensor, biases: Sequence[LazyTensor]) -> LazyTensor:
    """``table`` [V, D] + the sum of ``biases`` [D], added in at least float32 and rounded once.

    The result has the type that holds the table's and the biases' values.
    """
    dtype = holding_all((table.dtype, *(bias.dtype for bias in biases)))
    wide = np.promote_types(dtype, np.float32)

    def read(box: Box) -> Array:
        bias = sum(part.read(box[1:]).astype(wide) for part in biases)
        return (table.read(box).astype(wide) + bias).astype(dtype)

    return Computed(read, dtype, table.shape)
