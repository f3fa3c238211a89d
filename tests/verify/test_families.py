"""Every family with every head: correct exports pass; a wrong body or head fails."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.model.tensors import LazyTensor
from gptconvert.targets.onnx.verify import OnnxVerifier
from reference_model.config import CACHED_TASKS
from tests.families import witness
from tests.families.bugs import BUGS, Bug
from tests.families.witness import BY_TASK, CASES, Case
from tests.helpers import computed_tensors
from tests.targets.onnx.test_plan import run, session
from tests.verify.exports import altered, edit, export, insert_after, node, report_on


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["small", "large"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_correct_exports_pass(case: Case, small: bool, directory: Path, tmp_path: Path) -> None:
    """A large model takes only weights stored in several pieces (separate q, k and v) from the exported file."""
    verifiers = {"onnx": OnnxVerifier(small_model=1 << 30 if small else 0)}
    checkpoint = witness.checkpoint(case, directory)
    for kv_cache in (True, False) if case.task in CACHED_TASKS else (False,):
        path = export(tmp_path / str(kv_cache), checkpoint, kv_cache=kv_cache)
        report = report_on(checkpoint, path, verifiers=verifiers)
        assert report.passed, report.table()


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_wrong_eps_is_detected_through_every_head(case: Case, directory: Path, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(case, directory)
    wrong = altered(checkpoint, norm_eps=2 * checkpoint.config.norm_eps)
    report = report_on(checkpoint, export(tmp_path, wrong))
    assert not report.passed
    assert "begins in block 0" in report.table()


def rolled(tensor: LazyTensor) -> LazyTensor:
    return computed_tensors({"x": np.roll(tensor.read(), 1, 0)})["x"]


HEADS = {
    "text-classification": "score.weight",
    "token-classification": "classifier.bias",
    "question-answering": "qa_outputs.weight",
    "multiple-choice": "mc_head.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in BY_TASK if c.task in HEADS], ids=str)
def test_a_wrong_head(case: Case, directory: Path, tmp_path: Path) -> None:
    """Wrong weights fail rule 1; in another exporter's file they fail rule 2."""
    checkpoint = witness.checkpoint(case, directory)
    name = HEADS[case.task]
    spoiled = rolled(checkpoint.weights[name]) if checkpoint.weights[name].shape[0] > 1 else flipped(checkpoint, name)
    wrong = dataclasses.replace(checkpoint, weights={**checkpoint.weights, name: spoiled})
    path = export(tmp_path, wrong)
    assert f"{name}: differs" in report_on(checkpoint, path).table()
    edit(path, disown)
    report = report_on(checkpoint, path)
    assert not report.passed
    assert "the head" in report.table()


def flipped(checkpoint: Checkpoint, name: str) -> LazyTensor:
    return computed_tensors({"x": -checkpoint.weights[name].read()})["x"]


def disown(model: Any) -> None:
    """Rule 1 is strict only for our own files; otherwise the outputs decide."""
    model.producer_name = "another exporter"


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_family_bugs_are_caught(bug: Bug, directory: Path, tmp_path: Path) -> None:
    """By rule 2 alone, from the outputs."""
    checkpoint = witness.checkpoint(bug.case, directory)
    path = export(tmp_path, bug.plant(checkpoint))
    edit(path, disown)
    assert not report_on(checkpoint, path).passed


@pytest.mark.parametrize("pad", [97, 5000])
@pytest.mark.parametrize("case", [c for c in BY_TASK if c.task == "text-classification"], ids=str)
def test_padding_id_outside_the_vocabulary(case: Case, pad: int, directory: Path, tmp_path: Path) -> None:
    """No token can have it, so the last one is classified, as in transformers."""
    checkpoint = altered(witness.checkpoint(case, directory), pad_token_id=pad)
    path = export(tmp_path, checkpoint)
    report = report_on(checkpoint, path)
    assert report.passed, report.table()
    feeds = {**witness.inputs_of(case.task), "attention_mask": np.ones((4, 17), np.int64)}
    model = witness.hf_model(case).double()
    model.config.pad_token_id = pad
    expected = witness.hf_outputs(case, feeds, model)["logits"]
    assert np.allclose(run(session(checkpoint, tmp_path / "run"), feeds)["logits"], expected, rtol=0, atol=1e-5)
    edit(path, first_token_classified)
    assert not report_on(checkpoint, path).passed


def first_token_classified(model: Any) -> None:
    node(model, "last").op_type = "ArgMin"


SILENT = {
    "text-classification": ["score.weight"],
    "token-classification": ["classifier.weight", "classifier.bias"],
    "question-answering": ["qa_outputs.weight", "qa_outputs.bias"],
    "feature-extraction": ["ln_f.weight", "ln_f.bias"],
    "text-generation": ["ln_f.weight", "ln_f.bias"],
}


@pytest.mark.parametrize("task", SILENT)
def test_model_whose_output_is_constant(task: str, directory: Path, tmp_path: Path) -> None:
    """The same graph with other weights stays wrong."""
    right = witness.checkpoint(Case("gpt_neo", task), directory)
    zeros = computed_tensors({name: np.zeros(right.weights[name].shape, np.float32) for name in SILENT[task]})
    silent = dataclasses.replace(right, weights={**right.weights, **zeros})
    path = export(tmp_path, silent)
    report = report_on(silent, path)
    assert report.passed, report.table()
    edit(path, disown)
    assert "is constant" in report_on(right, path).table()


@pytest.mark.parametrize("task", ["text-generation", "text-classification", "feature-extraction"])
@pytest.mark.parametrize("family", ["gpt1", "gpt2", "gpt_neo", "gptj", "gpt_neox"])
def test_vocabulary_of_one_token(family: str, task: str, directory: Path, tmp_path: Path) -> None:
    case = Case(family, task, {"vocab_size": 1}, "one")
    checkpoint = altered(witness.checkpoint(case, directory, Options(task=task)), pad_token_id=0)
    report = report_on(checkpoint, export(tmp_path, checkpoint))
    assert report.passed, report.table()


COUNTING = ["text-classification", "token-classification", "question-answering", "feature-extraction"]


def positions_count_tokens(model: Any) -> None:
    """Positions of the mask's ones instead of slots."""
    one, zero = (helper.make_tensor(name, 7, [], [value]) for name, value in (("one", 1), ("zero", 0)))
    model.graph.initializer.extend([one, zero])
    nodes = [("CumSum", ["attention_mask", "one"], "count"), ("Sub", ["count", "one"], "index")]
    insert_after(model, "positions.default", *(helper.make_node(op, names, [to]) for op, names, to in nodes))
    insert_after(model, "index", helper.make_node("Max", ["index", "zero"], ["counted"]))
    node(model, "positions").input[1] = "counted"


@pytest.mark.parametrize("task", COUNTING)
def test_other_positions_under_padding_are_detected(task: str, directory: Path, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(Case("gpt_neo", task), directory, Options(task=task))
    path = export(tmp_path, checkpoint)
    edit(path, positions_count_tokens)
    report = report_on(checkpoint, path)
    failing = {group.name for group in report.artifacts[0].runs[0].groups if not group.ok}
    assert "left padding" in failing <= {"left padding", "holes", "holes, left padding", "one token"}
    assert "begins in the embedding" in report.table()


@pytest.mark.parametrize("task", [*COUNTING, "multiple-choice"])
def test_positions_of_the_caller(task: str, directory: Path, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(Case("gpt2", task), directory, Options(task=task))
    path = export(tmp_path, checkpoint, position_ids=True)
    report = report_on(checkpoint, path)
    assert report.passed, report.table()
    edit(path, positions_ignored)
    assert {g.name for g in report_on(checkpoint, path).artifacts[0].runs[0].groups if not g.ok} == {
        "last positions",
        "holes, counted positions",
        "left padding, counted positions",
    }


def positions_ignored(model: Any) -> None:
    node(model, "positions").input[1] = "bias.key"
