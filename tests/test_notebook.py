"""What the Python API shows in a notebook, and what it reports while it runs."""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import pytest

import gptconvert
from gptconvert.errors import UsageError
from gptconvert.model.options import DEFAULTS, INFO
from gptconvert.pipeline import Result
from tests.commands import TINY

SOURCE = TINY / "hf-safetensors"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    options = gptconvert.Options(quantize=("q4",), max_kl=10.0)
    return gptconvert.convert(SOURCE, tmp_path_factory.mktemp("notebook") / "out", options)


def test_representations(result: Result) -> None:
    report = result.report
    assert report is not None
    assert re.fullmatch(r"<Report: verified; 2 artifacts, worst R \d\.\d\d>", repr(report))
    assert repr(report.artifacts[0]) == "<ArtifactReport 'onnx/model.onnx': verified, 1 run>"
    assert repr(report.artifacts[0].runs[0]).endswith("15 of 15 probe groups within noise>")
    assert re.fullmatch(r"<Quality: mean KL \S+, top-1 [\d.]+%>", repr(report.artifacts[1].quality))
    measured = gptconvert.measure_quality(result.output, SOURCE, gptconvert.Options(max_kl=10.0))
    assert re.match(r"<Measured 'onnx/model.onnx': \d+ bytes, mean KL ", repr(measured[0]))


@pytest.mark.parametrize("kind", ["result", "report", "plan"])
def test_html(result: Result, kind: str) -> None:
    values: dict[str, Any] = {"result": result, "report": result.report, "plan": gptconvert.plan(SOURCE)}
    html = values[kind]._repr_html_()
    assert html.startswith('<div class="gptconvert">') and html.endswith("</div>")
    assert ("Verified" in html) == (kind != "plan")
    assert html.count("<svg") == (0 if kind == "plan" else 6)
    assert "onnx/model.onnx" in html
    assert "<script" not in html and "<main" not in html


def test_charts_of_several_values_have_different_identifiers(result: Result) -> None:
    assert result.report is not None
    pages = [re.findall(r'\bid="([^"]+)"', value._repr_html_()) for value in (result, result.report)]
    assert not {*pages[0]} & {*pages[1]}


def test_html_is_the_same_every_time(result: Result) -> None:
    assert result._repr_html_() == result._repr_html_()


def test_html_without_matplotlib(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    html = result._repr_html_()
    assert "<svg" not in html and "Verified" in html


def test_settings_of_the_notebook_are_left_alone(result: Result) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    matplotlib.rcParams["font.size"] = 33.0
    result._repr_html_()
    assert matplotlib.rcParams["font.size"] == 33.0
    matplotlib.rcParams["font.size"] = before["font.size"]
    assert {key for key, value in matplotlib.rcParams.items() if value != before[key]} == set()


def test_rows(result: Result) -> None:
    assert result.report is not None
    rows = result.report.to_rows()
    assert len(rows) == 30
    columns = "artifact kind runtime group ok tokens R max_error R_present top1 problems".split()
    assert all([*row] == columns for row in rows)
    first = result.report.artifacts[0].runs[0].groups[0]
    main = first.worst(presents=False)
    assert main is not None
    assert (rows[0]["group"], rows[0]["R"]) == (first.name, main.ratio)


class Recorder:
    """Records stages, and raises in one of them."""

    def __init__(self, fails_in: str = "") -> None:
        self.stages: list[tuple[str, int]] = []
        self.done = 0
        self.threads: set[str] = set()
        self.fails_in = fails_in

    def stage(self, name: str, total: int = 0) -> None:
        self.stages.append((name, total))
        self.threads.add(threading.current_thread().name)

    def advance(self, count: int) -> None:
        if self.fails_in and self.stages[-1][0].startswith(self.fails_in):
            raise RuntimeError("cancelled")
        self.done += count if self.stages[-1][0] == "writing" else 0


def test_progress(tmp_path: Path) -> None:
    progress: gptconvert.Progress = Recorder()
    gptconvert.convert(SOURCE, tmp_path / "out", progress=progress)
    assert isinstance(progress, Recorder)
    names = [name for name, _ in progress.stages]
    assert names[0] == "writing" and names[-1] == "publishing"
    assert progress.stages[0][1] == gptconvert.plan(SOURCE).nbytes == progress.done
    assert progress.threads == {"MainThread"}


@pytest.mark.parametrize("stage", ["writing", "running onnxruntime"])
def test_an_exception_in_progress_cancels_the_run(tmp_path: Path, stage: str) -> None:
    with pytest.raises(RuntimeError, match="cancelled"):
        gptconvert.convert(SOURCE, tmp_path / "out", progress=Recorder(stage))
    assert not any(tmp_path.iterdir())


def test_options_show_what_was_chosen() -> None:
    assert repr(gptconvert.Options()) == "Options()"
    options = gptconvert.Options(targets=("onnx", "tf"), dtype="fp16", verify=None)
    assert repr(options) == "Options(targets=('onnx', 'tf'), dtype='fp16', verify=None)"
    assert eval(repr(options), {"Options": gptconvert.Options}) == options


def test_docstrings_name_the_choices() -> None:
    text = re.split(r"\n        (?=\w+: )", gptconvert.Options.__doc__ or "")
    described = {entry.partition(":")[0]: entry for entry in text}
    assert {*INFO} <= {*described}
    for name, info in INFO.items():
        ends = (info.choices[0], info.choices[-1]) if name == "opset" else info.choices
        assert [choice for choice in ends if not re.search(rf"\b{choice}\b", described[name])] == [], name


@pytest.mark.parametrize("name", [name for name, info in INFO.items() if info.choices])
def test_wrong_values_are_refused_with_the_name_of_the_field(name: str) -> None:
    wrong: Any = ("nonsense",) if isinstance(DEFAULTS[name], tuple) else "nonsense"
    with pytest.raises(UsageError, match=rf"\b{name}\b.*expected.*found"):
        dataclasses.replace(gptconvert.Options(), **{name: wrong})


def test_unknown_targets_are_refused_before_the_source_is_opened() -> None:
    options = gptconvert.Options(targets=("onix",))
    for function in (gptconvert.open_checkpoint, gptconvert.inspect, gptconvert.plan):
        with pytest.raises(UsageError, match="targets: no target 'onix'; expected one of onnx"):
            function("somebody/model-that-must-not-be-downloaded", options)
