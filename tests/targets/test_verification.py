"""Several artifacts of one output: reported in order; those that only compare bytes do so while others run."""

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
from gptconvert.targets.foreign import find_candidates
from gptconvert.targets.registry import target_named
from gptconvert.targets.safetensors import plan as safetensors
from gptconvert.targets.verification import verify
from tests.helpers import tiny_gpt2, write_planned
from tests.verify.exports import export, report_on, tiny

Verifier = Callable[..., Any]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A checkpoint, exported as ONNX and safetensors to ``tmp_path / "out"``."""
    checkpoint, folder = tiny(tmp_path), tmp_path / "out"
    folder.mkdir()
    export(folder, checkpoint)
    write_planned(folder, safetensors.plan(checkpoint, Options())[0].files)
    (folder / "config.json").write_text(json.dumps(tiny_gpt2()[0]))
    return checkpoint


def test_reports_are_in_the_given_order(checkpoint: Checkpoint, tmp_path: Path) -> None:
    candidates = find_candidates(checkpoint, str(tmp_path / "out"))
    for order in (candidates, candidates[::-1]):
        report = verify(order)
        assert report.passed, report.table()
        assert [found.path for found in report.artifacts] == [candidate.shown_as for candidate in order]
        assert all(found.seconds > 0 for found in report.artifacts)


def test_weights_are_compared_while_a_graph_runs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Each verifier waits until the other has begun."""
    met = threading.Barrier(2, timeout=60)

    def waiting(kind: str) -> Verifier:
        def act(*arguments: Any) -> Any:
            met.wait()
            return target_named(kind).verify(*arguments)

        return act

    verifiers = {name: waiting(name) for name in ("onnx", "safetensors")}
    assert report_on(checkpoint, tmp_path / "out", verifiers=verifiers).passed


def test_both_failures_are_reported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in ("model.safetensors", "onnx/model.onnx_data"):
        path = tmp_path / "out" / name
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    report = report_on(checkpoint, tmp_path / "out")
    assert [found.ok for found in report.artifacts] == [False, False]


class Halt(Exception):
    pass


def test_background_work_ends_with_a_failure(checkpoint: Checkpoint, tmp_path: Path) -> None:
    begun, ended = threading.Event(), []

    def endless(candidate: Any, level: Any, stage: Any) -> Any:
        advance = stage("comparing", 0)
        begun.set()
        try:
            while True:
                advance(1)
        except StoppedError:
            ended.append(True)
            raise

    def halt(*_: object) -> Any:
        assert begun.wait(60)
        raise Halt

    with pytest.raises(Halt):
        report_on(checkpoint, tmp_path / "out", verifiers={"safetensors": endless, "onnx": halt})
    assert ended
