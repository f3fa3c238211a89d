"""Which of another exporter's tensors hold which weights, by content alone: names, layouts and types are its own.

A weight counts as found if its elements are stored as they are, transposed, reshaped, in transformers' layout, split
into q, k and v, or at the start of a longer table. A tensor that holds most of a weight's elements, but not all, is a
damaged copy: no exporter changes a part of a weight, and probes reach few rows of a table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptconvert.families.registry import family_named
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import FLOATS
from gptconvert.model.schemes import expand, sizes_of
from gptconvert.model.tensors import CHUNK_BYTES, Array, Box, Computed, LazyTensor, Shape, Stored, Transposed
from gptconvert.model.transforms import Sizes, Transform, Transpose, cast, split, take_rows, transpose
from gptconvert.verify.weights import Compared, WeightReport

#: Elements read of every tensor to select the pairs that are compared whole.
SAMPLES = 24
#: A tensor of at most this many bytes is read whole, which is faster than element by element.
SMALL = 1 << 16
#: A tensor with at least this share of a weight's elements, in the same places, is a copy of it.
MOSTLY = 0.5
#: Converters to float16 round smaller numbers up to this one or to half of it, instead of to the nearest.
FLOAT16_CLAMP = 2.0**-23
#: Looked up by row, and so possibly padded with further rows.
TABLES = ("wte.weight", "wpe.weight", "lm_head.weight")


@dataclass(frozen=True)
class Layout:
    """One way of storing a part of a weight.

    Attributes:
        shape: of the stored elements in row-major order; the file's tensor may group its axes differently.
        steps: from that shape to the canonical one.
        flipped: whether the stored matrix is transposed before ``steps``.
        padded: whether the stored table may have further rows (columns, if ``flipped``).
    """

    shape: Shape
    steps: tuple[Transform, ...] = ()
    flipped: bool = False
    padded: bool = False

    def view(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor | None:
        """The tensor's elements in canonical layout; None if it cannot be stored so."""
        if tensor.size == math.prod(self.shape):
            seen = _reshaped(tensor, self.shape[::-1] if self.flipped else self.shape)
            seen = transpose(seen) if self.flipped else seen
        elif self.padded and len(tensor.shape) == 2:
            seen = transpose(tensor) if self.flipped else tensor
            if seen.shape[1] != self.shape[1] or seen.shape[0] < self.shape[0]:
                return None
            seen = take_rows(seen, [(0, self.shape[0])])
        else:
            return None
        for step in self.steps:
            seen = step.forward(seen, sizes)
        return seen


@dataclass(frozen=True, eq=False)
class Part:
    """A weight, or the block of it that exporters store as a tensor of its own.

    Attributes:
        weight: canonical name.
        tensor: the elements, in canonical layout.
        layouts: the ways in which it may be stored.
        start: the weight's row that it begins at.
    """

    weight: str
    tensor: LazyTensor
    layouts: tuple[Layout, ...]
    start: int = 0


@dataclass(frozen=True)
class Agreement:
    """How far a stored tensor agrees with a part.

    Attributes:
        size: number of elements.
        different: how many differ.
        first: index of the first that differs; None if none does.
        telling: how many elements of the part are neither 0 nor 1, which many tensors have in common.
        telling_equal: how many of these are equal.
    """

    size: int
    different: int
    first: tuple[int, ...] | None
    telling: int
    telling_equal: int

    @property
    def exact(self) -> bool:
        """Whether all elements are equal."""
        return not self.different

    @property
    def mostly(self) -> bool:
        """Whether the tensor is a damaged copy."""
        equal, size = (self.telling_equal, self.telling) if self.telling else (self.size - self.different, self.size)
        return not self.exact and equal >= MOSTLY * size


@dataclass(frozen=True, slots=True)
class FlatIndex(LazyTensor):
    """A tensor whose elements are their own indices in row-major order."""

    shape: Shape
    dtype: np.dtype[np.generic] = field(default=np.dtype(np.int64), init=False)

    def read(self, box: Box | None = None) -> Array:
        axes = [np.arange(s.start, s.stop) for s in box or tuple(slice(0, n) for n in self.shape)]
        return np.ravel_multi_index(np.ix_(*axes), self.shape)


#: A tensor's name, and the layout in which it holds a part.
Place = tuple[str, Layout]


class Match(NamedTuple):
    """Which of a file's tensors hold which weights.

    Attributes:
        report: damaged copies are problems; weights that are not found are listed, and left to the outputs.
        weights: those that were found, cast to the type that each is stored in.
        places: part → all tensors that hold it exactly.
    """

    report: WeightReport
    weights: dict[str, LazyTensor]
    places: Mapping[Part, tuple[Place, ...]]


def match_by_content(found: Mapping[str, LazyTensor], checkpoint: Checkpoint) -> Match:
    """Compare the tensors of a file with a checkpoint's weights, under any name and in any known layout."""
    floats = {name: tensor for name, tensor in found.items() if tensor.dtype.newbyteorder("=") in FLOATS}
    matcher = _Matcher(floats, sizes_of(checkpoint.config))
    whole, in_blocks = _parts(checkpoint)
    matcher.match(whole)
    fused = {part.weight for part in matcher.held}
    matcher.match(part for part in in_blocks if part.weight not in fused)
    report = WeightReport(len(checkpoint.weights), strict=False)
    report.problems = matcher.damaged([*whole, *in_blocks])
    types: dict[str, np.dtype[np.generic]] = {}
    for name, weight in checkpoint.weights.items():
        wholes, blocks = ([p for p in parts if p.weight == name] for parts in (whole, in_blocks))
        holders = next((ps for ps in (wholes, blocks) if ps and all(p in matcher.held for p in ps)), [])
        stored = ", ".join(dict.fromkeys(matcher.places[part][0][0] for part in holders)) or None
        dtype = weight.dtype if stored is None else matcher.held[holders[0]]
        size = weight.size * dtype.itemsize
        report.compared.append(Compared(name, stored, dtype.name, weight.shape, size, True if stored else None))
        if holders:
            types[name] = matcher.held[holders[0]]
            report.equal, report.nbytes = report.equal + 1, report.nbytes + weight.size * types[name].itemsize
        else:
            report.outputs_only.append(name)
    weights = {name: cast(checkpoint.weights[name], dtype) for name, dtype in types.items()}
    return Match(report, weights, {part: tuple(places) for part, places in matcher.places.items()})


def _parts(checkpoint: Checkpoint) -> tuple[list[Part], list[Part]]:
    """Every weight whole, and q, k and v on their own."""
    config, whole, blocks = checkpoint.config, list[Part](), list[Part]()
    rows = {bound.canonical: bound for bound in expand(family_named(config.family).scheme("hf").rows, config)}
    for name, weight in checkpoint.weights.items():
        bound = rows.get(name)
        as_one = bound is not None and len(bound.stored) == 1
        shape, steps = (bound.shape, bound.row.steps) if bound is not None and as_one else (weight.shape, ())
        whole.append(Part(name, weight, _layouts(weight.shape, shape, steps, padded=name in TABLES)))
        if ".c_attn." in name:
            one = (weight.shape[0] // 3, *weight.shape[1:])
            layouts = _layouts(one, one, (), padded=False)
            blocks += [Part(name, block, layouts, i * one[0]) for i, block in enumerate(split(weight, 3))]
    return whole, blocks


def _layouts(canonical: Shape, stored: Shape, steps: tuple[Transform, ...], *, padded: bool) -> tuple[Layout, ...]:
    """The canonical layout and transformers', each upright and flipped."""
    known = []
    for shape, own in ((canonical, ()), (stored, steps)):
        if own != (Transpose(),):  # that is the canonical layout, flipped
            known += [Layout(shape, own, flipped, padded) for flipped in (False, True)[: len(canonical)]]
    return tuple(dict.fromkeys(known))


@dataclass
class _Matcher:
    """Finds parts among tensors.

    Attributes:
        found: name → tensor of the file.
        sizes: the model's, for layouts.
        held: part → type of the tensor that holds it.
        used: names of the tensors that hold a part.
        shared: parts held by a tensor that holds an equal one too.
        places: part → all tensors that hold it.
    """

    found: Mapping[str, LazyTensor]
    sizes: Sizes
    held: dict[Part, np.dtype[np.generic]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    shared: set[Part] = field(default_factory=set)
    places: dict[Part, list[Place]] = field(default_factory=dict)
    _views: dict[Layout, list[_Views]] = field(default_factory=dict)

    def match(self, parts: Iterable[Part]) -> None:
        """Find a tensor for each part: one of its own if possible, or else one that holds an equal part."""
        for part in parts:
            similar = sorted(self._similar(part, 1.0), key=lambda similar: similar[0] in self.used)
            places = [place for place in similar if self._agreement(part, *place).exact]
            if places:
                name = places[0][0]
                self.held[part] = self.found[name].dtype.newbyteorder("=")
                self.shared |= {part} if name in self.used else set()
                self.used.add(name)
                self.places[part] = places

    def damaged(self, parts: Iterable[Part]) -> list[str]:
        """One line for each tensor that holds most of a part, and no part exactly."""
        exact, worst = set(self.used), dict[str, tuple[int, str]]()
        for part in parts:
            for name, layout in self._similar(part, MOSTLY / 2):
                if name in exact:
                    continue
                agreement = self._agreement(part, name, layout)
                if agreement.exact:
                    exact.add(name)
                elif agreement.mostly and (agreement.telling or part not in self.held or part in self.shared):
                    line = agreement.different, self._line(part, name, layout, agreement)
                    worst[name] = min(line, worst.get(name, line))
        return sorted(line for name, (_, line) in worst.items() if name not in exact)

    def _similar(self, part: Part, share: float) -> Iterator[tuple[str, Layout]]:
        """Tensors, and their layouts, in which at least a share of the part's samples is equal."""
        samples = sample(part.tensor)
        for layout in part.layouts:
            for views in self._views_in(layout):
                expected = samples.astype(views.samples.dtype)
                equal = _bits(expected) == _bits(views.samples)  # (n, SAMPLES)
                telling = is_telling(expected) if share < 1 else np.ones(len(expected), bool)
                telling = telling if telling.any() else ~telling
                for i in np.flatnonzero(equal[:, telling].mean(1) >= share):
                    yield views.names[i], layout

    def _views_in(self, layout: Layout) -> list[_Views]:
        """All tensors of the layout's size, by type."""
        if layout not in self._views:
            by_type: dict[np.dtype[np.generic], dict[str, Array]] = {}
            for name, tensor in self.found.items():
                view = layout.view(tensor, self.sizes)
                if view is not None:
                    by_type.setdefault(view.dtype.newbyteorder("="), {})[name] = sample(view)
            self._views[layout] = [_Views(tuple(s), np.stack(list(s.values()))) for s in by_type.values()]
        return self._views[layout]

    def _agreement(self, part: Part, name: str, layout: Layout) -> Agreement:
        view = layout.view(self.found[name], self.sizes)
        assert view is not None  # the layout was found to fit
        return _agreement(cast(part.tensor, view.dtype.newbyteorder("=")), view)

    def _line(self, part: Part, name: str, layout: Layout, agreement: Agreement) -> str:
        """The damage, with the index that the first different element has in the file's tensor."""
        shape = self.found[name].shape
        indices = layout.view(FlatIndex(shape), self.sizes)
        assert indices is not None and agreement.first is not None
        flat = indices.read(tuple(slice(i, i + 1) for i in agreement.first)).reshape(-1)[0]
        where = [int(i) for i in np.unravel_index(int(flat), shape)]
        return (
            f"{name}: {agreement.different} of {agreement.size} elements differ from {part.weight}, "
            f"first at element {where}"
        )


@dataclass(frozen=True, eq=False)
class _Views:
    """Tensors of one type in one layout: their names, and samples [n, SAMPLES]."""

    names: tuple[str, ...]
    samples: Array


def _agreement(part: LazyTensor, view: LazyTensor) -> Agreement:
    """Compare all elements of two tensors of one type and shape, block by block."""
    if isinstance(part, Transposed) and isinstance(view, Transposed):
        upright = _agreement(part.base, view.base)
        return dataclasses.replace(upright, first=upright.first and upright.first[::-1])
    different = telling = telling_equal = 0
    first: tuple[int, ...] | None = None
    for box in _blocks(part):
        expected, found = part.read(box), view.read(box)
        differs = _bits(expected) != _bits(found)
        if part.dtype == np.float16:
            differs &= ~((np.abs(expected) <= FLOAT16_CLAMP) & (np.abs(found) <= FLOAT16_CLAMP))
        mask = is_telling(expected)
        telling, telling_equal = telling + int(mask.sum()), telling_equal + int((mask & ~differs).sum())
        if first is None and differs.any():
            inside = np.unravel_index(int(np.argmax(differs)), differs.shape)
            first = tuple(int(i) + s.start for i, s in zip(inside, box, strict=True))
        different += int(differs.sum())
    return Agreement(part.size, different, first, telling, telling_equal)


def _blocks(tensor: LazyTensor) -> Iterator[Box]:
    """Boxes of a bounded number of bytes along axis 0."""
    rows, rest = tensor.shape[0], tuple(slice(0, n) for n in tensor.shape[1:])
    step = max(1, CHUNK_BYTES * rows // max(1, tensor.nbytes))
    for start in range(0, rows, step):
        yield (slice(start, min(start + step, rows)), *rest)


def sample(tensor: LazyTensor) -> Array:
    """The same :data:`SAMPLES` elements of every tensor of one shape."""
    random = np.random.default_rng(tensor.shape)
    cells = random.integers(0, tensor.shape, (SAMPLES, len(tensor.shape)))
    if tensor.nbytes <= SMALL:
        return np.ascontiguousarray(tensor.read()[tuple(cells.T)])
    return np.concatenate([tensor.read(tuple(slice(i, i + 1) for i in c)).reshape(-1) for c in cells.tolist()])


def _bits(array: Array) -> Array:
    return array.view(f"u{array.dtype.itemsize}")


def is_telling(array: Array) -> NDArray[np.bool_]:
    """Elements that are neither 0 nor 1, which many tensors have in common."""
    return np.asarray((array != 0) & (array != 1))


def _reshaped(tensor: LazyTensor, shape: Shape) -> LazyTensor:
    """The same elements in row-major order."""
    if tensor.shape == shape:
        return tensor
    if isinstance(tensor, FlatIndex):
        return FlatIndex(shape)
    if isinstance(tensor, Stored):
        return Stored(tensor.parts, tensor.dtype, shape)

    def read(box: Box) -> Array:
        return tensor.read().reshape(shape)[box]

    return Computed(read, tensor.dtype, shape)
