"""Registry of the GPT families, and the step from a source to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families import codegen, gpt1, gpt2, gpt_neo, gpt_neox, gptj
from gptconvert.families.adapter import merged
from gptconvert.families.family import Family, trim_vocabulary
from gptconvert.model.assembly import assemble, cut
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.edits import edit_config
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
    """The family with this name."""
    return next(family for family in FAMILIES if family.name == name)


def family_of(source: Source) -> Family:
    """The family of the source's files: from ``model_type`` if the configuration has it, else from tensor names.

    Raises:
        UnsupportedError: the model type or the format belongs to none of the families.
        InputError: the files do not identify the family.
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
            "no model_type in the configuration, so the architecture is unknown",
            path=source.config_path or source.path,
            hint=f'the tensor names look like {guesses[0].name}: add "model_type" to config.json'
            if guesses
            else None,
        )
    if guesses:
        return guesses[0]
    if able:
        return able[0]  # resolving its name table lists every tensor that does not fit
    raise UnsupportedError(f"no family reads {source.format} files", path=source.path)


def understand(source: Source, options: Options) -> Checkpoint:
    """The checkpoint of a source, with every tensor accounted for; reads the configuration and headers only.

    Raises:
        InputError: the configuration, the tensors or the adapter are invalid, or they do not match.
        UnsupportedError: a configuration key or the family is not implemented.
        UsageError: an option is required, or contradicts the files.
    """
    source = edit_config(source, options)
    family = family_of(source)
    source = merged(source, family)
    scheme = family.scheme(source.scheme)
    try:
        named = assemble(scheme, source, options)
        config, carried, notes = family.read_config(source.scheme, source.config, source.config_path, named, options)
        tensors = named if source.run is None else cut(scheme, config, source.run)
        resolved = resolve(scheme, config, tensors, path=source.path)
    except InputError as error:
        others = [other.name for other in _fitting(source) if other is not family]
        if others:
            error.hint = f"the configuration is for {family.name}, but the tensor names look like {', '.join(others)}"
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
        dropped={**resolved.dropped, **named.ignored},
        carried=carried,
        notes=(*source.notes, *found.notes, *notes, *_mixed_types(weights)),
        options=options,
    )


def _mixed_types(weights: Mapping[str, LazyTensor]) -> list[str]:
    """A note if the weights have more than one type."""
    types = sorted({weight.dtype.name for weight in weights.values()})
    text = f"the weights have several types, {' and '.join(types)}: each keeps its own (--dtype converts all to one)"
    return [text] if len(types) > 1 else []


def _fitting(source: Source) -> list[Family]:
    """Families with a name table that matches more than half of its layer-0 tensors, best match first."""
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
