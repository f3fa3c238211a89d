"""GPT-NeoX's keys for scaled rotary positions in config.json.

Source: Hugging Face ``modeling_rope_utils.py``. transformers 5 reads ``rope_parameters``, older versions
``rope_scaling``; both are written. GPT-J and CodeGen have one fixed table of angles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from gptconvert.errors import InputError
from gptconvert.model.config_kinds import FLAG, NUMBER, OPTIONAL_WHOLE, Kind, choice
from gptconvert.model.config_table import Key, Values
from reference_model.config import GPTConfig
from reference_model.rotary import SCALINGS, RopeScaling

NEW, OLD = "rope_parameters", "rope_scaling"
KIND = choice(
    {"default": "default", **{kind: kind for kind in SCALINGS}},
    refused={
        "longrope": "its frequencies depend on each sequence's length, which a graph with a cache cannot follow",
        "proportional": "only Gemma was trained with it",
    },
)
#: A number or null.
OPTIONAL_NUMBER = Kind(NUMBER.read, nullable=True)
#: Parameter of scaling → its kind, where that is not a number.
KINDS: Mapping[str, Kind] = {"original_max_position_embeddings": OPTIONAL_WHOLE, "truncate": FLAG}
PARAMETERS = tuple(field.name for field in fields(RopeScaling) if field.name != "kind")


def _parameter(name: str) -> Key:
    def value(config: GPTConfig) -> object:
        return getattr(config.rotary.scaling, name) if config.rotary and config.rotary.scaling else None

    kind = KINDS.get(name, OPTIONAL_NUMBER)
    return Key(f"{NEW}.{name}", name, kind, None, repeats=(f"{OLD}.{name}",), of=value, sparse=True)


def _older_kind(config: GPTConfig) -> str | None:
    return config.rotary.scaling.kind if config.rotary and config.rotary.scaling else None


KEYS = (
    Key(
        f"{NEW}.rope_type",
        "rope_type",
        KIND,
        "default",
        aliases=(f"{NEW}.type",),
        of=lambda config: _older_kind(config) or "default",
    ),
    Key(f"{OLD}.rope_type", "older_rope_type", KIND, None, aliases=(f"{OLD}.type",), of=_older_kind, sparse=True),
    *map(_parameter, PARAMETERS),
)


def scaling(values: Values) -> RopeScaling | None:
    """The scaling of the values read; parameters that its kind does not read are left out.

    Raises:
        InputError: a required parameter is missing.
    """
    kind = _kind(values)
    if kind == "default":
        return None
    read = {name: values[name] for name in SCALINGS[kind]}
    if "original_max_position_embeddings" in read:
        first = read["original_max_position_embeddings"] = read["original_max_position_embeddings"] or values["n_ctx"]
        if kind == "yarn" and read["factor"] is None:
            read["factor"] = values["n_ctx"] / first
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        if name in read and read[name] is None:
            raise InputError("required key is missing", item=f"{NEW}.{name}", expected=f"a number, for {kind}")
    return RopeScaling(kind, **read)


def notes(values: Values, config: GPTConfig) -> list[str]:
    """Notes on parameters without effect, and on what an exported graph cannot do."""
    if config.rotary is None or "rope_type" not in values:
        return []
    kind = _kind(values)
    unread = [name for name in PARAMETERS if values[name] is not None and name not in SCALINGS.get(kind, ())]
    found = [f"{NEW}.{name} = {values[name]!r} has no effect: the rope type is {kind}" for name in unread]
    if kind == "dynamic":
        found.append(
            f"rope type dynamic: exported graphs compute what transformers does within the context of {config.n_ctx} "
            "tokens; past it, only transformers slows the frequencies down"
        )
    if config.rotary.dim == 0:
        found.append("no feature of a head is rotated: the model has no positions, as in transformers")
    return found


def _kind(values: Values) -> str:
    """``rope_scaling`` wins, as in transformers."""
    return str(values["older_rope_type"] or values["rope_type"])
