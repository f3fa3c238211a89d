"""Name tables: one row per tensor, used for reading, writing, inspecting and testing.

A table (:class:`Scheme`) belongs to one naming scheme of one family. Rows are templates over the layer index
``{i}``; :func:`expand` turns them into names and shapes for a configuration. Missing, unexpected or mis-shaped
tensors are therefore found from file headers, before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from gptconvert.model.shards import FIRST, Shards
from gptconvert.model.tensors import LazyTensor, Shape
from gptconvert.model.transforms import Sizes, Transform, concatenate, split
from reference_model.config import GPTConfig

Condition = Callable[[GPTConfig], bool]


@dataclass(frozen=True)
class Row:
    """One canonical tensor and the file's tensor or tensors that store it.

    Attributes:
        canonical: canonical name template (``h.{i}.attn.c_attn.weight``).
        stored: the file's name template, or several whose canonical forms are stacked along axis 0 (q, k, v).
        shape: shape of each of ``stored``, in symbols, multiples and sums: ``"1 D 3D"``, ``"C+2 D"``.
        steps: transforms from the file's layout to the canonical one, in order.
        when: whether a model with this configuration has the tensor.
        absent: value to fill in if the file omits the tensor (nanoGPT's ``bias=False``); None: it is required.
        head: True for tensors outside the transformer body, whose names lack the body prefix.
        aliases: other names of ``stored`` (one name), with or without the body prefix; read but never written.
        shards: how to join the parts of each of ``stored`` in sharded files.
        added: in sharded files, name of a vector whose parts are added to every row of ``stored`` (one name).
    """

    canonical: str
    stored: str | tuple[str, ...]
    shape: str
    steps: tuple[Transform, ...] = ()
    when: Condition = lambda config: True
    absent: float | None = None
    head: bool = False
    aliases: tuple[str, ...] = ()
    shards: Shards = FIRST
    added: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.stored,) if isinstance(self.stored, str) else self.stored


@dataclass(frozen=True)
class Drop:
    """Known tensors to leave out.

    Attributes:
        pattern: regular expression for the whole name, without the prefix.
        why: the reason.
        when: whether a model with this configuration lacks them.
        note: sentence for the user, which the names follow; empty if they are not worth a note.
    """

    pattern: str
    why: str
    when: Condition = lambda config: True
    note: str = ""


@dataclass(frozen=True)
class Tied:
    """``stored`` repeats the canonical tensor ``to``: equal bytes are dropped, different bytes are an error."""

    stored: str
    to: str
    shape: str
    when: Condition = lambda config: config.tied_head
    head: bool = True


@dataclass(frozen=True)
class Order:
    """The order of a scheme's tensors in files that do not name them.

    Attributes:
        by: ``layer``: tensors outside the layers, then layer by layer, in row order; ``row``: row by row, each with
            all its layers; ``name``: sorted by name, so that layer 10 follows layer 1.
        last: names of the arrays after all tensors (a training counter).
        optimizer: number of copies of all tensors, and of single arrays, in the optimizer state; if a checkpoint has
            it, it comes first.
        padded: stored name → symbol for its number of rows in the file, including padding at the end.
    """

    by: Literal["layer", "row", "name"]
    last: tuple[str, ...] = ()
    optimizer: tuple[int, int] | None = None
    padded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """Tensors of a trainer option that is not implemented: a regular expression for the name, and the option."""

    pattern: str
    option: str


@dataclass(frozen=True)
class Scheme:
    """How one file format names and lays out one family's tensors.

    Attributes:
        name: of the naming scheme (``hf``, ``openai-tf`` …), as in :attr:`Source.scheme`.
        rows: one per canonical tensor.
        anchor: name of a tensor present in every such file, which determines the prefix.
        fallback: anchor of files that store the first one under another name only; empty if there are none.
        prefixes: allowed prefixes of body names; None: empty, or any that ends in ``separator``.
        separator: of the parts of names, if ``prefixes`` is None.
        body: the part of the prefix that head tensors lack.
        write_prefix: prefix used when writing.
        drops: known tensors to leave out. Patterns are matched without the prefix.
        tied: repeated tensors.
        order: of the tensors in files without names; None: all files have names.
        renamed: (a file's names, its path) → the table's name for each, for trainers that number modules
            differently; raises InputError for inconsistent names.
        variants: trainer options recognised by tensors outside the table. If set, every tensor outside the table is
            rejected, by the option's name, before the configuration is read.
    """

    name: str
    rows: tuple[Row, ...]
    anchor: str
    fallback: str = ""
    prefixes: tuple[str, ...] | None = ("",)
    separator: str = "/"
    body: str = ""
    write_prefix: str = ""
    drops: tuple[Drop, ...] = ()
    tied: tuple[Tied, ...] = ()
    order: Order | None = None
    renamed: Callable[[Collection[str], str], Mapping[str, str]] | None = None
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class Bound:
    """A row for one layer: canonical name, file names, the shape of each, and aliases."""

    row: Row
    canonical: str
    stored: tuple[str, ...]
    shape: Shape
    aliases: tuple[str, ...] = ()

    def named_as_in(self, tensors: Container[str]) -> Bound:
        """The same tensor under the name used in this file."""
        alias = next((name for name in self.aliases if name in tensors), None)
        return self if alias is None or self.stored[0] in tensors else replace(self, stored=(alias,))


def sizes_of(config: GPTConfig) -> dict[str, int]:
    """The values of the symbols used in shapes."""
    return {
        "V": config.vocab_size,
        "C": config.n_ctx,
        "D": config.n_embd,
        "H": config.n_head,
        "F": config.n_inner,
        "K": config.n_labels,
    }


def concrete(shape: str, sizes: Sizes) -> Shape:
    """``"1 D 3D C+2"`` with C = 40, D = 24 → (1, 24, 72, 42).

    Raises:
        ValueError: a word is not a sum of numbers and multiples of symbols.
    """
    return tuple(_axis(word, shape, sizes) for word in shape.split())


def _axis(word: str, shape: str, sizes: Sizes) -> int:
    terms = [re.fullmatch(r"(\d+)|(\d*)([A-Z])", term) for term in word.split("+")]
    if any(m is None or (m[3] is not None and m[3] not in sizes) for m in terms):
        raise ValueError(f"{word!r} of the shape {shape!r} is not a size: expected one such as 3, D, 3D or C+2")
    return sum(int(m[1]) if m[3] is None else int(m[2] or 1) * sizes[m[3]] for m in terms if m is not None)


def expand(rows: Iterable[Row], config: GPTConfig, prefix: str = "", head_prefix: str = "") -> list[Bound]:
    """The rows for every layer of ``config``, sorted by canonical name (bytewise, as in TensorFlow's bundles)."""
    sizes, bound = sizes_of(config), []
    for row in rows:
        if not row.when(config):
            continue
        before = head_prefix if row.head else prefix
        for i in range(config.n_layer) if "{i}" in row.canonical else (0,):
            names = tuple(before + name.replace("{i}", str(i)) for name in row.names)
            aliases = tuple(p + name.replace("{i}", str(i)) for name in row.aliases for p in (prefix, head_prefix))
            bound.append(Bound(row, row.canonical.replace("{i}", str(i)), names, concrete(row.shape, sizes), aliases))
    return sorted(bound, key=lambda b: b.canonical)


def canonical_shapes(rows: Iterable[Row], config: GPTConfig) -> dict[str, Shape]:
    """Canonical name → shape of every tensor of a model with this configuration."""
    sizes, shapes = sizes_of(config), {}
    for bound in expand(rows, config):
        shape = bound.shape
        for step in bound.row.steps:
            shape = step.shape(shape, sizes)
        shapes[bound.canonical] = (shape[0] * len(bound.stored), *shape[1:])
    return shapes


def to_canonical(bound: Bound, tensors: Mapping[str, LazyTensor], sizes: Sizes) -> LazyTensor:
    """The canonical tensor of ``bound`` from the file's tensors."""
    parts = []
    for name in bound.stored:
        tensor = tensors[name]
        for step in bound.row.steps:
            tensor = step.forward(tensor, sizes)
        parts.append(tensor)
    return concatenate(parts)


def from_canonical(bound: Bound, weight: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    """The file's tensors of ``bound`` from the canonical one: the inverse of :func:`to_canonical`."""
    written = {}
    for name, part in zip(bound.stored, split(weight, len(bound.stored)), strict=True):
        for step in reversed(bound.row.steps):
            part = step.inverse(part, sizes)
        written[name] = part
    return written


def write_names(
    scheme: Scheme, config: GPTConfig, weights: Mapping[str, LazyTensor], *, bare: bool = False
) -> dict[str, LazyTensor]:
    """All tensors under the names and in the layout of ``scheme``, sorted by name."""
    sizes, written = sizes_of(config), {}
    for bound in expand(scheme.rows, config, "" if bare else scheme.write_prefix):
        weight = weights.get(bound.canonical)
        if weight is None:  # the layout requires a tensor that the model lacks
            raise KeyError(bound.canonical)
        written.update(from_canonical(bound, weight, sizes))
    return dict(sorted(written.items()))
