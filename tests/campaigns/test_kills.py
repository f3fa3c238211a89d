"""A few signals to running conversions, and what the campaign reports."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from campaigns import kills

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux supervises conversions"),
]
CASES = 4


@pytest.mark.campaign
def test_signals_leave_nothing() -> None:
    cases = [kills.run_case(2026, number) for number in range(CASES)]
    assert [case for case in cases if case.failed] == []
    assert not all(case.outcome.endswith("exit 0") for case in cases)


TRUE = "error: interrupted; nothing was published"


@pytest.mark.parametrize(
    ("code", "files", "messages", "problem"),
    [
        (143, {}, TRUE, None),
        (-15, {}, "", "wrong exit code"),
        (143, {"out/config.json": b"half"}, TRUE, "partial output"),
        (0, {}, "", "partial output"),
        (143, {}, "error: interrupted; out was published", "untrue message"),
        (143, {}, f"{TRUE}\nTraceback (most recent call last):", "traceback"),
        (143, {".out.gptconvert.lock": b""}, TRUE, "leftovers (.out.gptconvert.lock)"),
        (143, {"temporary/gptconvert-scratch-x": b""}, TRUE, "leftovers (gptconvert-scratch-x)"),
    ],
)
def test_broken_promises_are_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    files: dict[str, bytes],
    messages: str,
    problem: str | None,
) -> None:
    monkeypatch.setitem(kills._EXPECTED, "one target", kills.Expected({"config.json": b"whole"}, 1.0))
    (tmp_path / "temporary").mkdir()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert kills._problem(tmp_path, "one target", signal.SIGTERM, code, messages) == problem
