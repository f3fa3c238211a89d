"""Which key of config.json wins where several have one meaning, as transformers 4 and 5 decide it.

Each rule takes config.json and the tensors, and returns the keys to read and notes for the user. A rule is needed
where transformers neither requires the keys to agree nor reads only one of them.

Sources: Hugging Face's configuration classes of versions 4.57 and 5 (``attribute_map``, ``GPTNeoConfig``,
``GPTNeoXConfig.convert_rope_params_to_dict``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gptconvert.errors import short_repr
from gptconvert.families.pattern import expanded
from gptconvert.model.tensors import LazyTensor
from reference_model.config import GPTConfig

Raw = Mapping[str, object]
#: (config.json, tensors by name in the file) → (the keys to read, notes).
Rule = Callable[[Raw, Mapping[str, LazyTensor]], tuple[dict[str, object], list[str]]]
#: (configuration, value in the file) → whether the value agrees with the configuration.
Agrees = Callable[[GPTConfig, object], bool]

#: GPT-2's keys → common names of the same attributes. transformers sets these last, so they win.
COMMON_NAMES: Mapping[str, str] = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
#: The same for GPT-Neo.
NEO_NAMES: Mapping[str, str] = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
#: Keys of ``rope_parameters`` that the default rotary embedding reads.
DEFAULT_ROPE = ("rope_theta", "partial_rotary_factor", "rope_type")
DEFAULT_BASE, DEFAULT_SHARE = 10000.0, 0.25


def in_turn(*rules: Rule) -> Rule:
    """The rules, one after another."""

    def rule(raw: Raw, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, object], list[str]]:
        read, notes = dict(raw), list[str]()
        for each in rules:
            read, more = each(read, tensors)
            notes += more
        return read, notes

    return rule


def common_names_win(names: Mapping[str, str]) -> Rule:
    """Drop a key whose common name is present too."""

    def rule(raw: Raw, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, object], list[str]]:
        both = [(own, common) for own, common in names.items() if own in raw and common in raw]
        notes = [
            _ignored(raw, own, f"{common} = {short_repr(raw[common])} is used, as in transformers")
            for own, common in both
            if raw[own] != raw[common]
        ]
        replaced = {own for own, _ in both}
        return {key: value for key, value in raw.items() if key not in replaced}, notes

    return rule


def positions_from_the_table(raw: Raw, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, object], list[str]]:
    """GPT-2: ``n_positions`` wins over ``n_ctx``, unless the position table has ``n_ctx`` rows."""
    name = "max_position_embeddings" if "max_position_embeddings" in raw else "n_positions"
    if name not in raw or "n_ctx" not in raw or raw["n_ctx"] == raw[name]:
        return dict(raw), []
    rows = next((t.shape[0] for n, t in tensors.items() if n.endswith("wpe.weight") and t.shape), None)
    wrong, right = (name, "n_ctx") if rows == raw["n_ctx"] else ("n_ctx", name)
    size = ", the size of the position table" if rows == raw[right] else ""
    reason = f"{right} = {short_repr(raw[right])} is used{size}"
    return {key: value for key, value in raw.items() if key != wrong}, [_ignored(raw, wrong, reason)]


def listed_layers_win(raw: Raw, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, object], list[str]]:
    """GPT-Neo: ``attention_layers`` wins over ``attention_types``; entries beyond the layers are not read."""
    layers = raw.get("num_hidden_layers", raw.get("num_layers", 24))
    listed = raw.get("attention_layers")
    if not isinstance(layers, int) or not isinstance(listed, list) or len(listed) < layers:
        return dict(raw), []
    if not all(kind in ("global", "local") for kind in listed):
        return dict(raw), []
    read, kept = dict(raw), listed[: max(layers, 0)]
    types = read.pop("attention_types", None)
    notes = []
    if types is not None and expanded(types, layers) != kept:
        notes.append("attention_types and attention_layers disagree: attention_layers is used, as in transformers")
    return {**read, "attention_layers": kept}, notes


def neox_rope(raw: Raw, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, object], list[str]]:
    """GPT-NeoX: one ``rope_parameters`` from the keys of all versions.

    ``rope_scaling`` replaces ``rope_parameters``; what the object lacks comes from ``rotary_emb_base`` and
    ``rotary_pct``. Top-level ``rope_theta`` and ``partial_rotary_factor`` are not read (:data:`NEOX_UNREAD`).
    transformers 4 reads ``rotary_emb_base``, ``rotary_pct`` and ``rope_scaling`` only.
    """
    read = dict(raw)
    scaling, parameters = read.pop("rope_scaling", None), read.pop("rope_parameters", None)
    base, share = read.pop("rotary_emb_base", DEFAULT_BASE), read.pop("rotary_pct", DEFAULT_SHARE)

    def whole(rope: Raw) -> dict[str, object]:
        """The object with what it lacks, and its kind under its newer name."""
        named = {key: value for key, value in rope.items() if key != "type"}
        kind = rope.get("rope_type", rope.get("type", "default"))
        return {"rope_theta": base, "partial_rotary_factor": share, **named, "rope_type": kind}

    name = "rope_scaling" if scaling else "rope_parameters"
    chosen = scaling or parameters or {}
    if not isinstance(chosen, Mapping):
        return {**read, name: chosen}, []  # the table rejects it
    notes = []
    if scaling and isinstance(parameters, Mapping) and parameters and whole(chosen) != whole(parameters):
        notes.append("rope_parameters is ignored beside rope_scaling, as in transformers")
    for old, new, value in (("rotary_emb_base", "rope_theta", base), ("rotary_pct", "partial_rotary_factor", share)):
        if old in raw and chosen.get(new, value) != value:
            instead = (
                f"{name}.{new} = {short_repr(chosen[new])} is used, as in transformers 5 (transformers 4 reads {old})"
            )
            notes.append(_ignored(raw, old, instead))
    found = whole(chosen)
    if found["rope_type"] == "default":
        extra = sorted(key for key, value in found.items() if key not in DEFAULT_ROPE and value is not None)
        found = {key: found[key] for key in DEFAULT_ROPE}
        notes += [
            f"{name}.{key} = {short_repr(chosen[key])} has no effect: the rope type is default" for key in extra
        ]
    return {**read, "rope_parameters": found}, notes


def without_default_scaling(raw: Raw, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, object], list[str]]:
    """Families that do not read ``rope_scaling``: drop it if it changes nothing."""
    return {key: value for key, value in raw.items() if key != "rope_scaling" or not _is_default(value)}, []


def _is_default(scaling: object) -> bool:
    return isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type", "default")) == "default"


def _ignored(raw: Raw, key: str, instead: str) -> str:
    return f"{key} = {short_repr(raw[key])} is ignored: {instead}"


# Comparisons of keys that transformers does not read:


def _same_size(config: GPTConfig, value: object) -> bool:
    return value == config.n_ctx


def _same_base(config: GPTConfig, value: object) -> bool:
    return config.rotary is not None and value == config.rotary.base


def _same_share(config: GPTConfig, value: object) -> bool:
    if config.rotary is None or not isinstance(value, int | float):
        return False
    return int(config.head_dim * value) == config.rotary.dim


#: Key → whether its value agrees with the configuration; if not, a note says that it is not read.
GPTJ_UNREAD: Mapping[str, Agrees] = {
    "n_ctx": _same_size,
    "rope_theta": _same_base,
    "rotary_emb_base": _same_base,
    "rotary_pct": _same_share,
    "partial_rotary_factor": _same_share,
}
NEO_UNREAD: Mapping[str, Agrees] = {"n_ctx": _same_size, "n_positions": _same_size}
NEOX_UNREAD: Mapping[str, Agrees] = {
    **NEO_UNREAD,
    "rope_theta": _same_base,
    "partial_rotary_factor": _same_share,
}
