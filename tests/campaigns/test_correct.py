"""A few correct exports of the campaign, and that it can fail."""

from __future__ import annotations

import os
from itertools import count
from typing import Any

import numpy as np
import pytest

from campaigns import correct
from campaigns.correct import MIXTURE, case, run_case, run_export
from campaigns.report import Report
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families.registry import FAMILIES
from gptconvert.targets.registry import TARGETS

#: Cases to run; TensorFlow's take seconds, and one is enough here.
CASES = int(os.environ.get("CORRECT_EXPORTS", "16"))


@pytest.mark.slow
def test_correct_exports_pass() -> None:
    """More with ``CORRECT_EXPORTS``."""
    report = Report("correct", 2026)
    for number in range(CASES):
        if "tf" not in case(2026, number).options.targets:
            report.add(run_case(2026, number))
    assert report.failures == []
    assert report.outcomes["verified"] + report.outcomes["verified twice"] > 0.6 * report.cases


@pytest.mark.campaign
@pytest.mark.tensorflow
def test_correct_saved_model_passes() -> None:
    number = next(n for n in count() if (c := case(0, n)).options.targets == ("onnx", "tf") and c.again)
    done = run_case(0, number)
    assert done.outcome == "verified twice", done
    correct.close_tensorflow()


def test_wrong_exports_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptconvert.targets.onnx import runner

    original = runner.OnnxRunner.run

    def run(self: Any, feeds: Any, presents: bool) -> Any:
        outputs = original(self, feeds, presents)
        for array in outputs.named.values():
            array *= np.float32(1 + 1e-4)
        return outputs

    monkeypatch.setattr(runner.OnnxRunner, "run", run)
    cases = [case(0, number) for number in range(1000, 1005)]
    done = [run_export(c) for c in cases if c.options.targets == ("onnx",)]
    assert any(each.failed and each.outcome.startswith("exit 5") for each in done), done


@pytest.mark.parametrize(
    ("error", "outcome", "failed"),
    [
        (UnsupportedError("cannot express this"), "refused", False),
        (InputError("the checkpoint itself computes NaN or infinity"), "overflows", False),
        (InputError("damaged"), "exit 3: damaged", True),
        (OverflowError("cannot fit"), "escaped: OverflowError: cannot fit", True),
    ],
)
def test_outcomes(error: Exception, outcome: str, failed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: object) -> None:
        raise error

    monkeypatch.setattr(correct, "convert", convert)
    done = run_case(0, 1)
    assert (done.outcome, done.failed) == (outcome, failed)


def test_cases_cover_everything() -> None:
    cases = [case(1, number) for number in range(600)]
    assert [str(c) for c in cases[:20]] == [str(case(1, number)) for number in range(20)]
    assert {c.options.targets for c in cases} == set(MIXTURE)
    assert {target for targets in MIXTURE for target in targets} == set(TARGETS)
    assert {c.model.config.family for c in cases} == {family.name for family in FAMILIES}
    assert {c.options.dtype for c in cases} == {None, "fp32", "fp16", "bf16"}
    assert {c.options.kv_cache for c in cases} == {None, False}
