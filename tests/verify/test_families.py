"""Every family with every head: correct exports pass; a wrong body or head fails."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import LazyTensor
from gptconvert.targets.onnx.verify import OnnxVerifier
from reference_model.config import CACHED_TASKS
from tests.families import witness
from tests.families.bugs import BUGS, Bug
from tests.families.witness import BY_TASK, CASES, Case
from tests.helpers import computed_tensors
from tests.verify.exports import altered, edit, export, report_on


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
