"""Several artifacts of one output: reported in order, what only lies there is compared while the others run."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.publish.source_reader import StoppedError
from gptconvert.targets import verification as verify_package
from gptconvert.targets.safetensors import plan as safetensors
from gptconvert.targets.verification import find_artifacts, verify
from tests.helpers import tiny_gpt2, write_planned
from tests.verify.exports import export, tiny

Verifier = Callable[..., Any]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Exported twice, into ``tmp_path / "out"``."""
    checkpoint, folder = tiny(tmp_path), tmp_path / "out"
    folder.mkdir()
    export(folder, checkpoint)
    write_planned(folder, safetensors.plan(checkpoint, Options())[0].files)
    (folder / "config.json").write_text(json.dumps(tiny_gpt2()[0]))
    return checkpoint


def planted(monkeypatch: pytest.MonkeyPatch, kind: str, verifier: Verifier) -> None:
    monkeypatch.setattr(verify_package, "VERIFIERS", {**verify_package.VERIFIERS, kind: verifier})


def test_reports_are_in_the_order_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifacts = find_artifacts(str(tmp_path / "out"))
    for order in (artifacts, artifacts[::-1]):
        report = verify(checkpoint, order)
        assert report.passed, report.table()
        assert [found.path for found in report.artifacts] == [artifact.shown_as for artifact in order]
        assert all(found.seconds > 0 for found in report.artifacts)


def test_weights_are_compared_while_a_graph_runs(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits until the other has begun."""
    met, real = threading.Barrier(2, timeout=60), dict(verify_package.VERIFIERS)

    def waiting(kind: str) -> Verifier:
        def act(*arguments: Any) -> Any:
            met.wait()
            return real[kind](*arguments)

        return act

    planted(monkeypatch, "onnx", waiting("onnx"))
    planted(monkeypatch, "safetensors", waiting("safetensors"))
    assert verify(checkpoint, find_artifacts(str(tmp_path / "out"))).passed


def test_both_failures_are_reported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in ("model.safetensors", "onnx/model.onnx_data"):
        path = tmp_path / "out" / name
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    report = verify(checkpoint, find_artifacts(str(tmp_path / "out")))
    assert [found.ok for found in report.artifacts] == [False, False]


class Halt(Exception):
    pass


def test_what_goes_on_meanwhile_ends_with_a_failure(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), []

    def endless(checkpoint: Any, path: Any, shown_as: Any, level: Any, stage: Any) -> None:
        go_on = stage("comparing", 0)
        begun.set()
        try:
            while True:
                go_on(1)
        except StoppedError:
            ended.append(True)
            raise

    def halt(*_: object) -> None:
        assert begun.wait(60)
        raise Halt

    planted(monkeypatch, "safetensors", endless)
    planted(monkeypatch, "onnx", halt)
    with pytest.raises(Halt):
        verify(checkpoint, find_artifacts(str(tmp_path / "out")))
    assert ended
