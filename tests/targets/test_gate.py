"""The gate: no export is published without a passing report of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptconvert import Options, errors, pipeline
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Export, PlannedFile
from gptconvert.targets import registry
from gptconvert.targets.target import Target
from gptconvert.targets.verification import require_complete
from gptconvert.verify.report import ArtifactReport, Report
from gptconvert.verify.weights import WeightReport
from tests.commands import TINY

SOURCE = str(TINY / "openai-tf")


def plan(checkpoint: Checkpoint, options: Options) -> tuple[Export, ...]:
    return (Export("dummy", "dummy.bin", checkpoint, (PlannedFile.of_bytes("dummy.bin", b"anything"),)),)


def good(candidate: Any, level: Any, stage: Any) -> ArtifactReport:
    count = len(candidate.checkpoint.weights)
    return ArtifactReport("dummy", candidate.shown_as, WeightReport(count, equal=count), computes=False)


def bad(candidate: Any, level: Any, stage: Any) -> ArtifactReport:
    report = good(candidate, level, stage)
    return dataclasses.replace(report, problems=["it is not the model"])


def of_another(candidate: Any, level: Any, stage: Any) -> ArtifactReport:
    return dataclasses.replace(good(candidate, level, stage), path="model.safetensors")


def unable(candidate: Any, level: Any, stage: Any) -> ArtifactReport:
    raise errors.UnsupportedError("cannot be verified", path=candidate.path, hint=f"see {candidate.path}")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that registers a target ``dummy`` with a given verifier."""

    def register(verify: Any, **fields: Any) -> None:
        target = Target("dummy", "dummy", plan=plan, verify=verify, runs=False, **fields)
        monkeypatch.setitem(registry.TARGETS, "dummy", "a module")  # type: ignore[arg-type]
        real = registry._imported
        monkeypatch.setattr(registry, "_imported", lambda module: target if module == "a module" else real(module))

    yield register


@pytest.mark.parametrize("targets", [("safetensors", "dummy"), ("dummy", "safetensors"), ("dummy",)], ids=str)
class TestExportThatHasNotPassed:
    @pytest.mark.parametrize(
        ("verify", "code", "message"),
        [(bad, 5, "it is not the model"), (of_another, 5, "not verified: dummy.bin"), (unable, 4, "dummy.bin")],
    )
    def test_prevents_publication(
        self, register: Any, tmp_path: Path, targets: tuple[str, ...], verify: Any, code: int, message: str
    ) -> None:
        register(verify)
        with pytest.raises(errors.GptConvertError) as caught:
            pipeline.convert(SOURCE, tmp_path / "out", Options(targets=targets))
        assert caught.value.exit_code == code
        assert message in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_is_published_once_it_passes(self, register: Any, tmp_path: Path, targets: tuple[str, ...]) -> None:
        register(good)
        result = pipeline.convert(SOURCE, tmp_path / "out", Options(targets=targets))
        assert result.report is not None
        assert [found.kind for found in result.report.artifacts] == list(targets)
        assert (tmp_path / "out" / "dummy.bin").read_bytes() == b"anything"


def test_messages_do_not_contain_the_staging_directory(register: Any, tmp_path: Path) -> None:
    register(unable)
    with pytest.raises(errors.UnsupportedError) as caught:
        pipeline.convert(SOURCE, tmp_path / "out", Options(targets=("safetensors", "dummy")))
    shown = f"{caught.value} {caught.value.hint} {caught.value.path}"
    assert "gptconvert-" not in shown and str(tmp_path) not in shown
    assert caught.value.path == "dummy.bin"


@pytest.mark.parametrize("verify", [None, "verify", 3])
def test_target_needs_a_verifier(verify: Any) -> None:
    with pytest.raises(TypeError, match=r"dummy.*no verifier"):
        Target("dummy", "dummy", plan=plan, verify=verify)


def test_every_registered_target_has_a_verifier() -> None:
    for name in registry.TARGETS:
        assert callable(registry.target_named(name).verify)


def test_missing_report_fails(tmp_path: Path) -> None:
    checkpoint = pipeline.open_checkpoint(SOURCE)
    exports = plan(checkpoint, Options())
    with pytest.raises(errors.VerificationError, match=r"not verified: dummy\.bin"):
        require_complete(exports, Report("default", []))
    require_complete(exports, Report("default", [good(_candidate(checkpoint), "default", None)]))


def _candidate(checkpoint: Checkpoint) -> Any:
    from gptconvert.targets.target import Candidate

    return Candidate("dummy", "dummy.bin", "dummy.bin", checkpoint)
