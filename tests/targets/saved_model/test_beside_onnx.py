"""A SavedModel and an ONNX graph in one output directory must continue a text alike."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from gptconvert import pipeline
from gptconvert.model.options import Options
from gptconvert.targets.onnx.continuation import check_continuation
from gptconvert.targets.onnx.runner import OnnxRunner
from gptconvert.targets.registry import target_named
from gptconvert.targets.saved_model.process import TensorFlowProcess
from gptconvert.targets.verification import verify_exports
from gptconvert.verify.runners import Feeds, Outputs, RunError
from tests.helpers import FIXTURES

pytestmark = pytest.mark.tensorflow

NAME = "greedy as onnx/model.onnx"


def convert(output: Path, source: str = "tiny-gpt2/openai-tf", **options: Any) -> pipeline.Result:
    checkpoint = pipeline.open_checkpoint(str(FIXTURES / source))
    return pipeline.convert(checkpoint, str(output), Options(targets=("tf", "onnx"), **options))


def groups(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The SavedModel's probe groups in a report."""
    (found,) = (artifact for artifact in report["artifacts"] if artifact["kind"] == "tf")
    return {group["group"]: group for run in found["runs"] for group in run["groups"]}


@pytest.mark.parametrize("options", [{}, {"dtype": "fp16"}, {"kv_cache": False}], ids=str)
def test_same_continuation_passes(options: dict[str, Any], shared: TensorFlowProcess, tmp_path: Path) -> None:
    result = convert(tmp_path / "out", **options)
    assert result.report is not None
    found = groups(result.report.as_dict())
    (name,) = (name for name in found if name.startswith("greedy as onnx/"))
    assert found[name]["ok"]
    assert found[name]["tokens"] == 24


class Reversed(OnnxRunner):
    """A graph with its logits reversed."""

    def run(self, feeds: Feeds, presents: bool) -> Outputs:
        outputs = super().run(feeds, presents)
        return Outputs({name: value[..., ::-1] for name, value in outputs.named.items()}, outputs.presents)


class Failing(OnnxRunner):
    def run(self, feeds: Feeds, presents: bool) -> Outputs:
        raise RunError("not today")


@pytest.mark.parametrize(
    ("runner", "message"), [(Reversed, "token 0 of row"), (Failing, "the run failed: not today")]
)
def test_different_continuation_fails(
    runner: type[OnnxRunner], message: str, shared: TensorFlowProcess, tmp_path: Path
) -> None:
    checkpoint = pipeline.open_checkpoint(str(FIXTURES / "tiny-gpt2/openai-tf"))
    options = Options(targets=("tf", "onnx"), verify=None)
    pipeline.convert(checkpoint, tmp_path / "out", options)
    onnx = target_named("onnx")
    altered = dataclasses.replace(onnx, check_continuation=functools.partial(check_continuation, runner=runner))
    report = verify_exports(
        pipeline.plan(checkpoint, options).exports,
        str(tmp_path / "out"),
        target_of=lambda name: altered if name == "onnx" else target_named(name),
    )
    assert not report.passed
    found = groups(report.as_dict())
    assert [name for name, group in found.items() if not group["ok"]] == [NAME]
    assert any(message in problem for problem in found[NAME]["problems"])


def test_without_onnx_nothing_is_compared(shared: TensorFlowProcess, tmp_path: Path) -> None:
    checkpoint = pipeline.open_checkpoint(str(FIXTURES / "tiny-gpt2/openai-tf"))
    result = pipeline.convert(checkpoint, str(tmp_path / "out"), Options(targets=("tf",)))
    assert result.report is not None
    assert [name for name in groups(result.report.as_dict()) if name.startswith("greedy as")] == []


def test_reported_sizes_are_actual_sizes(shared: TensorFlowProcess, tmp_path: Path) -> None:
    """Planned sizes are only estimates."""
    checkpoint = pipeline.open_checkpoint(str(FIXTURES / "tiny-gpt2/openai-tf"))
    options = Options(targets=("tf",), verify=None)
    planned = {file.path: file.nbytes for file in pipeline.plan(checkpoint, options).files}
    result = pipeline.convert(checkpoint, str(tmp_path / "out"), options)
    readme = (tmp_path / "out/README.md").read_text()
    recorded = {f["path"]: f["size"] for f in json.loads((tmp_path / "out/manifest.json").read_text())["files"]}
    reported = {file.path: file.nbytes for file in result.files}
    for path in (p for p in planned if p.startswith("saved_model/")):
        size = (tmp_path / "out" / path).stat().st_size
        assert size == reported[path] == recorded[path]
        assert f"| `{path}` | {size:,} |" in readme
        assert size <= planned[path]
