"""Every line that calls the operating system fails, once and from there on; and the campaign sees planted faults."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from campaigns import faults
from campaigns.shim import Call, Shim
from gptconvert.publish import sink
from gptconvert.publish.staging import Staging

CODES = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES)


@pytest.mark.campaign
@pytest.mark.parametrize(("name", "once"), [("force", True), ("missing parents", False), ("verify", True)])
def test_every_call_that_fails_has_an_exit_code_and_a_reason(name: str, once: bool) -> None:
    calls, _ = faults.expected(name)
    chosen = _chosen(calls, lines=once and name == "force", seed=f"{name} {once}")
    assert len(chosen) > 10
    cases = [faults.run_fault(n, name, n, CODES[n % len(CODES)], once=once) for n in chosen]
    assert [case for case in cases if case.failed] == []


def _chosen(calls: list[Call], lines: bool, seed: str) -> list[int]:
    """The first call of every function, or of every line and function, and a sample of the others."""
    first = {(call.name, call.line if lines else 0): n for n, call in reversed(list(enumerate(calls)))}
    return sorted({*first.values(), *random.Random(seed).sample(range(len(calls)), 5)})


def test_a_case_follows_from_its_seed_and_number() -> None:
    first, again, other = (faults.run_case(0, number) for number in (3, 3, 4))
    scenario, again_scenario, other_scenario = (case.what.partition(" at ")[0] for case in (first, again, other))
    assert scenario == again_scenario != other_scenario  # threads may swap neighbouring calls


def test_leftovers_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "discard", lambda self: [])
    case = _at("one target", "fsync", errno.EIO)
    assert case.failed
    assert case.outcome.startswith("leftovers not named (.out.gptconvert-")


def test_wrong_exit_codes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def unconverted(self: Any) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError("unforeseen") from error

    monkeypatch.setattr(sink.Sink, "_os_errors", unconverted)
    case = _at("one target", "posix_fallocate", errno.ENOSPC)
    assert case.failed
    assert case.outcome.startswith("wrong exit code: exit 1")


def test_files_that_stay_open_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: set[int] = set()
    monkeypatch.setattr(sink.Sink, "abandon", lambda self: kept.add(self.descriptor))
    try:
        case = _at("one target", "posix_fallocate", errno.ENOSPC)
    finally:
        for descriptor in kept - {-1}:
            os.close(descriptor)
    assert case.failed
    assert "stay open" in case.outcome


def _at(name: str, function: str, code: int) -> Any:
    faults.expected(name)  # what a process asks once about its file system is known from here on
    shim = Shim(code=code)  # by name: threads make the numbers of calls vary
    shim.fails = lambda n: shim.calls[n].name == function and not shim.failed
    return faults.run_shim(0, name, shim, "once")
