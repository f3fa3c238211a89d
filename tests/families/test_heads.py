"""Heads: the choice of the task, and the tensors kept and dropped for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families.registry import FAMILIES, family_named
from gptconvert.model.options import Options
from reference_model.config import LABELLED_TASKS, TASKS
from tests.families import witness
from tests.families.witness import BY_TASK, LABELS, PAD, Case
from tests.helpers import Arrays, checkpoint_of

BODY = "feature-extraction"
HEADED = tuple(case for case in BY_TASK if case.task != BODY)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def saved(case: Case, directory: Path) -> tuple[dict[str, Any], Arrays]:
    raw, arrays = witness.saved(case, directory)
    return dict(raw), dict(arrays)


@pytest.mark.parametrize("case", HEADED, ids=str)
def test_the_task_comes_from_architectures(case: Case, directory: Path) -> None:
    raw, arrays = saved(case, directory)
    assert checkpoint_of(raw, arrays).config.task == case.task
    raw["architectures"] = [f"TF{raw['architectures'][0]}"]
    assert checkpoint_of(raw, arrays).config.task == case.task


@pytest.mark.parametrize("case", HEADED, ids=str)
def test_without_architectures_the_task_comes_from_the_tensors(case: Case, directory: Path) -> None:
    raw, arrays = saved(case, directory)
    for unknown in (None, [], ["CustomModel"], "GPT2Model", [7]):
        raw["architectures"] = unknown
        assert checkpoint_of(raw, arrays).config.task == case.task


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_body_with_a_tied_head_is_a_language_model(family: Any, directory: Path) -> None:
    """Unless ``architectures`` names the bare model."""
    raw, arrays = saved(Case(family.name, BODY), directory)
    tied = family.name in ("gpt1", "gpt2", "gpt_neo")
    del raw["architectures"]
    assert checkpoint_of(raw, arrays).config.task == ("text-generation" if tied else BODY)
    assert not checkpoint_of(raw, arrays).notes


@pytest.mark.parametrize("prefix", ["", "TF", "Flax"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_bare_architecture_is_exported_bare(family: Any, prefix: str, directory: Path) -> None:
    raw, arrays = saved(Case(family.name, BODY), directory)
    raw["architectures"] = [f"{prefix}{family.heads[BODY]}"]
    for tied in (False, True):
        checkpoint = checkpoint_of({**raw, "tie_word_embeddings": tied}, arrays)
        assert checkpoint.config.task == BODY
        assert not checkpoint.notes
    if family.name in ("gpt1", "gpt2", "gpt_neo"):
        checkpoint = checkpoint_of(raw, arrays, request=Options(task="text-generation"))
        assert checkpoint.config.task == "text-generation"
        (note,) = checkpoint.notes
        assert family.heads[BODY] in note and family.heads["text-generation"] in note


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_leaving_out_the_head_of_a_language_model_is_noted(family: Any, directory: Path) -> None:
    raw, arrays = saved(Case(family.name), directory)
    (note,) = checkpoint_of(raw, arrays, request=Options(task=BODY)).notes
    assert family.heads["text-generation"] in note
    raw["architectures"] = [family.heads[BODY]]
    checkpoint = checkpoint_of(raw, arrays)
    assert checkpoint.config.task == BODY
    stored = family.name in ("gptj", "gpt_neox", "codegen")
    assert [("--task text-generation" in note) for note in checkpoint.notes] == [True] * stored
    assert not checkpoint_of(raw, arrays, request=Options(task=BODY)).notes


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_a_tied_body_without_the_heads_bias_is_bare(family: str, directory: Path) -> None:
    """The head has a bias, so a language model is not stored as its body alone."""
    raw, arrays = saved(Case(family, BODY), directory)
    raw |= {"tie_word_embeddings": True, "architectures": None}
    assert checkpoint_of(raw, arrays).config.task == BODY
    with pytest.raises(UnsupportedError, match="no head for text-generation"):
        checkpoint_of(raw, arrays, request=Options(task="text-generation"))
    arrays["lm_head.bias"] = np.zeros(raw["vocab_size"], np.float32)
    assert checkpoint_of(raw, arrays).config.task == "text-generation"


@pytest.mark.parametrize("case", HEADED, ids=str)
def test_the_body_can_be_exported_alone(case: Case, directory: Path) -> None:
    """The head is then dropped by name."""
    raw, arrays = saved(case, directory)
    checkpoint = checkpoint_of(raw, arrays, request=Options(task=BODY))
    body = {n: w.read().tobytes() for n, w in checkpoint.weights.items()}
    heads = {name for name in arrays if "embed" not in name and (name.count(".") < 2 or "multiple" in name)}
    heads |= {name for name in arrays if name.startswith("embed_out")}
    kept = {"lm_head.weight"} if (case.family, case.task) == ("gpt1", "multiple-choice") else set()  # the embedding
    if case.task != "text-generation" or case.family in ("gptj", "gpt_neox"):
        assert set(checkpoint.dropped) == heads - kept
        assert all("head" in why for why in checkpoint.dropped.values())
    assert not {"score.weight", "classifier.weight", "lm_head.weight"} & set(body)


@pytest.mark.parametrize("case", HEADED, ids=str)
def test_a_language_model_requires_its_head(case: Case, directory: Path) -> None:
    raw, arrays = saved(case, directory)
    request = Options(task="text-generation")
    if case.family in ("gptj", "gpt_neox") and case.task != "text-generation":
        with pytest.raises(UnsupportedError, match="no head for text-generation") as error:
            checkpoint_of(raw, arrays, request=request)
        assert "lm_head.weight" in (error.value.expected or "")
        return
    assert checkpoint_of(raw, arrays, request=request).config.task == "text-generation"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_missing_head_is_rejected(family: Any, task: str, directory: Path) -> None:
    """The error has exit code 4 and lists the available heads."""
    raw, arrays = saved(Case(family.name), directory)
    request = Options(task=task)
    if task in ("text-generation", BODY):
        assert checkpoint_of(raw, arrays, request=request).config.task == task
        return
    with pytest.raises(UnsupportedError) as error:
        checkpoint_of(raw, arrays, request=request)
    assert error.value.exit_code == 4
    assert error.value.found == "heads for text-generation, feature-extraction"
    assert task in error.value.message
    assert error.value.message.startswith("this checkpoint" if task in family.heads else "this family")


def test_an_incomplete_head_is_named(directory: Path) -> None:
    """config.json names a classifier, so a missing classifier tensor means a damaged checkpoint, not another task."""
    raw, arrays = saved(Case("gpt2", "token-classification"), directory)
    for name in ("classifier.weight", "classifier.bias"):
        for architecture in ("GPT2ForTokenClassification", "TFGPT2ForTokenClassification"):
            raw["architectures"] = [architecture]
            with pytest.raises(InputError, match=f"missing     {name}"):
                checkpoint_of(raw, {n: a for n, a in arrays.items() if n != name})


@pytest.mark.parametrize("case", [c for c in BY_TASK if c.task in LABELLED_TASKS], ids=str)
def test_the_number_of_labels(case: Case, directory: Path) -> None:
    """It comes from the configuration; by default, it is the number of rows of the head."""
    raw, arrays = saved(case, directory)
    named = raw.pop("id2label")
    raw.pop("label2id")
    assert len(named) == LABELS
    for extra in ({}, {"id2label": named}, {"num_labels": LABELS}, {"_num_labels": LABELS}, {"id2label": {}}):
        checkpoint = checkpoint_of({**raw, **extra}, arrays)
        assert checkpoint.config.n_labels == LABELS
        written = family_named(case.family).write_config(checkpoint.config, checkpoint.carried)
        assert len(written.get("id2label") or {}) == LABELS or "id2label" in extra or "num_labels" in extra
    for extra in ({"num_labels": 3}, {"id2label": {"0": "a"}}):
        with pytest.raises(InputError, match="wrong shape"):
            checkpoint_of({**raw, **extra}, arrays)
    for extra in ({"num_labels": 0}, {"num_labels": "5"}, {"num_labels": True}):
        with pytest.raises(InputError) as error:
            checkpoint_of({**raw, **extra}, arrays)
        assert error.value.item == "num_labels"


def test_two_labels_need_no_names(directory: Path) -> None:
    """Two is transformers' default, for which it writes no names."""
    raw, arrays = saved(Case("gpt2", "text-classification"), directory)
    del raw["id2label"], raw["label2id"]
    arrays["score.weight"] = arrays["score.weight"][:2]
    checkpoint = checkpoint_of(raw, arrays)
    assert checkpoint.config.n_labels == 2
    assert "id2label" not in family_named("gpt2").write_config(checkpoint.config, checkpoint.carried)


def test_the_padding_token(directory: Path) -> None:
    raw, arrays = saved(Case("gpt_neox", "text-classification"), directory)
    assert checkpoint_of(raw, arrays).config.pad_token_id == PAD
    assert not checkpoint_of(raw, arrays).notes
    assert checkpoint_of(raw, arrays, request=Options(pad_token_id=3)).config.pad_token_id == 3
    raw["pad_token_id"] = None
    unpadded = checkpoint_of(raw, arrays)
    assert unpadded.config.pad_token_id is None
    assert any("--pad-token-id" in note for note in unpadded.notes)
    assert not checkpoint_of(raw, arrays, request=Options(pad_token_id=0)).notes


@pytest.mark.parametrize("family", ["gpt1", "gpt2"])
def test_unusual_double_heads_are_rejected(family: str, directory: Path) -> None:
    raw, arrays = saved(Case(family, "multiple-choice"), directory)
    unusual = {"summary_type": "mean", "summary_use_proj": False, "summary_activation": "tanh"}
    for key, value in {**unusual, "summary_proj_to_labels": False}.items():
        with pytest.raises(UnsupportedError, match=key):
            checkpoint_of({**raw, key: value}, arrays)
        as_language_model = Options(task="text-generation")
        assert checkpoint_of({**raw, key: value}, arrays, request=as_language_model).carried[key] == value
    checkpoint_of({**raw, "summary_first_dropout": 0.5}, arrays)


def test_several_heads_in_one_file(directory: Path) -> None:
    """All but the requested head are dropped, each with a reason."""
    raw, arrays = saved(Case("gpt2", "text-classification"), directory)
    width = arrays["score.weight"].shape[1]
    arrays |= {
        "classifier.weight": np.ones((LABELS, width), np.float32),
        "classifier.bias": np.ones(LABELS, np.float32),
        "multiple_choice_head.summary.weight": np.ones((1, width), np.float32),
        "multiple_choice_head.summary.bias": np.ones(1, np.float32),
        "qa_outputs.weight": np.ones((2, width), np.float32),
        "qa_outputs.bias": np.ones(2, np.float32),
        "lm_head.weight": arrays["transformer.wte.weight"],
    }
    heads = {name for name in arrays if not name.startswith("transformer.")}
    for task in family_named("gpt2").heads:
        checkpoint = checkpoint_of(raw, arrays, request=Options(task=task))
        prefixes = {
            "text-classification": ("score",),
            "token-classification": ("classifier",),
            "question-answering": ("qa_",),
            "multiple-choice": ("multiple", "lm_head"),
            "text-generation": ("lm_head",),
            BODY: ("-",),
        }[task]
        assert set(checkpoint.dropped) == {name for name in heads if not name.startswith(prefixes)}
    assert checkpoint_of({**raw, "architectures": None}, arrays).config.task == "multiple-choice"


def test_config_json_names_the_architecture_of_the_task(directory: Path) -> None:
    for case in BY_TASK:
        raw, arrays = saved(case, directory)
        checkpoint = checkpoint_of(raw, arrays, request=Options(task=case.task))
        family = family_named(case.family)
        assert family.write_config(checkpoint.config, {})["architectures"] == raw["architectures"]
        other = dataclasses.replace(checkpoint.config, task=BODY)
        assert family.write_config(other, {})["architectures"] == [family.heads[BODY]]
