"""Match the tensors of a file with a name table (:class:`~gptconvert.model.schemes.Scheme`), by headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gptconvert.errors import InputError, UsageError
from gptconvert.model.dtypes import holding_all
from gptconvert.model.mismatch import MismatchError
from gptconvert.model.names import collapse
from gptconvert.model.quantised import refuse_other_types, types_of
from gptconvert.model.schemes import Bound, Drop, Scheme, canonical_shapes, concrete, expand, sizes_of, to_canonical
from gptconvert.model.shards import Merge, Parts, merge_parts
from gptconvert.model.tensors import LazyTensor, Shape, filled
from gptconvert.model.transforms import in_native_order
from reference_model.config import ConfigError, GPTConfig

#: Different sizes in tensors of wrong shapes; more do not come from one wrong size of the configuration.
MAX_AXES = 8


@dataclass(frozen=True)
class Resolved:
    """A file's tensors, with parts joined.

    Attributes:
        weights: by canonical name, in canonical layout and native byte order.
        tensors: by the file's names.
        prefix: of the file's body names.
        dropped: name of each tensor left out → the reason.
        notes: for the user.
    """

    weights: Mapping[str, LazyTensor]
    tensors: Mapping[str, LazyTensor]
    prefix: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_prefix(scheme: Scheme, names: Iterable[str]) -> str | None:
    """The prefix of the file's body names, from the anchor tensor; None if the anchor is missing."""
    return min(find_prefixes(scheme, names), key=len, default=None)


def find_prefixes(scheme: Scheme, names: Iterable[str]) -> list[str]:
    """The prefix of every model in the file: most hold one, but reinforcement learning stores several."""
    names = list(names)
    for anchor in filter(None, (scheme.anchor, scheme.fallback)):
        found = [name[: -len(anchor)] for name in names if name.endswith(anchor)]
        if scheme.prefixes is None:
            fitting = [p for p in found if p == "" or p.endswith(scheme.separator)]
        else:
            fitting = [p for p in found if p in scheme.prefixes]
        if fitting:
            return fitting
    return []


def choose_scope(
    scheme: Scheme, tensors: Mapping[str, LazyTensor], scope: str | None, path: str | None
) -> dict[str, str]:
    """The tensors of models other than the chosen one: name → scope.

    Args:
        scheme: the name table.
        tensors: all tensors of the file.
        scope: the user's choice, the part of the names before the model's; None if the file holds one model.
        path: the checkpoint, used in error messages.

    Raises:
        UsageError: the file holds several models and none was chosen, or not the chosen one.
    """
    prefixes = {head_prefix(scheme, prefix) for prefix in find_prefixes(scheme, tensors)}
    scopes = {prefix.removesuffix(scheme.separator): prefix for prefix in sorted(prefixes)}
    if len(scopes) < 2 and scope in (None, *scopes):
        return {}
    if scope not in scopes:
        listed = _some([each or '"" (no prefix)' for each in scopes]) if scopes else "no model"
        raise UsageError(
            "several models in one file" if scope is None else f"no model under --scope {scope!r}",
            path=path,
            expected="the scope of one of them" if scope is None else None,
            found=listed,
            hint="pass --scope NAME with one of these names" if scopes else "omit --scope",
        )
    owners = {prefix: each for each, prefix in scopes.items()}
    lengths = sorted({*map(len, owners)}, reverse=True)  # the longest prefix of a name is its model's
    found = {name: next((owners[name[:n]] for n in lengths if name[:n] in owners), scope) for name in tensors}
    return {name: owner for name, owner in found.items() if owner != scope}


def head_prefix(scheme: Scheme, prefix: str) -> str:
    """The prefix of head tensors: ``prefix`` without the body's part."""
    return prefix.removesuffix(scheme.body) if scheme.body else prefix


def resolve(
    scheme: Scheme, config: GPTConfig, tensors: Mapping[str, LazyTensor], *, path: str | None = None
) -> Resolved:
    """Canonical weights from a file's tensors, using headers only.

    Raises:
        InputError: tensors are missing, unexpected or mis-shaped; the error lists all of them.
        UnsupportedError: weights of other than float types; the error lists them.
    """
    prefix = find_prefix(scheme, tensors)
    if prefix is None:
        raise InputError(
            f"no tensor named {scheme.anchor!r} under a known prefix",
            path=path,
            expected=f"a tensor {scheme.anchor!r}, with or without a prefix",
            found=_some(sorted(tensors)),
            hint="the names do not match any supported model; list them with `gptconvert inspect`",
        )
    outer, sizes = head_prefix(scheme, prefix), sizes_of(config)
    bound = [b.named_as_in(tensors) for b in expand(scheme.rows, config, prefix, outer)]
    ties = [(outer if tied.head else prefix) + tied.stored for tied in scheme.tied if tied.when(config)]
    merges = _merges(scheme, config, tensors, prefix)
    refuse_other_types([*(name for b in bound for name in b.stored), *ties, *merges], tensors, path)
    mixed = _mixed_types(bound, tensors)
    tensors, notes = merge_parts(tensors, merges)
    matching = _Matching(tensors, sizes, prefix + scheme.anchor)
    for b in bound:
        matching.add(b, config)
    for tied in scheme.tied:
        if tied.when(config):
            matching.expect((outer if tied.head else prefix) + tied.stored, concrete(tied.shape, sizes))
    drops = [drop for drop in scheme.drops if drop.when(config)]
    left = [name for name in tensors if name not in matching.used]
    dropped, unexpected = _split_leftovers(drops, (prefix, outer), left)
    if outer and scheme.separator == ".":
        notes = (*notes, f"removed the prefix {outer!r} from the tensor names")
    if matching.missing or unexpected or matching.misshaped:
        alone = not matching.missing and not unexpected
        raise MismatchError(
            matching.missing,
            unexpected,
            matching.misshaped,
            path=path,
            fit=_fitting_size(scheme, config, tensors, prefix, matching.misshaped) if alone else None,
            untied=config.has_lm_head and not config.tied_head,
            layers=config.n_layer,
        )
    reasons = {name: drop.why for name, drop in dropped.items()}
    weights = {name: in_native_order(weight) for name, weight in matching.weights.items()}
    return Resolved(weights, tensors, prefix, reasons, (*notes, *mixed, *_drop_notes(dropped)))


class _Matching:
    """The weights found in a file so far, and what does not fit.

    Args:
        tensors: of the file.
        sizes: of the model, by their symbols in shapes.
        anchor: name of the tensor whose type filled weights have.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], sizes: Mapping[str, int], anchor: str) -> None:
        self.tensors, self.sizes, self.anchor = tensors, sizes, anchor
        self.weights: dict[str, LazyTensor] = {}
        self.missing: list[str] = []
        self.misshaped: list[tuple[str, Shape, Shape]] = []
        self.used: set[str] = set()

    def add(self, bound: Bound, config: GPTConfig) -> None:
        """Find a weight's tensors, or fill a weight that may be absent."""
        self.used.update(bound.stored)
        absent = [name for name in bound.stored if name not in self.tensors]
        if absent and bound.row.absent is not None:
            shape = canonical_shapes([bound.row], config)[bound.canonical]
            self.weights[bound.canonical] = filled(bound.row.absent, self.tensors[self.anchor].dtype, shape)
            return
        self.missing += absent
        fitting = [self.expect(name, bound.shape) for name in bound.stored if name in self.tensors]
        if not absent and all(fitting):
            self.weights[bound.canonical] = to_canonical(bound, self.tensors, self.sizes)

    def expect(self, name: str, shape: Shape) -> bool:
        """Whether a tensor, if the file has it, has this shape."""
        if name in self.tensors:
            self.used.add(name)
            if self.tensors[name].shape != shape:
                self.misshaped.append((name, shape, self.tensors[name].shape))
                return False
        return True


def _fitting_size(
    scheme: Scheme,
    config: GPTConfig,
    tensors: Mapping[str, LazyTensor],
    prefix: str,
    misshaped: Iterable[tuple[str, Shape, Shape]],
) -> tuple[str, int] | None:
    """The one size of the configuration, and its value, with which every shape fits; None if there is none."""
    axes = {size for _, _, found in misshaped for size in found} - {0}
    if len(axes) > MAX_AXES:
        return None
    for field_ in ("vocab_size", "n_ctx", "n_inner"):
        for size in sorted(axes - {getattr(config, field_)}):
            change: dict[str, Any] = {field_: size}
            try:
                trial = replace(config, **change)
            except ConfigError:
                continue
            outer = head_prefix(scheme, prefix)
            shapes = {name: b.shape for b in expand(scheme.rows, trial, prefix, outer) for name in b.stored}
            tied = [t for t in scheme.tied if t.when(trial)]
            shapes |= {(outer if t.head else prefix) + t.stored: concrete(t.shape, sizes_of(trial)) for t in tied}
            if all(tensors[name].shape == shape for name, shape in shapes.items() if name in tensors):
                return field_, size
    return None


def _drop_notes(dropped: Mapping[str, Drop]) -> list[str]:
    """The notes on tensors left out, one for each kind that is worth a note."""
    noted: dict[str, list[str]] = {}
    for name, drop in dropped.items():
        if drop.note:
            noted.setdefault(drop.note, []).append(name)
    return [f"{note}: {_some(names)}" for note, names in noted.items()]


def _mixed_types(bound: Iterable[Bound], tensors: Mapping[str, LazyTensor]) -> list[str]:
    """A note on the tensors whose parts, in one file or on several shards, have different types."""
    mixed = {}
    for b in bound:
        types = {dtype.newbyteorder("=") for n in b.stored if n in tensors for dtype in types_of(tensors[n])}
        if len(types) > 1:
            mixed[b.stored[0]] = holding_all(sorted(types, key=str)).name
    if not mixed:
        return []
    wide = " or ".join(sorted({*mixed.values()}))
    return [f"parts of different types are joined in the type that holds all of them, {wide}: {_some([*mixed])}"]


def _merges(scheme: Scheme, config: GPTConfig, tensors: Mapping[str, LazyTensor], prefix: str) -> dict[str, Merge]:
    """File name → how to join its parts, including tensors that a model with this configuration lacks."""
    if not any(isinstance(tensor, Parts) for tensor in tensors.values()):
        return {}
    found: dict[str, Merge] = {}
    for row in sorted(scheme.rows, key=lambda row: row.when(config)):
        for b in expand([replace(row, when=lambda config: True)], config, prefix, head_prefix(scheme, prefix)):
            added = None if row.added is None else prefix + row.added
            found |= dict.fromkeys((*b.stored, *b.aliases), Merge(row.shards, b.shape, added))
    return found


def tied_pairs(
    scheme: Scheme, config: GPTConfig, tensors: Mapping[str, LazyTensor], prefix: str
) -> list[tuple[str, str]]:
    """(file name, canonical name) of every stored tensor that must equal a canonical one."""
    outer = head_prefix(scheme, prefix)
    names = [((outer if t.head else prefix) + t.stored, t) for t in scheme.tied if t.when(config)]
    return [(name, t.to) for name, t in names if name in tensors]


def _split_leftovers(
    drops: Iterable[Drop], prefixes: Iterable[str], names: Iterable[str]
) -> tuple[dict[str, Drop], list[str]]:
    """Leftover names, split into dropped ones with their rules and unexpected ones."""
    dropped, unexpected = {}, []
    for name in names:
        bare = {name.removeprefix(prefix) for prefix in prefixes}
        rule = next((d for d in drops if any(re.fullmatch(d.pattern, b) for b in bare)), None)
        if rule is None:
            unexpected.append(name)
        else:
            dropped[name] = rule
    return dropped, unexpected


def _some(names: list[str], most: int = 6) -> str:
    shown = ", ".join(collapse(names)[:most])
    return f"{shown}, … ({len(names)} in all)" if len(collapse(names)) > most else shown or "no tensors"
