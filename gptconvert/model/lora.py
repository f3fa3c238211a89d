"""LoRA adapters: an update of low rank per module, merged lazily into the weights of a base model.

Hu et al. 2021, "LoRA" (the update s · B A); Kalajdzievski 2023, "rsLoRA" (s = α / √r); Liu et al. 2024, "DoRA" (rows
rescaled to a trained magnitude). The result is the same on every machine: see :func:`product`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gptconvert.model.tensors import Array, Box, LazyTensor, Shape, TensorSet

Floats = NDArray[np.float64]

#: Bits of one digit of a factor, and the largest rank for which the sums of products of digits are below 2**53.
_BITS, _RANKS = 22, 512
#: Elements computed at a time.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Update:
    """The trained tensors of one module, with r the rank.

    Attributes:
        a: [r, in].
        b: [out, r].
        scale: factor of B A.
        embedding: whether the module is an embedding, whose weight is stored [in, out].
        bias: [out], multiplied by the scale and added to the module's bias; None if not trained.
        magnitude: [out], norms of the rows of the merged weight (DoRA); None for plain LoRA.
    """

    a: LazyTensor
    b: LazyTensor
    scale: float
    embedding: bool = False
    bias: LazyTensor | None = None
    magnitude: LazyTensor | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from its files; names are those of the modules of the base model in transformers.

    Attributes:
        path: its directory.
        config_path: its configuration file.
        stored: every tensor, by its name in the file.
        updates: module → update.
        replaced: parameter → the trained tensor that replaces the base's (``modules_to_save``, biases).
        targets: names, or endings of names, of the modules that must have an update; empty if unknown.
        saved: endings of the names of modules trained in full, with weights of their own.
        keeps_tying: whether a tied embedding and head were trained as one tensor.
        base: name of the model that it was trained on, as recorded.
        tokenizer: tokenizer file name → path, if the adapter has a tokenizer of its own.
        repo: hub repository, if it came from a hub.
        revision: commit of that repository.
    """

    path: str
    config_path: str
    stored: TensorSet
    updates: Mapping[str, Update]
    replaced: Mapping[str, LazyTensor]
    targets: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    keeps_tying: bool = False
    base: str | None = None
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    repo: str | None = None
    revision: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the adapter, without its tokenizer."""
        return (self.config_path, *self.stored.files)


@dataclass(frozen=True)
class Merged(LazyTensor):
    """``base`` + s · B A in the type of ``base``: computed in float64 and rounded once, block by block.

    With a magnitude (DoRA), each row of the sum, seen as [out, in], is rescaled to it.

    Attributes:
        base: the weight, [out, in].
        update: its update.
        transposed: whether ``base`` is stored [in, out] (Conv1D, embeddings).
    """

    base: LazyTensor
    update: Update
    transposed: bool
    dtype: np.dtype[np.generic] = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.base.dtype)
        object.__setattr__(self, "shape", self.base.shape)

    def read(self, box: Box | None = None) -> Array:
        rows, columns = tuple(slice(0, n) for n in self.shape) if box is None else box
        merged = np.empty((rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        factors = self._factors
        with np.errstate(over="ignore", invalid="ignore"):  # the checks of the source report such values
            for part, values in self._sums(rows, columns):
                if factors is not None:
                    values *= factors[columns] if self.transposed else factors[part, None]
                merged[part.start - rows.start : part.stop - rows.start] = values
        return merged

    def _sums(self, rows: slice, columns: slice) -> Iterator[tuple[slice, Floats]]:
        """W + s · B A in the layout of ``base``: blocks of rows that fit into the processor's cache."""
        rank = slice(0, self.update.a.shape[0])
        if self.transposed:
            left, right = _floats(self.update.a, (rank, rows)).T, _floats(self.update.b, (columns, rank)).T
        else:
            left, right = _floats(self.update.b, (rows, rank)), _floats(self.update.a, (rank, columns))
        split_left, split_right = _digits(left, 1), _digits(right, 0)
        step = max(1, _BLOCK // max(1, columns.stop - columns.start))
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            inside = slice(part.start - rows.start, part.stop - rows.start)
            total = _product((split_left[0][inside], split_left[1][inside]), split_right)
            total *= self.update.scale
            total += _floats(self.base, (part, columns))
            yield part, total

    @cached_property
    def _factors(self) -> Floats | None:
        """[out] trained magnitude / norm of the row; None without a magnitude."""
        if self.update.magnitude is None:
            return None
        rows, columns = self.shape
        squares = np.zeros(columns if self.transposed else rows)
        for part, values in self._sums(slice(0, rows), slice(0, columns)):
            by_input = values if self.transposed else np.ascontiguousarray(values.T)
            total = squares if self.transposed else squares[part]
            for row in by_input:  # one order of addition, unlike numpy's sums
                total += row * row
        factors: Floats = _floats(self.update.magnitude, (slice(0, len(squares)),)) / np.sqrt(squares)
        return factors


@dataclass(frozen=True, slots=True)
class Shifted(LazyTensor):
    """``base`` + ``scale`` · ``addend`` in the type of ``base``, computed in float64 and rounded once."""

    base: LazyTensor
    addend: LazyTensor
    scale: float
    dtype: np.dtype[np.generic] = field(init=False)
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.base.dtype)
        object.__setattr__(self, "shape", self.base.shape)

    def read(self, box: Box | None = None) -> Array:
        whole = tuple(slice(0, n) for n in self.shape) if box is None else box
        with np.errstate(over="ignore", invalid="ignore"):
            return (_floats(self.base, whole) + self.scale * _floats(self.addend, whole)).astype(self.dtype)


def product(left: Floats, right: Floats) -> Floats:
    """[m, r] @ [r, n] with the same bits on every machine.

    A matrix product in floating point depends on the order in which the library adds. Here each factor is split into
    two digits of 22 bits, relative to the largest value of its row (``left``) or column (``right``). All terms of an
    element's sum are then integers below 2**53, times one power of two, and adding them is exact in any order. The
    error is about 2**-43 of r products of these largest values, far below float32's rounding.
    """
    return _product(_digits(left, 1), _digits(right, 0))


def _product(left: tuple[Floats, Floats], right: tuple[Floats, Floats]) -> Floats:
    """The product of two factors split into digits."""
    (high, low), (other_high, other_low) = left, right
    total = np.zeros((high.shape[0], other_high.shape[1]))
    for start in range(0, high.shape[1], _RANKS):
        part = slice(start, start + _RANKS)
        total += high[:, part] @ other_high[part]
        total += np.hstack([high[:, part], low[:, part]]) @ np.vstack([other_low[part], other_high[part]])
    return total


def _digits(values: Floats, axis: int) -> tuple[Floats, Floats]:
    """``values`` ≈ high + low, both multiples of a power of two that is the same along ``axis``."""
    exponents = np.frexp(np.abs(values).max(axis=axis, keepdims=True, initial=0.0))[1] - _BITS
    unit = np.ldexp(1.0, exponents)
    high = np.rint(values / unit)
    low = np.rint((values / unit - high) * 2.0**_BITS)
    return high * unit, low * (unit * 2.0**-_BITS)


def _floats(tensor: LazyTensor, box: Box) -> Floats:
    return tensor.read(box).astype(np.float64)
