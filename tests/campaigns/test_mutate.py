"""A few seconds of mutation fuzzing, and its parts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from campaigns import judge, mutate
from campaigns.mutations import NUMBERS, STRUCTURED, damaged
from campaigns.report import Report
from gptconvert.errors import InputError, UnforeseenError
from tests.helpers import FIXTURES

CASES = 150


@pytest.mark.slow
def test_damaged_checkpoints_give_our_errors() -> None:
    report = Report("mutate", 0)
    for number in range(CASES):
        report.add(mutate.run_case(2026, number))
    assert report.failures == []
    assert report.outcomes["exit 3"] > CASES / 4
    assert report.outcomes["ok"] > CASES / 20


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OverflowError("cannot fit"), "escaped: OverflowError: cannot fit"),
        (UnforeseenError("cannot be read"), "unforeseen: NoneType: None"),
        (InputError("damaged"), "exit 3"),
        (None, "ok"),
    ],
)
def test_outcomes(error: Exception | None, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(*_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(mutate, "_use", use)
    case = mutate.run_case(0, 0)
    assert (case.outcome, case.failed) == (outcome, outcome.startswith(("escaped", "unforeseen")))


def test_a_case_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(*_: object) -> None:
        try:
            while True:
                pass
        except BaseException as error:  # as the boundary of the sources does
            raise UnforeseenError("cannot be read") from error

    monkeypatch.setattr(judge, "MAX_SECONDS", 0.02)
    monkeypatch.setattr(mutate, "_use", use)
    case = mutate.run_case(0, 0)
    assert case.failed
    assert case.outcome == "slow: stopped by the timer"


def test_a_crash_is_the_outcome_of_its_case() -> None:
    import os
    import signal
    import time

    def run_case(seed: int, number: int) -> mutate.Case:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return mutate.Case(number, "", "ok", 0.0)

    cases = list(judge.in_child(run_case, 0, 0, time.monotonic() + 20))
    assert [case.outcome for case in cases] == ["ok", "ok", "killed: exit code -9"]


@pytest.mark.parametrize("suffix", STRUCTURED)
def test_mutations_are_seeded_and_change_something(suffix: str) -> None:
    paths = [path for path in sorted(FIXTURES.rglob(f"*{suffix}")) if path.stat().st_size < 1 << 20][:1]
    for path in paths:
        data = path.read_bytes()
        for change in (STRUCTURED[suffix], damaged):
            made = [[change(random.Random(f"{path}{seed}"), data) for seed in range(20)] for _ in range(2)]
            assert made[0] == made[1]
            assert sum(each != data for each in made[0]) > 10
    assert paths
    assert 10**400 in NUMBERS


def test_the_damage_is_repeatable(tmp_path: Path) -> None:
    first, second = mutate.run_case(7, 7), mutate.run_case(7, 7)
    assert (first.what, first.outcome) == (second.what, second.outcome)
