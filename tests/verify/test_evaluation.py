"""The text that quality is measured on: windows, samples, tokenizers that do not fit; the source model's logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import GptConvertError, InputError, UsageError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.verify.evaluation import Amount, Evaluation
from gptconvert.verify.source_model import SourceModel, sample
from gptconvert.verify.tasks import pooled_tokens
from gptconvert.verify.text import MOST_USED, Encoder, read_text, reference_text
from tests.families import witness
from tests.families.witness import BY_TASK, Case
from tests.verify.exports import tiny

PROSE = Amount(prose_windows=3, prose_tokens=16, sampled_rows=0)
WORDS = [f"w{i}" for i in range(97)]


def encode(text: str) -> Any:
    """The ids of words; others are dropped."""
    return np.array([WORDS.index(word) for word in text.split() if word in WORDS], np.int64)


def text(count: int) -> str:
    return " ".join(WORDS[i % 97] for i in range(count))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def ids(evaluation: Evaluation) -> list[list[int]]:
    return [window.input_ids[0].tolist() for window in evaluation.windows]


def test_windows_are_spread_over_the_text(checkpoint: Checkpoint) -> None:
    found = ids(Evaluation(checkpoint, encode, text(97), "a.txt", amount=PROSE))
    assert [window[0] for window in found] == [0, 40, 81]
    assert all(window == list(range(window[0], window[0] + 16)) for window in found)


def test_a_text_of_one_window(checkpoint: Checkpoint) -> None:
    assert ids(Evaluation(checkpoint, encode, text(16), "a.txt", amount=PROSE)) == [list(range(16))]
    with pytest.raises(InputError, match="shorter than one window") as caught:
        _ = Evaluation(checkpoint, encode, text(15), "a.txt", amount=PROSE).windows
    assert (caught.value.path, caught.value.found) == ("a.txt", "15 tokens")


def test_a_context_shorter_than_the_windows(tmp_path: Path) -> None:
    evaluation = Evaluation(tiny(tmp_path, n_positions=7), encode, text(30), "a.txt")
    assert {len(window) for window in ids(evaluation)} == {7}


def test_without_a_tokenizer_the_model_is_sampled(checkpoint: Checkpoint) -> None:
    evaluation = Evaluation(checkpoint, None)
    assert {len(window) for window in ids(evaluation)} == {32}
    assert evaluation.about == "16 samples of the source model"
    with pytest.raises(UsageError, match=r"a\.txt cannot be tokenized"):
        _ = Evaluation(checkpoint, None, text(97), "a.txt").windows


def unusable(text: str) -> Any:
    raise InputError("cannot be read by the tokenizers library")


@pytest.mark.parametrize(
    ("useless", "message"),
    [
        (lambda text: np.zeros(0, np.int64), "shorter than one window"),
        (lambda text: np.full(60, 97), "does not have"),
        (unusable, "cannot be read"),
    ],
    ids=["no ids", "ids beyond the vocabulary", "unusable"],
)
def test_tokenizers_that_do_not_fit(checkpoint: Checkpoint, useless: Encoder, message: str) -> None:
    """Our own text is left out; a user's text is an error."""
    assert Evaluation(checkpoint, useless).about == "16 samples of the source model"
    with pytest.raises(InputError, match=message):
        _ = Evaluation(checkpoint, useless, "the " * 40, "a.txt").windows


def test_classifiers_without_a_tokenizer_get_random_tokens(directory: Path) -> None:
    case = next(case for case in BY_TASK if case.task == "token-classification")
    evaluation = Evaluation(witness.checkpoint(case, directory), None, amount=PROSE)
    assert evaluation.about == "random tokens"
    assert [len(window) for window in ids(evaluation)] == [16, 16, 16]


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve")
    assert read_text(str(path)) == "naïve"
    path.write_text("x" * (MOST_USED + 1))
    assert len(read_text(str(path))) == MOST_USED
    assert len(reference_text()) > 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the text is empty"),
        (b" \n\t", "the text is empty"),
        (b"caf\xe9 latt\xe9", "not UTF-8"),
        ("text".encode("utf-16"), "not UTF-8"),
        (None, "file is missing"),
    ],
)
def test_bad_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_text(str(path))
    assert caught.value.path == str(path)


def test_large_and_special_files(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InputError, match="too large"):
        read_text(str(tmp_path / "large"))
    with pytest.raises(GptConvertError, match="regular file"):
        read_text(str(tmp_path))


def with_a_nan(checkpoint: Checkpoint) -> Checkpoint:
    from tests.helpers import computed_tensors

    damaged = np.array(checkpoint.weights["ln_f.bias"].read())
    damaged[3] = np.nan
    return dataclasses.replace(checkpoint, weights={**checkpoint.weights, **computed_tensors({"ln_f.bias": damaged})})


def test_a_checkpoint_that_computes_nan(checkpoint: Checkpoint) -> None:
    damaged = with_a_nan(checkpoint)
    with pytest.raises(InputError, match="the checkpoint itself computes NaN"):
        _ = Evaluation(damaged, None).windows
    evaluation = Evaluation(damaged, encode, text(97), "a.txt", amount=PROSE)
    with pytest.raises(InputError, match="the checkpoint itself computes NaN"):
        list(evaluation.source.logits(evaluation.windows[0]))


def test_samples_follow_the_models_distribution(tmp_path: Path) -> None:
    """By the frequencies of 4000 second tokens, in a vocabulary of four."""
    checkpoint = tiny(tmp_path, vocab_size=4, bos_token_id=2, eos_token_id=3)
    drawn = sample(checkpoint, 2, 4000, 2)
    logits = witness.our_outputs(witness.reference(checkpoint), {"input_ids": np.array([[2]])})["logits"][0, 0]
    expected = np.exp(logits) / np.exp(logits).sum()
    assert (drawn[:, 0] == 2).all()
    assert np.abs(np.bincount(drawn[:, 1], minlength=4) / 4000 - expected).max() < 0.04


def test_samples_do_not_depend_on_the_number_of_threads(checkpoint: Checkpoint) -> None:
    import torch

    before = torch.get_num_threads()
    drawn = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        drawn.append(sample(checkpoint, 5, 8, 20))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert np.array_equal(*drawn)
    assert len(np.unique(drawn[0][:, 1:])) > 20


@pytest.mark.parametrize(
    "case", [case for case in BY_TASK if case.task.endswith(("generation", "classification"))], ids=str
)
def test_the_sources_logits_are_those_of_transformers(case: Case, directory: Path) -> None:
    checkpoint = witness.checkpoint(case, directory)
    evaluation = Evaluation(checkpoint, encode, text(90), "a.txt", amount=PROSE)
    source = SourceModel(checkpoint, evaluation.windows)
    for window in evaluation.windows[:2]:
        inputs = {"input_ids": window.input_ids, "attention_mask": window.attention_mask}
        expected = witness.hf_outputs(case, inputs)["logits"].reshape(
            -1, source.config.n_labels if "class" in case.task else 97
        )
        found = np.concatenate([logits.numpy() for _, logits in source.logits(window)])
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_classifier_is_compared_at_the_token_it_pools(directory: Path) -> None:
    case = next(case for case in BY_TASK if case.task == "text-classification")
    checkpoint = witness.checkpoint(case, directory)
    evaluation = Evaluation(checkpoint, encode, text(90), "a.txt", amount=PROSE)
    (found,) = evaluation.source.logits(evaluation.windows[0])
    assert (found[0], tuple(found[1].shape)) == (slice(0, 1), (1, checkpoint.config.n_labels))
    assert pooled_tokens(checkpoint.config, evaluation.windows[0]) == [15]
