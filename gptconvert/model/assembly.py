"""Name and cut the tensors of files that do not store them whole and by name, and give parts their full shape.

Some files lack tensor names, some lack tensor boundaries, and some store only parts of tensors. The name table
(:class:`~gptconvert.model.schemes.Scheme`) supplies what is missing: rows, their order, shapes and shard rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from gptconvert.errors import FETCH_AGAIN, InputError, UnsupportedError
from gptconvert.model.edits import without_ignored
from gptconvert.model.options import Options
from gptconvert.model.resolution import find_prefix
from gptconvert.model.schemes import Order, Row, Scheme, concrete, sizes_of
from gptconvert.model.shards import Parts
from gptconvert.model.source import Run, Source
from gptconvert.model.tensors import FileChecksum, LazyTensor, Segment, Stored, TensorSet
from gptconvert.model.wrappers import unwrapped
from reference_model.config import GPTConfig

UNKNOWN = "unknown tensors"


def in_order(scheme: Scheme, layers: int) -> list[tuple[Row, str]]:
    """(row, name) of each tensor of a model with ``layers`` layers, in the order of files without names."""
    order = _order(scheme)
    found = [(row, i) for row in scheme.rows for i in (range(layers) if "{i}" in row.canonical else (-1,))]
    if order.by == "layer":
        found.sort(key=lambda pair: pair[1])
    named = {  # rows that differ only in their conditions are one tensor
        scheme.write_prefix + name.replace("{i}", str(i)): row
        for row, i in found
        for name in (*row.names, *((row.added,) if row.added is not None else ()))
    }
    return [(named[name], name) for name in (sorted(named) if order.by == "name" else named)]


def assemble(scheme: Scheme, source: Source, options: Options | None = None) -> TensorSet:
    """The source's tensors under the names of ``scheme``, as far as possible without the configuration.

    Parts are not merged yet, but have the shape of the merged tensor. A :class:`Run` is not cut yet.

    Raises:
        InputError: the number of unnamed arrays fits no model, or parts are missing or inconsistent.
        UnsupportedError: tensors of an option that is not implemented.
        UsageError: a pattern of ``options.ignore_tensor`` matches no tensor.
    """
    found = _named(scheme, source) if source.unnamed else source.tensors
    stored, notes = unwrapped(found, source.path)
    if stored:
        tensors = {name: found[old] for name, old in stored.items()}
        found = replace(found, tensors=tensors, notes=(*found.notes, *notes))
    if scheme.renamed is not None:
        names = scheme.renamed(found.keys(), source.path)
        stored = {new: stored.get(old, old) for old, new in names.items()}
        found = replace(found, tensors={names[name]: tensor for name, tensor in found.items()})
    found = without_ignored(found, options or Options(), source.path, stored=stored)
    prefix = find_prefix(scheme, found) or ""
    if scheme.variants:
        _refuse_variants(scheme, found, prefix, source.path)
    if not any(isinstance(tensor, Parts) for tensor in found.values()):
        return found
    tensors = {
        name: _checked_parts(scheme, name, prefix, tensor, source.path) if isinstance(tensor, Parts) else tensor
        for name, tensor in found.items()
    }
    return replace(found, tensors=tensors)


def cut(scheme: Scheme, config: GPTConfig, run: Run) -> dict[str, LazyTensor]:
    """The tensors of a run of elements, which must end with the last tensor.

    Raises:
        InputError: the run is too long or too short.
    """
    sizes, padded = {**sizes_of(config), **run.sizes}, _order(scheme).padded
    tensors: dict[str, LazyTensor] = {}
    path, start, end = run.segment.path, run.segment.offset, run.segment.end
    for row, name in in_order(scheme, config.n_layer):
        shape = concrete(row.shape, sizes)
        nbytes = math.prod(shape) * run.dtype.itemsize
        tensors[name] = Stored((Segment(path, start, nbytes),), run.dtype, shape)
        start += nbytes // shape[0] * sizes[padded[name]] if name in padded else nbytes
    if start != end:
        raise InputError(
            "file is truncated" if end < start else "file is longer than its header implies",
            path=path,
            expected=f"{start} bytes",
            found=f"{end} bytes",
            hint=FETCH_AGAIN if end < start else None,
        )
    return tensors


def _order(scheme: Scheme) -> Order:
    if scheme.order is None:
        raise ValueError(f"the scheme {scheme.name} has no order: its files have tensor names")
    return scheme.order


def _named(scheme: Scheme, source: Source) -> TensorSet:
    """The unnamed arrays with names. Optimizer arrays, which come first, are left out, and so are their checksums."""
    left_out, layers = _count(scheme, source.unnamed, source.path)
    names = [*(name for _, name in in_order(scheme, layers)), *_order(scheme).last]
    tensors = dict(zip(names, source.unnamed[left_out:], strict=True))
    checksums: list[FileChecksum] = list(source.tensors.checksums)
    for tensor in tensors.values():
        checksums += tensor.checksums if isinstance(tensor, Parts) else ()
    notes = [f"{left_out} optimizer arrays are left out"] if left_out else []
    return TensorSet(tensors, source.tensors.files, (*source.tensors.notes, *notes), tuple(checksums))


def _count(scheme: Scheme, unnamed: Sequence[LazyTensor], path: str) -> tuple[int, int]:
    """The number of optimizer arrays, which come first, and the number of layers of the remaining arrays."""
    order, outside, count = _order(scheme), len(in_order(scheme, 0)), len(unnamed)
    in_layer, last = len(in_order(scheme, 1)) - outside, len(order.last)
    forms = [(1, last)]
    if order.optimizer is not None:
        forms.append((1 + order.optimizer[0], last + order.optimizer[1]))
    for copies, extra in forms:
        layers, rest = divmod(count - extra - copies * outside, copies * in_layer)
        if layers > 0 and rest == 0:
            return count - outside - layers * in_layer - last, layers
    where = f" in every {unnamed[0].unit}" if isinstance(unnamed[0], Parts) else ""
    expected = [f"{copies * in_layer} L + {copies * outside + extra}" for copies, extra in forms]
    raise InputError(
        "the number of arrays does not match any number of layers",
        path=path,
        expected=", with optimizer state ".join([f"{expected[0]} for L layers", *expected[1:]]),
        found=f"{count} arrays{where}",
    )


def _refuse_variants(scheme: Scheme, names: Iterable[str], prefix: str, path: str) -> None:
    """Refuse tensors that the table does not list.

    Raises:
        UnsupportedError: a tensor of a known but unimplemented option, or an unknown tensor.
    """
    found: dict[str, str] = {}
    for name in names:
        if not _lists(scheme, bare := name.removeprefix(prefix)):
            option = next((v.option for v in scheme.variants if re.fullmatch(v.pattern, bare)), UNKNOWN)
            found.setdefault(option, name)
    if found:
        raise UnsupportedError(
            f"this variant of the architecture is not implemented: {', '.join(found)}",
            path=path,
            found=", ".join(list(found.values())[:5]),
            hint="transformers does not implement it either" if UNKNOWN not in found else None,
        )


def _lists(scheme: Scheme, bare: str) -> bool:
    """Whether the table lists a name without prefix: as a row, a tied copy, an addend or a dropped tensor."""
    others = (*(tied.stored for tied in scheme.tied), *(row.added for row in scheme.rows))
    dropped = any(re.fullmatch(drop.pattern, bare) for drop in scheme.drops)
    return dropped or bare in others or row_of(scheme, bare) is not None


#: Longer names are in no table.
MAX_NAME = 200


def row_of(scheme: Scheme, bare: str) -> Row | None:
    """The row of a name without prefix, for any layer and configuration."""
    if len(bare) > MAX_NAME:
        return None
    templates = {bare, *(f"{bare[: n.start()]}{{i}}{bare[n.end() :]}" for n in re.finditer(r"\d+", bare))}
    return next((row for row in scheme.rows if not templates.isdisjoint((*row.names, *row.aliases))), None)


def _checked_parts(scheme: Scheme, name: str, prefix: str, parts: Parts, path: str) -> Parts:
    """The parts, checked to be complete and consistent, with the merged shape that their row gives."""
    unit, held = parts.unit, parts.held
    missing = [str(number) for number, part in enumerate(parts.parts) if part is None]
    if missing:
        raise InputError(f"tensor is missing on {unit} {', '.join(missing)}", path=path, item=name)
    if len({part.shape for part in held}) > 1:
        listed = ", ".join(str(list(part.shape)) for part in held)
        raise InputError(f"the {unit}s' parts differ in shape", path=path, item=name, found=listed)
    row = row_of(scheme, name.removeprefix(prefix))
    whole = parts if row is None else replace(parts, axis=row.shards.axis)
    # Otherwise a missing shard would look like a smaller model, and the configuration may be missing too.
    if row is not None and row.shape == "D D" and len({*whole.shape}) > 1:
        raise InputError(
            f"some {unit}s are missing, or {unit}s of different models are mixed",
            path=path,
            item=name,
            expected=f"a square matrix from {len(held)} {unit}s",
            found=f"parts of shape {list(held[0].shape)}",
        )
    return whole
