"""The metadata that a model card gets, and what is left as it is."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from gptconvert.push.card import Card, completed

TEXT = b'---\nlicense: "mit"\ntags:\n- "gpt2"\n---\n\n# Title\n\ntext \xc3\xa9\n'


def manifest(lossy: bool = False, repo: str | None = None, targets: tuple[str, ...] = ("onnx",)) -> dict[str, Any]:
    quality = {"quality": {"max_kl": 0.2, "ok": True}} if lossy else {}
    return {
        "targets": list(targets),
        "config": {"task": "text-generation"},
        "source": {"repo": repo},
        "verification": {"artifacts": [{"kind": "onnx", "ok": True}, {"kind": "onnx", "ok": True, **quality}]},
    }


def added(card: Card, before: bytes = TEXT) -> dict[str, Any]:
    """The metadata in the content, without what was there before."""
    found, old = (ModelCard(each.decode()).data.to_dict() for each in (card.content, before))
    assert found == card.metadata
    assert old.items() <= found.items()
    return {key: value for key, value in found.items() if key not in old}


def test_what_a_card_lacks() -> None:
    card = completed(TEXT, manifest(lossy=True, repo="org/source"), {})
    assert added(card) == {
        "library_name": "onnx",
        "pipeline_tag": "text-generation",
        "base_model": "org/source",
        "base_model_relation": "quantized",
    }
    assert card.content.endswith("---\n\n# Title\n\ntext é\n".encode())
    assert card.notes == ()


def test_only_lossy_variants_are_quantised() -> None:
    assert "base_model_relation" not in added(completed(TEXT, manifest(repo="org/source"), {}))
    without = completed(TEXT, manifest(lossy=True), {})
    assert added(without).keys() == {"library_name", "pipeline_tag"}
    assert "--base-model adds one" in without.notes[0]
    stated = completed(TEXT, manifest(lossy=True), {"base_model": "org/other"})
    assert (stated.metadata["base_model"], stated.metadata["base_model_relation"]) == ("org/other", "quantized")


def test_what_the_user_states_comes_first() -> None:
    card = completed(TEXT, manifest(repo="org/source"), {"license": "apache-2.0", "base_model": "org/other"})
    assert (card.metadata["license"], card.metadata["base_model"]) == ("apache-2.0", "org/other")
    assert list(card.metadata)[:2] == ["license", "tags"]


def test_what_the_card_states_is_kept() -> None:
    text = (
        b"---\nlicense: mit\nlibrary_name: mine\npipeline_tag: text-generation\nbase_model:\n- a/b\n- c/d\n"
        b"base_model_relation: merge\nmore: {x: [1, no]}\n---\n# T\n"
    )
    card = completed(text, manifest(lossy=True, repo="org/source"), {})
    assert card.content == text
    assert card.metadata["base_model"] == ["a/b", "c/d"]
    assert completed(text, manifest(), {"license": "mit"}).content == text


@pytest.mark.parametrize(
    ("targets", "library"),
    [(("onnx", "safetensors"), "transformers"), (("gguf",), "gguf"), (("gguf", "onnx"), "onnx"), (("tf",), None)],
)
def test_library(targets: tuple[str, ...], library: str | None) -> None:
    assert completed(TEXT, manifest(targets=targets), {}).metadata.get("library_name") == library


@pytest.mark.parametrize("text", [b"", b"# Title\n", b"\xef\xbb\xbf---\nlanguage: no\n---\r\ntext\r\n"])
def test_cards_of_other_forms(text: bytes) -> None:
    card = completed(text, manifest(), {"license": "mit"})
    assert card.metadata["license"] == "mit"
    assert card.content.endswith(text.rpartition(b"---\r\n")[2])
    assert ModelCard(card.content.decode()).data.to_dict() == card.metadata


def test_a_missing_licence_is_noted() -> None:
    assert completed(b"", manifest(), {}).notes == ("the model card names no licence; --license adds one",)
