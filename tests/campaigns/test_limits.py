"""One conversion in each poor condition, and what the campaign reports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from campaigns import limits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux supervises conversions"),
]


@pytest.mark.parametrize("number", range(len(limits.CONDITIONS)), ids=list(limits.CONDITIONS))
def test_conditions(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COMMANDS", {"convert": limits.COMMANDS["convert"]})
    case = limits.run_case(2026, number)
    assert not case.failed, case


@pytest.mark.parametrize(
    ("code", "files", "messages", "problem"),
    [
        (6, {}, "error: too many open files", None),
        (1, {}, "", "wrong exit code"),
        (6, {}, "hint: this is a bug in gptconvert", "blames gptconvert"),
        (6, {}, "Traceback (most recent call last):", "traceback"),
        (6, {"out/config.json": b"half"}, "", "partial output"),
        (0, {}, "", "partial output"),
        (6, {".out.gptconvert.lock": b""}, "", "leftovers (.out.gptconvert.lock)"),
    ],
)
def test_broken_promises_are_reported(
    tmp_path: Path, code: int, files: dict[str, bytes], messages: str, problem: str | None
) -> None:
    (tmp_path / "temporary").mkdir()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    condition = limits.CONDITIONS["32 open files"]
    assert limits._problem(tmp_path, condition, {"config.json": b"whole"}, code, messages) == problem
