"""The corpus is replayed, a few chains run, and planted faults are found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from campaigns import fuzz, judge, parsers
from campaigns.coverage import traced
from campaigns.parsers import CORPUS, PARSERS, Parser
from campaigns.report import Report

MOST_BYTES, MOST_FILES = 1 << 20, 500


@pytest.mark.parametrize("name", PARSERS)
def test_the_corpus_has_allowed_outcomes(name: str) -> None:
    inputs = fuzz.corpus(name)
    assert inputs, "run python -m campaigns.fuzz --minimise"
    outcomes = [fuzz.execute(name, data) for data in inputs]
    assert [outcome for outcome, _ in outcomes if not judge.is_allowed(outcome)] == []
    assert max(seconds for _, seconds in outcomes) < judge.MAX_SECONDS
    assert {outcome for outcome, _ in outcomes} >= {"ok"}, "a valid input is among them"


def test_the_corpus_is_small_and_belongs_to_parsers() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) < MOST_FILES
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert {path.name for path in CORPUS.iterdir()} == set(PARSERS)


@pytest.mark.slow
def test_chains_find_nothing() -> None:
    report = Report("fuzz", 0)
    for number in range(25):
        report.add(fuzz.run_case(2026, number))
    assert report.failures == []
    assert report.inputs == 25 * fuzz.STEPS


def faulty(data: bytes, folder: Path) -> None:
    """Fails if the first byte is large, which it is in none of the corpus."""
    from gptconvert.containers.protobuf import Message

    if data[:1] >= b"\x80":
        raise IndexError("planted")
    Message(data)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A parser with a fault, and nothing else."""
    table = {"protobuf": Parser(faulty, parsers.messages, refusals=(parsers.MalformedError,))}
    for module in (fuzz, parsers):
        monkeypatch.setattr(module, "PARSERS", table)
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(fuzz, "FAILURES", tmp_path / "failures")
    fuzz.corpus.cache_clear()
    fuzz.known.cache_clear()
    yield
    fuzz.corpus.cache_clear()
    fuzz.known.cache_clear()


@pytest.mark.usefixtures("planted")
def test_a_planted_fault_is_found_kept_and_repeatable(tmp_path: Path) -> None:
    assert fuzz.minimise("protobuf", 0, 0) == []
    cases = [fuzz.run_case(0, number) for number in range(60)]
    failed = [case for case in cases if case.failed]
    assert failed
    assert {case.outcome for case in failed} == {"escaped: IndexError: planted"}
    for path in (tmp_path / "failures").iterdir():
        with pytest.raises(IndexError):
            faulty(path.read_bytes(), tmp_path)
    again = fuzz.run_case(0, failed[0].number)
    assert (again.what, again.outcome, again.inputs) == (failed[0].what, failed[0].outcome, failed[0].inputs)


@pytest.mark.usefixtures("planted")
def test_minimising_reports_faults_and_keeps_the_coverage(tmp_path: Path) -> None:
    failures = fuzz.minimise("protobuf", 1.0, 0)
    assert any("IndexError: planted" in failure for failure in failures)
    fuzz.corpus.cache_clear()
    kept = fuzz.corpus("protobuf")
    assert 1 <= len(kept) <= fuzz.MOST_KEPT
    fuzz.known.cache_clear()
    before = set[Any]().union(*(fuzz.judged("protobuf", data)[2] for data in parsers.messages()))
    assert before <= fuzz.known("protobuf")


def test_shorten_removes_what_is_not_needed() -> None:
    data = random.Random(0).randbytes(300) + b"needle" + bytes(200)
    assert fuzz.shorten(data, lambda shorter: b"needle" in shorter) == b"needle"


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "known", lambda name: frozenset())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = fuzz.run(0, 0.0)
    assert report.missing == ["hdf5 (needs h5py)", "tflite (needs ai_edge_litert)"]
    assert "NOT RUN: hdf5 (needs h5py)" in str(report)


def test_arcs_are_those_of_this_package() -> None:
    from gptconvert.containers.protobuf import read_varint

    short, long = set[Any](), set[Any]()
    with traced(short):
        read_varint(b"\1", 0)
    with traced(long):
        read_varint(b"\x81\1", 0)
        random.Random(0).random()
    assert short != long
    assert {file for file, _, _ in long} == {"containers/protobuf.py"}
