"""Other values for the weights of another exporter's graph, in the layout that each of its tensors has.

A weight is replaced only if every copy of it in the graph is certain to be replaced too: the graph must compute what
the reference model computes with the same values.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.schemes import sizes_of
from gptconvert.model.tensors import CHUNK_BYTES, Array, Box, Computed, LazyTensor
from gptconvert.model.transforms import Sizes, cast, take_rows
from gptconvert.verify.content import FlatIndex, Layout, Match, Part, Place, is_telling, sample
from gptconvert.verify.report import MOST_SHOWN

#: A tensor that holds no known weight may derive from one of this many times its size or fewer, or the reverse.
MOST_PARTS = 4
#: Largest number that float16 takes.
MOST_HALF = 6e4


@dataclass(frozen=True)
class Replacement:
    """Which tensors of a graph can be given other values.

    Attributes:
        tensors: name → the file's tensor.
        places: part of a weight → the tensors that hold it.
        types: the weights that can be replaced → their type in the file.
        kept: names of the other weights.
        sizes: the model's, for layouts.
    """

    tensors: Mapping[str, LazyTensor]
    places: Mapping[Part, tuple[Place, ...]]
    types: Mapping[str, np.dtype[np.generic]]
    kept: tuple[str, ...]
    sizes: Sizes

    def checkpoint(self, checkpoint: Checkpoint, values: Mapping[str, LazyTensor]) -> Checkpoint:
        """The checkpoint with other values, rounded to the types in the file."""
        replaced = {name: representable(values[name], dtype) for name, dtype in self.types.items()}
        return dataclasses.replace(checkpoint, weights={**checkpoint.weights, **replaced})

    def arrays(self, checkpoint: Checkpoint) -> dict[str, Array]:
        """Tensor → its content with the weights of ``checkpoint``, which :meth:`checkpoint` has returned."""
        made: dict[str, Array] = {}
        for part, places in self.places.items():
            rows = (part.start, part.start + part.tensor.shape[0])
            values = take_rows(checkpoint.weights[part.weight], [rows])
            for name, layout in places:
                made[name] = self._array(self.tensors[name], layout, values)
        return made

    def _array(self, tensor: LazyTensor, layout: Layout, values: LazyTensor) -> Array:
        """A tensor with ``values`` in the places that ``layout`` gives them; padding is unchanged."""
        array = np.array(tensor.read(), tensor.dtype.newbyteorder("="), order="C")
        flat, indices = array.reshape(-1), _indices(tensor, layout, self.sizes)
        for box in _boxes(values):
            flat[indices.read(box)] = values.read(box)
        return array


def replacement(
    tensors: Mapping[str, LazyTensor], others: Collection[int], match: Match, checkpoint: Checkpoint
) -> Replacement:
    """Find out which weights of a graph can be replaced.

    Args:
        tensors: those that were matched, by name.
        others: sizes of all other tensors of the graph, in elements.
        match: of ``tensors`` and the checkpoint's weights.
        checkpoint: the original.
    """
    sizes = sizes_of(checkpoint.config)
    holders = Counter(name for places in match.places.values() for name in {name for name, _ in places})
    unknown = {*others, *(t.size for name, t in tensors.items() if name not in holders and not _is_index(t))}
    rows, kept, types = Counter[str](), set[str](), dict[str, np.dtype[np.generic]]()
    for part, places in match.places.items():
        rows[part.weight] += part.tensor.shape[0]
        for name, layout in places:
            dtype = tensors[name].dtype.newbyteorder("=")
            one_type = types.setdefault(part.weight, dtype) == dtype
            one_order = all(_same_order(tensors[n], y, layout, sizes) for n, y in places if n == name)
            if holders[name] > 1 or not (one_type and one_order and _unmistakable(part)):
                kept.add(part.weight)
    for name, weight in checkpoint.weights.items():
        if rows[name] != weight.shape[0] or any(_may_derive(size, weight.size) for size in unknown):
            kept.add(name)
    return Replacement(
        tensors,
        {part: _distinct(found) for part, found in match.places.items() if part.weight not in kept},
        {name: dtype for name, dtype in types.items() if name not in kept},
        tuple(name for name in checkpoint.weights if name in kept),
        sizes,
    )


def kept_note(path: str, kept: Sequence[str], why: str) -> list[str]:
    """A note on the weights that stress weights do not replace."""
    if not kept:
        return []
    more = f" and {len(kept) - MOST_SHOWN} more" if len(kept) > MOST_SHOWN else ""
    note = (
        f"{path}: while it ran with stress weights, {len(kept)} kept the checkpoint's values "
        f"({', '.join(kept[:MOST_SHOWN])}{more}), because {why}"
    )
    return [note]


def _is_index(tensor: LazyTensor) -> bool:
    return tensor.dtype.kind == "b" or (tensor.dtype.kind in "iu" and tensor.dtype.itemsize > 1)


def _unmistakable(part: Part) -> bool:
    """Whether no constant has the same content by chance: neither zeros and ones nor one repeated value."""
    values = sample(part.tensor)
    return len(np.unique(values[is_telling(values)])) > 1


def _may_derive(size: int, weight: int) -> bool:
    """Whether a tensor may be a part or a multiple of a weight in another form (scaled, quantised)."""
    return any(size * count == weight or weight * count == size for count in range(1, MOST_PARTS + 1))


def _same_order(tensor: LazyTensor, a: Layout, b: Layout, sizes: Sizes) -> bool:
    """Whether two layouts give a tensor's elements the same order."""
    first, second = (sample(_indices(tensor, layout, sizes)) for layout in (a, b))
    return a == b or np.array_equal(first, second)


def _indices(tensor: LazyTensor, layout: Layout, sizes: Sizes) -> LazyTensor:
    """For each element of a part, its index in the tensor that holds it."""
    view = layout.view(FlatIndex(tensor.shape), sizes)
    assert view is not None  # the layout was found to fit
    return view


def _distinct(places: tuple[Place, ...]) -> tuple[Place, ...]:
    """One layout for each tensor."""
    return tuple(dict(places).items())


def _boxes(tensor: LazyTensor) -> Iterator[Box]:
    """Boxes of a bounded size along axis 0."""
    rows, rest = tensor.shape[0], tuple(slice(0, n) for n in tensor.shape[1:])
    step = max(1, CHUNK_BYTES * rows // (8 * max(1, tensor.size)))
    for start in range(0, rows, step):
        yield (slice(start, min(start + step, rows)), *rest)


def representable(tensor: LazyTensor, dtype: np.dtype[np.generic]) -> LazyTensor:
    """The values in ``dtype``; what float16 cannot hold, cut to what it can."""
    if dtype != np.float16:
        return cast(tensor, dtype)

    def read(box: Box) -> Array:
        return np.clip(tensor.read(box), -MOST_HALF, MOST_HALF).astype(dtype)

    return Computed(read, dtype, tensor.shape)
