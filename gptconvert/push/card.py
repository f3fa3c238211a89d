"""The model card as it is uploaded, with the metadata by which the hub lists and finds the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptconvert.errors import InputError
from gptconvert.targets.package.model_card import library_of

#: Relation to the base model, by which the hub lists a model among the quantised ones.
QUANTISED = "quantized"


@dataclass(frozen=True)
class Card:
    """A model card.

    Attributes:
        content: README.md; unchanged if nothing had to be added.
        metadata: the front matter.
        notes: what the user should know, one sentence each.
    """

    content: bytes
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]


def completed(content: bytes, manifest: Mapping[str, Any], stated: Mapping[str, str]) -> Card:
    """Add what the front matter lacks, and replace what the user states.

    Args:
        content: README.md of the output.
        manifest: names the targets, the task, the source and what was quantised.
        stated: ``license`` and ``base_model``, as far as the user states them.

    Raises:
        InputError: the front matter cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(content.decode("utf-8-sig"))
        before: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    except Exception as error:  # YAML of any kind, passed as arguments to a class
        hint = "correct the lines between the two --- at its top"
        what = f"the model card's front matter cannot be read ({str(error).splitlines()[0][:160]})"
        raise InputError(what, path="README.md", hint=hint) from error
    for key, value in _additions(before, manifest, stated).items():
        card.data[key] = value
    text = str(card).encode()  # which also puts the keys back in the order of the file
    metadata: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return Card(content if metadata == before else text, metadata, tuple(_notes(metadata, manifest)))


def _additions(found: Mapping[str, Any], manifest: Mapping[str, Any], stated: Mapping[str, str]) -> dict[str, Any]:
    """The keys to set; those that the card has are kept, unless the user states another value."""
    origin = stated.get("base_model") or found.get("base_model") or manifest["source"].get("repo")
    defaults = {
        "library_name": library_of(manifest["targets"]),
        "pipeline_tag": manifest["config"].get("task"),
        "base_model": origin,
        # The relation is that to the base model, and means nothing without one.
        "base_model_relation": QUANTISED if origin and _is_lossy(manifest) else None,
    }
    return {key: value for key, value in defaults.items() if value is not None and key not in found} | {**stated}


def _is_lossy(manifest: Mapping[str, Any]) -> bool:
    """Whether a variant was measured, as all lossy ones are."""
    return any(each.get("quality") for each in manifest["verification"]["artifacts"])


def _notes(metadata: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    notes = []
    if "license" not in metadata:
        notes.append("the model card names no licence; --license adds one")
    if "base_model" not in metadata and _is_lossy(manifest):
        what = "the model card names no base model, so the hub will not list this among its quantised models"
        notes.append(f"{what}; --base-model adds one")
    return notes
