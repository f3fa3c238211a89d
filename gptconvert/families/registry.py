"""The GPT families: one file each, listed once here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families import codegen, gpt1, gpt2, gpt_neo, gpt_neox, gptj
from gptconvert.families.family import Family, trim_vocabulary
from gptconvert.model.assembly import assemble, cut
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.model.resolution import find_prefix, resolve
from gptconvert.model.source import Source
from gptconvert.model.tensors import LazyTensor

FAMILIES: tuple[Family, ...] = (
    gpt1.FAMILY,
    gpt2.FAMILY,
    gpt_neo.FAMILY,
    gptj.FAMILY,
    gpt_neox.FAMILY,
    codegen.FAMILY,
)

__all__ = ["FAMILIES", "Family", "Options", "family_of", "understand"]


def family_named(name: str) -> Family:
    """The family of a configuration."""
    return next(family for family in FAMILIES if family.name == name)


def family_of(source: Source) -> Family:
    """The family whose files these are: by ``model_type`` where the configuration says it, else by tensor names.

    Raises:
        UnsupportedError: no family here has this model type.
        InputError: nothing says which family it is.
    """
    declared = source.config.get("model_type")
    able = [family for family in FAMILIES if family.reads(source.scheme)]
    if declared is not None:
        for family in able:
            if declared in family.model_types:
                return family
        known = ", ".join(t for family in FAMILIES for t in family.model_types)
        raise UnsupportedError(
            f"model_type {declared!r} is not supported",
            path=source.config_path,
            item="model_type",
            expected=f"one of {known}",
            found=declared,
        )
    guesses = _fitting(source)
    if source.scheme == "hf":
        raise InputError(
            "no model_type, so the architecture is not known",
            path=source.config_path or source.path,
            hint=f'the tensor names look like {guesses[0].name}: add "model_type" to config.json'
            if guesses
            else None,
        )
    if guesses:
        return guesses[0]
    if able:
        return able[0]  # its name table says, tensor by tensor, what does not fit
    raise UnsupportedError(f"no family reads {source.format} files", path=source.path)


def understand(source: Source, options: Options) -> Checkpoint:
    """The checkpoint behind a source: configuration read, every tensor accounted for. Headers only.

    Raises:
        InputError: configuration and tensors do not fit each other, or either is wrong.
        UnsupportedError: a configuration key or a family is not implemented.
        UsageError: something was asked that the files themselves decide.
    """
    family = family_of(source)
    scheme = family.scheme(source.scheme)
    try:
        named = assemble(scheme, source)
        config, carried, notes = family.read_config(source.scheme, source.config, source.config_path, named, options)
        tensors = named if source.run is None else cut(scheme, config, source.run)
        resolved = resolve(scheme, config, tensors, path=source.path)
    except InputError as error:
        others = [other.name for other in _fitting(source) if other is not family]
        if others:
            error.hint = f"the configuration says {family.name}, the tensor names look like {', '.join(others)}"
        raise
    found = replace(named, tensors=resolved.tensors, notes=(*named.notes, *resolved.notes))
    weights = resolved.weights
    if options.trim_vocab is not None:
        config, weights, trimmed = trim_vocabulary(config, weights, options.trim_vocab)
        notes = [*notes, *trimmed]
    return Checkpoint(
        config=config,
        weights=weights,
        source=replace(source, tensors=found, unnamed=(), run=None),
        prefix=resolved.prefix,
        dropped=resolved.dropped,
        carried=carried,
        notes=(*source.notes, *found.notes, *notes, *_mixed_types(weights)),
        options=options,
    )


def _mixed_types(weights: Mapping[str, LazyTensor]) -> list[str]:
    """A note, where the weights are not all of one type."""
    types = sorted({weight.dtype.name for weight in weights.values()})
    text = f"the weights are of several types, {' and '.join(types)}: each is kept as it is (--dtype makes them one)"
    return [text] if len(types) > 1 else []


def _fitting(source: Source) -> list[Family]:
    """Families one of whose layers' tensors are all here, best first."""
    scored = []
    for family in FAMILIES:
        for scheme in family.schemes:
            prefix = find_prefix(scheme, source.tensors) if scheme.name == source.scheme else None
            if prefix is None:
                continue
            wanted = [prefix + n.replace("{i}", "0") for row in scheme.rows if not row.head for n in row.names]
            found = sum(name in source.tensors for name in wanted)
            if found > len(wanted) // 2:
                scored.append((found / len(wanted), family))
    return [family for _, family in sorted(scored, key=lambda pair: -pair[0])]
