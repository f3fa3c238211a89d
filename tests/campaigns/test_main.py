"""The runner: shares of the time, progress that survives an interruption, and reports."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from campaigns import __main__ as program
from campaigns import runner
from campaigns.report import Case, NotRunError, Report
from campaigns.runner import Campaign, Run, State, run_all

Calls = list[tuple[int, float, int]]


@dataclass
class Fake:
    """Runs two cases per call; case ``failing`` fails."""

    calls: Calls
    cases: int
    failing: int
    takes: float

    def __call__(self, seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
        self.calls.append((seed, seconds, start))
        time.sleep(self.takes)
        report = Report("x", seed, next=start)
        for number in range(start, min(self.cases, start + 2)) if only is None else [only]:
            report.add(Case(number, f"case | {number}", "ok", number / 100, number == self.failing))
        return report


def campaign(
    calls: Calls, *, cases: int = 10**9, failing: int = -1, takes: float = 0.0, weight: float = 1
) -> Campaign:
    return Campaign(Fake(calls, cases, failing, takes), weight)


def test_shares_follow_the_weights_and_an_overrun_is_made_up_for() -> None:
    first: Calls = []
    second: Calls = []
    state = State(None, 7)
    run_all({"a": campaign(first, weight=3, takes=0.4), "b": campaign(second)}, state, 0.4)
    assert first == [(7, pytest.approx(0.3, abs=0.01), 0)]
    assert second[0][1] == 0.0, "a used all of the time"
    assert state.done == {"a", "b"}


def test_a_campaign_ends_with_its_cases() -> None:
    calls: Calls = []
    state = State(None, 0)
    run_all({"a": campaign(calls, cases=5)}, state, 60)
    assert [start for _, _, start in calls] == [0, 2, 4, 5]
    assert state.reports["a"].cases == 5
    assert state.reports["a"].slowest == Case(4, "case | 4", "ok", 0.04)


def interrupting(run: Run, at: int) -> Run:
    def interrupted(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
        if start >= at:
            raise KeyboardInterrupt
        return run(seed, seconds, start, only)

    return interrupted


def test_an_interrupted_run_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, calls = str(tmp_path / "state"), Calls()
    whole = campaign(calls, cases=6, failing=1)
    table = {"a": campaign([], cases=3), "b": Campaign(interrupting(whole.run, 2), 1)}
    assert program.main(["--state", path, "--seed", "5"], table) == 130
    assert "continue with --state" in capsys.readouterr().err
    assert program.main(["--state", path], {"a": campaign([], cases=3), "b": whole}) == 1
    output = capsys.readouterr().out
    assert "FAILED case 1" in output, "what the first call found counts too"
    assert [(seed, start) for seed, _, start in calls] == [(5, 0), (5, 2), (5, 4), (5, 6)]
    raw = json.loads(Path(path).read_text())
    assert raw["done"] == ["a", "b"]
    assert {name: sum(report["outcomes"].values()) for name, report in raw["reports"].items()} == {"a": 3, "b": 6}
    before = list(calls)
    assert program.main(["--state", path], {"b": whole}) == 1, "a finished run is reported again"
    assert calls == before


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"seed": 1, "reports": [], "done": []}'])
def test_a_damaged_state(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state"
    path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        program.main(["--state", str(path)], {"a": campaign([])})
    assert caught.value.code == 2
    assert "delete it to start anew" in capsys.readouterr().err
    assert path.read_text() == content


def test_the_state_of_another_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "state")
    table = {"a": campaign([], cases=1)}
    assert program.main(["--state", path, "--seed", "5"], table) == 0
    with pytest.raises(SystemExit):
        program.main(["--state", path, "--seed", "6"], table)
    assert "has seed 5, not 6" in capsys.readouterr().err


def test_missing_tools_are_not_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(*_: Any) -> Report:
        raise NotRunError("needs strace")

    report = tmp_path / "report.md"
    table = {"a": Campaign(absent, 1), "b": campaign([], cases=2, failing=0)}
    assert program.main(["--report", str(report)], table) == 1
    assert "NOT RUN: needs strace" in capsys.readouterr().out
    text = report.read_text()
    assert "| a | not run |" in text
    assert "* a: needs strace" in text
    assert "* b, case 0: case \\| 0: ok" in text
    assert text.startswith("Commit ")
    assert "Python 3." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_several_at_a_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "SLICE", 0.05)
    table = {name: campaign([], cases=4, failing=3 if name == "b" else -1) for name in "abc"}
    assert program.main(["--jobs", "2", "--seconds", "5"], table) == 1
    assert capsys.readouterr().out.count("4 cases") == 3


@pytest.mark.parametrize(
    ("arguments", "words"), [(["nothing"], "no such campaign: nothing"), (["--only", "3"], "needs the name of one")]
)
def test_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert words in capsys.readouterr().err


def test_one_case(capsys: pytest.CaptureFixture[str]) -> None:
    calls: Calls = []
    assert (
        program.main(["a", "--only", "3", "--seed", "9"], {"a": campaign(calls, failing=3), "b": campaign([])}) == 1
    )
    assert calls == [(9, 0.0, 3)]


def test_the_list_describes_every_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(program.CAMPAIGNS)
    assert all(len(line.split()) > 5 for line in lines)


def test_a_report_survives_json() -> None:
    report = Report("a", 3, next=4)
    report.add(Case(5, "what", "escaped: x", 0.5, failed=True, inputs=7))
    report.missing, report.leftovers, report.seconds = ["b"], 2, 1.5
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report
