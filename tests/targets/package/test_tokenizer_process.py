"""Texts to measure or calibrate on are tokenized in a confined process."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gptconvert.errors import GptConvertError, InputError, UnsafeInputError
from gptconvert.model.export import PlannedFile
from gptconvert.model.options import Options
from gptconvert.quality import evaluation_of
from gptconvert.targets.package.tokenizer_process import text_encoder
from tests.generation.test_hostile_directories import charsmap
from tests.helpers import checkpoint_of, tiny_gpt2

WORDS = [f"w{i}" for i in range(97)]
TEXT = " ".join(WORDS)


def tokenizer(**settings: object) -> bytes:
    """tokenizer.json of a vocabulary of words; others are dropped."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("w3 $A", special_tokens=[("w3", 3)])
    return json.dumps({**json.loads(made.to_str()), **settings}).encode()


def ids_of(data: bytes, text: str) -> list[int]:
    encode = text_encoder({"tokenizer.json": data})
    assert encode is not None
    return encode(text).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 200},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 1,
                "pad_type_id": 0,
                "pad_token": "w1",
            }
        },
    ],
    ids=["special tokens", "truncation", "padding"],
)
def test_the_whole_text_and_nothing_else(settings: dict[str, Any]) -> None:
    assert ids_of(tokenizer(**settings), TEXT) == list(range(97))


def test_without_a_tokenizer() -> None:
    assert text_encoder({"vocab.json": b"{}"}) is None


@pytest.mark.parametrize(
    ("damaged", "error"),
    [
        (b"{}", InputError),
        (b"\xff", InputError),
        (tokenizer(normalizer=charsmap(2**32 - 1)), UnsafeInputError),  # aborts the process that loads it
    ],
    ids=["not a tokenizer", "not UTF-8", "hostile"],
)
def test_tokenizers_that_cannot_be_used(damaged: bytes, error: type[GptConvertError]) -> None:
    with pytest.raises(error) as caught:
        ids_of(damaged, TEXT)
    assert caught.value.path == "tokenizer.json"


def test_no_tokenizer_is_loaded_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    class Refused:
        @staticmethod
        def from_str(_: str) -> None:
            pytest.fail("loaded in this process")

    monkeypatch.setattr(tokenizers, "Tokenizer", Refused)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    package = [PlannedFile.of_bytes("tokenizer.json", tokenizer())]
    evaluation = evaluation_of(checkpoint_of(*tiny_gpt2(0)), Options(eval_text=str(text)), package)
    assert evaluation.windows[0].input_ids[0].tolist() == list(range(len(evaluation.windows[0].input_ids[0])))
    assert "text.txt" in evaluation.about
