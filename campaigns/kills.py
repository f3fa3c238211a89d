"""Signals at random times to running conversions: SIGINT, SIGTERM, SIGHUP and SIGKILL, to the process or its group.

Allowed are success and, after a signal that can be handled, its exit code: 130, 143, 129. The output is the old one
or the new one, the message says which, and nothing else is left. After SIGKILL, hidden files beside the output and
temporary files may be left; the next run succeeds and removes them. A conversion that does not end is a failure, and
the report shows the stacks of its threads.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from campaigns.commands import OLD, Tree, leftovers, tree, workspace, write_old
from campaigns.report import Case, Report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
#: Arguments after ``convert source -o out``.
SCENARIOS: Mapping[str, tuple[str, ...]] = {
    "one target": ("--to", "onnx", "--no-verify"),
    "verified": ("--to", "onnx"),
    "force": ("--to", "onnx", "--to", "safetensors", "--no-verify", "--force"),
}
#: Seconds in which the interpreter starts, before any line of gptconvert runs: no signal is sent then.
STARTING = 0.12
#: Seconds for a signal to end a conversion.
PATIENCE = 30


@dataclass(frozen=True)
class Expected:
    """A conversion without signals: what it publishes, and how long it takes."""

    new: Tree
    seconds: float


_EXPECTED: dict[str, Expected] = {}


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over. The line at which a signal arrives varies; the rest follows from the case."""
    report, end = Report("kills", seed, next=start), time.monotonic() + seconds
    if only is not None:
        report.add(run_case(seed, only))
        return report
    while time.monotonic() < end:
        report.add(run_case(seed, report.next))
    return report


def run_case(seed: int, number: int) -> Case:
    """Send a signal to one conversion."""
    dice = random.Random(f"{seed}:{number}")
    name, signum, group = dice.choice(list(SCENARIOS)), dice.choice(SIGNALS), dice.random() < 0.5
    expected = _expected(name)
    delay = dice.uniform(STARTING, max(STARTING, 1.1 * expected.seconds))
    started = time.monotonic()
    with workspace() as root:
        (root / "temporary").mkdir()
        if "--force" in SCENARIOS[name]:
            write_old(root / "out")
        with _start(root, name) as process:
            time.sleep(delay)
            _send(process.pid, signum, group)
            try:
                _, messages = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                messages = f"still running: {_stacks(process)}"
        outcome = f"{signal.Signals(signum).name}, exit {process.returncode}"
        problem = _problem(root, name, signum, process.returncode, messages)
    what = f"{name}: {signum.name} to the {'group' if group else 'process'} after {delay:.2f} s"
    outcome = outcome if problem is None else f"{problem}: {outcome}, {messages!r}"[:6000]
    return Case(number, what, outcome, time.monotonic() - started, problem is not None)


def _expected(name: str) -> Expected:
    if name not in _EXPECTED:
        with workspace() as root:
            (root / "temporary").mkdir()
            started = time.monotonic()
            _finish(root, name)
            _EXPECTED[name] = Expected(tree(root / "out"), time.monotonic() - started)
    return _EXPECTED[name]


def _start(root: Path, name: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TMPDIR": str(root / "temporary"),
        "PYTHONFAULTHANDLER": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "gptconvert", "convert", "source", "-o", "out", *SCENARIOS[name]],
        cwd=root,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_default_signals,
    )


def _default_signals() -> None:
    """Shells start background jobs with SIGINT ignored, and ``nohup`` ignores SIGHUP; conversions keep that."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def _finish(root: Path, name: str) -> None:
    with _start(root, name) as process:
        _, messages = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name}: {messages}")


def _send(pid: int, signum: int, group: bool) -> None:
    if group:
        os.killpg(pid, signum)
    else:
        os.kill(pid, signum)


def _stacks(process: subprocess.Popen[str]) -> str:
    """End a conversion that hangs; returns the stacks of its threads."""
    os.killpg(process.pid, signal.SIGABRT)
    try:
        return process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "no stacks"


def _problem(root: Path, name: str, signum: int, code: int, messages: str) -> str | None:
    """Which promise is broken; None if none is."""
    new, old = _expected(name).new, OLD if "--force" in SCENARIOS[name] else {}
    killed = signum == signal.SIGKILL
    if killed:
        _wait_for_children(root)
    if code not in ((0, -signum) if killed else (0, 128 + signum)):
        return "wrong exit code"
    published = tree(root / "out")
    if published not in ((new,) if code == 0 else (old, new)):
        return "partial output"
    denied = "nothing was published" in messages
    if not killed and code and "interrupted" in messages and denied != (published == old):
        return "untrue message"
    if "Traceback" in messages:
        return "traceback"
    if not killed and (left := _left(root)):
        return f"leftovers ({', '.join(left)})"
    return _problem_of_next_run(root, name) if killed and code else None


def _problem_of_next_run(root: Path, name: str) -> str | None:
    """After SIGKILL: the next run succeeds and cleans up."""
    with _start(root, name) as process:
        _, messages = process.communicate()
    if process.returncode not in (0, 6) or (process.returncode == 6 and "not empty" not in messages):
        return f"the next run fails ({process.returncode}, {messages!r})"
    if process.returncode == 0 and tree(root / "out") != _expected(name).new:
        return "the next run publishes something else"
    left = _left(root) if process.returncode == 0 else []
    return f"leftovers after the next run ({', '.join(left)})" if left else None


def _left(root: Path) -> list[str]:
    return [*leftovers(root, "temporary"), *(path.name for path in (root / "temporary").iterdir())]


def _wait_for_children(root: Path) -> None:
    """Wait until the kernel has ended the processes that work in ``root``: their parent was killed first."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and any(_works_in(root, pid) for pid in os.listdir("/proc") if pid.isdigit()):
        time.sleep(0.01)


def _works_in(root: Path, pid: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/cwd") == str(root)
    except OSError:
        return False
