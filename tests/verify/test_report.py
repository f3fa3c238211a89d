"""The table of a verification: short when it passes, whole on request and when it fails."""

from __future__ import annotations

from gptconvert.verify.metrics import Measure
from gptconvert.verify.outputs import Group
from gptconvert.verify.report import ArtifactReport, Report, RunReport
from gptconvert.verify.weights import WeightReport


def group(name: str, ratio: float, present: float = 1.0) -> Group:
    """A probe group whose logits, and keys and values, are ``ratio`` and ``present`` times the noise off."""
    measures = {}
    for tensor, r in (("logits", ratio), ("present.0.key", present)):
        measures[tensor] = Measure(tensor, 1e-7, tokens=9, count=9, error_square=r * r, noise_square=1, noise_max=1)
    return Group(name, 9, measures)


def report(*ratios: float) -> Report:
    groups = [group(f"length {i}", ratio) for i, ratio in enumerate(ratios)]
    weights = WeightReport(expected=3, equal=3)
    runs = [RunReport("runtime A", groups), RunReport("runtime B", [group("holes", 0.5, 1.5)])]
    return Report("default", [ArtifactReport("onnx", "onnx/model.onnx", weights, runs)])


def test_a_passing_run_is_one_line() -> None:
    assert report(0.9, 1.31, 1.2).table().splitlines() == [
        "onnx/model.onnx  (onnx)",
        "  weights: 3 of 3 equal, byte for byte",
        "  runtime A: 3 of 3 probe groups within noise, worst R 1.31 (length 1)",
        "  runtime B: 1 of 1 probe groups within noise, worst R 1.50 (holes)",
        "verified",
    ]


def test_every_group_on_request() -> None:
    text = report(0.9, 1.31).table(verbose=True)
    assert "  outputs: runtime A\n" in text
    assert [line.split()[:2] for line in text.splitlines() if "length" in line] == [["length", "0"], ["length", "1"]]
    assert "within noise" not in text


def test_a_failure_shows_every_group_of_every_run() -> None:
    failed = report(0.9, 271.0)
    assert not failed.passed
    assert failed.table() == failed.table(verbose=True)
    assert "length 0" in failed.table()
    assert "holes" in failed.table()


def test_a_run_without_figures_names_none() -> None:
    empty = Report("default", [ArtifactReport("tf", "saved_model", WeightReport(1), [RunReport("x", [Group("g")])])])
    assert "  x: 1 of 1 probe groups within noise\n" in empty.table()
