"""Registry of the GPT families, and the step from a source to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptconvert.containers.json import read_json_object
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families import codegen, gpt1, gpt2, gpt_neo, gpt_neox, gptj
from gptconvert.families.adapter import merged
from gptconvert.families.family import Family, trim_vocabulary
from gptconvert.model.assembly import assemble, cut
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.edits import edit_config
from gptconvert.model.generation import GENERATION_CONFIG, SpecialIds, ids_outside, moved_settings, special_ids
from gptconvert.model.mismatch import MismatchError
from gptconvert.model.options import Options
from gptconvert.model.quantised import refuse_quantised
from gptconvert.model.resolution import choose_scope, find_prefix, resolve
from gptconvert.model.source import Source
from gptconvert.model.strangers import refusal
from gptconvert.model.tensors import LazyTensor
from reference_model.config import GPTConfig

FAMILIES: tuple[Family, ...] = (
    gpt1.FAMILY,
    gpt2.FAMILY,
    gpt_neo.FAMILY,
    gptj.FAMILY,
    gpt_neox.FAMILY,
    codegen.FAMILY,
)

#: Limit on generation_config.json.
MAX_JSON_BYTES = 16 << 20
#: Special ids outside the vocabulary with a note of their own.
MAX_NOTED = 8

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
    if source.scheme == "hf" and not guesses and (refused := refusal(source.tensors, source.path)) is not None:
        raise refused
    if source.scheme == "hf" and "block_size" in (nested := _model_settings(source.config)):
        raise _mingpt(source, nested)
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


def _model_settings(config: Mapping[str, object]) -> Mapping[str, object]:
    """The settings of the model in minGPT's config.json, which also has those of the data and the training."""
    model = config.get("model")
    return model if isinstance(model, Mapping) else {}


def _mingpt(source: Source, model: Mapping[str, object]) -> InputError:
    """The error for minGPT's output directory: nanoGPT's reader fits its tensors, but needs the sizes beside them."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    known = {name: model[name] if isinstance(model.get(name), int) else name.upper() for name in names}
    sizes = ", ".join(f"'{name}': {value}" for name, value in known.items())
    return InputError(
        "this is the config.json of minGPT, not of transformers",
        path=source.config_path or source.path,
        hint="save the weights as nanoGPT does: torch.save({'model': torch.load('model.pt'), 'model_args': "
        f"{{{sizes}}}}}, 'ckpt.pt'), and run `gptconvert nanogpt ckpt.pt --activation tanh`",
    )


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
        refuse_quantised(named, source.path)
        others = choose_scope(scheme, named, options.scope, source.path)
        named = replace(named, tensors={name: named[name] for name in named if name not in others})
        config, carried, notes = family.read_config(source.scheme, source.config, source.config_path, named, options)
        tensors = named if source.run is None else cut(scheme, config, source.run)
        resolved = resolve(scheme, config, tensors, path=source.path)
        generation, special = _generation(source, config, carried)
    except InputError as error:
        refused = refusal(source.tensors, source.path)
        if refused is not None:
            raise refused from error
        _explain(error, source, family)
        raise
    found = replace(named, tensors=resolved.tensors, notes=(*named.notes, *resolved.notes))
    weights = resolved.weights
    if options.trim_vocab is not None:
        kept = [i for i in (special.bos, *special.eos, special.pad, config.pad_token_id) if i is not None]
        config, weights, trimmed = trim_vocabulary(config, weights, options.trim_vocab, kept)
        notes = [*notes, *trimmed]
    notes = [*notes, *_outside(config, carried, generation)]
    return Checkpoint(
        config=config,
        weights=weights,
        source=replace(source, tensors=found, unnamed=(), run=None),
        prefix=resolved.prefix,
        dropped={
            **resolved.dropped,
            **named.ignored,
            **{name: f"of the model {scope!r}" for name, scope in others.items()},
        },
        carried=carried,
        generation=generation,
        special_ids=special,
        notes=(*source.notes, *found.notes, *notes, *_other_models(others), *_mixed_types(weights)),
        options=options,
    )


def _explain(error: InputError, source: Source, family: Family) -> None:
    """Give the error the hint that fits the source: another family's names, or the likely cause of a mismatch."""
    better = _better_fit(source, family)
    if isinstance(error, MismatchError) and source.config:
        error.explain(source.config)
    if better is not None:
        error.hint = f"the configuration is for {family.name}, but the tensor names look like {better.name}"


def _generation(
    source: Source, config: GPTConfig, carried: Mapping[str, object]
) -> tuple[dict[str, object], SpecialIds]:
    """The content of generation_config.json, and the special ids.

    Raises:
        InputError: the source's generation_config.json is malformed.
    """
    path = source.tokenizer.get(GENERATION_CONFIG)  # sources list it among their tokenizer files
    stated = {**carried, "pad_token_id": config.pad_token_id}
    if path is None:
        special = special_ids((stated, source.config_path))
        return {**moved_settings(carried), **special.as_json()}, special
    own = read_json_object(path, MAX_JSON_BYTES, GENERATION_CONFIG)
    return own, special_ids((own, path), (stated, source.config_path))


def _outside(config: GPTConfig, *files: Mapping[str, object]) -> list[str]:
    """A note on each special id outside the vocabulary; if there are many, on the first ones."""
    size, pad = config.vocab_size, {"pad_token_id": config.pad_token_id}
    found = list(ids_outside(size, *files, pad))
    notes = [
        f"{key} {token} is outside the vocabulary (ids 0 to {size - 1}): the model can neither read nor generate it"
        for key, token in found[:MAX_NOTED]
    ]
    more = f"{len(found) - MAX_NOTED} more special ids are outside the vocabulary"
    return [*notes, more] if len(found) > MAX_NOTED else notes


def _other_models(others: Mapping[str, str]) -> list[str]:
    """A note on the models that were not chosen."""
    names = ", ".join(sorted({*others.values()}))
    return [f"other models in the file are left out: {names} (choose with --scope)"] if others else []


def _mixed_types(weights: Mapping[str, LazyTensor]) -> list[str]:
    """A note if the weights have more than one type."""
    types = sorted({weight.dtype.name for weight in weights.values()})
    text = f"the weights have several types, {' and '.join(types)}: each keeps its own (--dtype converts all to one)"
    return [text] if len(types) > 1 else []


def _better_fit(source: Source, family: Family) -> Family | None:
    """The family whose names match the source's tensors best, if they match it better than ``family``'s do."""
    scores = _scores(source)
    own = max((score for score, other in scores if other is family), default=0.0)
    return next((other for score, other in scores if score > own), None)


def _fitting(source: Source) -> list[Family]:
    """Families with a name table that matches more than half of its layer-0 tensors, best match first."""
    return [family for _, family in _scores(source)]


def _scores(source: Source) -> list[tuple[float, Family]]:
    """The share of each family's layer-0 tensors that the source has, if more than half, highest first."""
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
    return sorted(scored, key=lambda pair: -pair[0])
