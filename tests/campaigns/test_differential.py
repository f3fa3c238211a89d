"""Every format reads valid files as the official library does, and planted differences are found."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from campaigns import differential, formats, fuzz, judge
from campaigns.formats import FORMATS
from campaigns.report import Report

LIGHT = [name for name, format in FORMATS.items() if format.needs != "tensorflow"]
TENSORFLOW = [name for name in FORMATS if name not in LIGHT]


@pytest.mark.parametrize("name", [*LIGHT, *(pytest.param(name, marks=pytest.mark.tensorflow) for name in TENSORFLOW)])
def test_valid_files_are_equal(name: str, tmp_path: Path) -> None:
    format = FORMATS[name]
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for file, data in format.make(random.Random(seed)).items():
            (folder / file).write_bytes(data)
        outcome, _ = differential.compare(format, str(folder / format.path), valid=format.accepted)
        assert outcome == "equal" or not format.accepted


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without TensorFlow, which takes seconds to import."""
    monkeypatch.setattr(differential, "available", lambda: LIGHT)
    monkeypatch.setattr(fuzz, "FAILURES", tmp_path)


@pytest.mark.usefixtures("light")
def test_damaged_files_are_read_alike_or_refused() -> None:
    report = Report("differential", 0)
    for number in range(300):
        report.add(differential.run_case(2026, number))
    assert report.failures == []
    assert report.outcomes["refused"] > 60
    assert report.outcomes["equal"] > 60


def changed(values: Any) -> Any:
    return {name: value if at else "another" for at, (name, value) in enumerate(values.items())}


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("fault", ["values", "accepts", "refuses", "escapes"])
def test_a_planted_fault_is_reported(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sound = FORMATS["npy"]

    def refuse(path: str) -> Any:
        raise formats.InputError("planted", path=path)

    def escape(path: str) -> Any:
        raise IndexError("planted")

    plants = {
        "values": replace(sound, ours=lambda path: changed(sound.ours(path))),
        "accepts": replace(sound, official=escape),
        "refuses": replace(sound, ours=refuse),
        "escapes": replace(sound, ours=escape),
    }
    expected = {
        "values": "values differ: ''",
        "accepts": "official refuses: IndexError: planted",
        "refuses": "a valid file is refused: exit 3",
        "escapes": "escaped: IndexError: planted",
    }
    monkeypatch.setattr(differential, "FORMATS", {"npy": plants[fault]})
    monkeypatch.setattr(differential, "available", lambda: ["npy"])
    failures = [case for number in range(20) if (case := differential.run_case(0, number)).failed]
    assert failures
    assert all(case.outcome.startswith(expected[fault]) for case in failures)
    assert list(tmp_path.glob("npy-*")), "the file is kept"


def test_a_crash_of_the_official_library_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def crash(path: str) -> Any:
        os.abort()

    table = {"npy": replace(FORMATS["npy"], official=crash)}
    monkeypatch.setattr(differential, "FORMATS", table)
    monkeypatch.setattr(differential, "available", lambda: ["npy"])
    report = differential.run(0, 0.3)
    assert report.failures == []
    assert report.outcomes["official crashes"] > 0


def test_exceptions_have_reasons() -> None:
    for exception in differential.EXCEPTIONS:
        assert exception.format in FORMATS
        assert len(exception.reason) > 20
    assert differential.intended("torch", "official refuses: UnpicklingError: x\nUnsupported operand 48").startswith(
        "intended"
    )
    assert differential.intended("npy", "values differ: x") == "values differ: x"
    assert judge.is_allowed("exit 3") and not judge.is_allowed("exit 1")
