"""Conversions in poor conditions: limits on files, memory and file sizes, the C locale, streams that are closed or
full, a source that changes while it is read, an output directory that cannot be written.

Each condition states its allowed exit codes. In all of them, the output is complete or absent, nothing else is left,
and the message does not blame gptconvert and has no traceback. Exhausted memory may kill the process (128 + n) in
libraries that cannot report it; the message then says so.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from campaigns.commands import Tree, leftovers, tree, workspace
from campaigns.report import Case, Report

MIB = 1 << 20
#: Seconds for one command.
PATIENCE = 180


def _nothing(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Condition:
    """A condition to run in.

    Attributes:
        codes: allowed exit codes.
        limits: resource → (smallest, largest) limit.
        redirection: of the shell.
        environment: variables.
        meanwhile: called with the source file and dice while the command runs.
        prepare: called with the root before.
    """

    codes: tuple[int, ...]
    limits: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    redirection: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    meanwhile: Callable[[Path, random.Random], None] = _nothing
    prepare: Callable[[Path], None] = _nothing


def _truncate(file: Path, dice: random.Random) -> None:
    os.truncate(file, dice.randrange(file.stat().st_size))


def _zero(file: Path, dice: random.Random) -> None:
    size = file.stat().st_size
    start = dice.randrange(size)
    with open(file, "r+b") as opened:
        opened.seek(start)
        opened.write(bytes(min(size - start, 1 << dice.randrange(12))))


def _empty_and_restore_time(file: Path, dice: random.Random) -> None:
    status = file.stat()
    _zero(file, dice)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _read_only(root: Path) -> None:
    """As root, permissions do not bind: a file in place of the parent does."""
    (root / "parent").touch() if os.geteuid() == 0 else (root / "parent").mkdir(mode=0o500)


#: Codes of a process that a library ended because memory ran out: SIGABRT, SIGSEGV, SIGKILL.
ENDED = (134, 139, 137)
CONDITIONS: Mapping[str, Condition] = {
    "32 open files": Condition((0, 6), {resource.RLIMIT_NOFILE: (32, 32)}),
    "few open files": Condition((0, 6), {resource.RLIMIT_NOFILE: (12, 40)}),
    "little memory": Condition((0, 6, *ENDED), {resource.RLIMIT_AS: (150 * MIB, 3000 * MIB)}),
    "small files": Condition((0, 6), {resource.RLIMIT_FSIZE: (0, 120_000)}),
    "C locale": Condition((0,), environment={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    "no stdin": Condition((0,), redirection="<&-"),
    "no stdout": Condition((0,), redirection=">&-"),
    "no stderr": Condition((0,), redirection="2>&-"),
    "no streams": Condition((0,), redirection="<&- >&- 2>&-"),
    "full stdout": Condition((6,), redirection=">/dev/full"),
    "full stderr": Condition((0, 6), redirection="2>/dev/full"),
    "full streams": Condition((6,), redirection=">/dev/full 2>&1"),
    "truncated source": Condition((0, 3), meanwhile=_truncate),
    "zeroed source": Condition((0, 3, 5), meanwhile=_zero),
    "zeroed source with its old time": Condition((0, 3, 5), meanwhile=_empty_and_restore_time),
    "read-only parent": Condition((6,), prepare=_read_only),
}
#: Arguments, after ``gptconvert``.
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "convert": ("convert", "source", "-o", "OUTPUT", "--to", "onnx", "--no-verify"),
    "convert, verified": ("convert", "source", "-o", "OUTPUT", "--to", "safetensors"),
    "convert --json": ("convert", "source", "-o", "OUTPUT", "--to", "onnx", "--no-verify", "--json"),
}
_EXPECTED: dict[str, tuple[Tree, float]] = {}


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over. When a source changes does not follow from the case's number exactly."""
    report, end = Report("limits", seed, next=start), time.monotonic() + seconds
    if only is not None:
        report.add(run_case(seed, only))
        return report
    while time.monotonic() < end:
        report.add(run_case(seed, report.next))
    return report


def run_case(seed: int, number: int) -> Case:
    """Run a command in a condition; consecutive cases take the conditions in turn."""
    dice = random.Random(f"{seed}:{number}")
    name, command = list(CONDITIONS)[number % len(CONDITIONS)], dice.choice(list(COMMANDS))
    condition = CONDITIONS[name]
    limits = {key: dice.randint(*bounds) for key, bounds in condition.limits.items()}
    new, duration = _expected(command)
    started = time.monotonic()
    with workspace() as root:
        (root / "temporary").mkdir()
        condition.prepare(root)
        output = "parent/out" if (root / "parent").exists() else "out"
        with _start(root, command, output, condition, limits) as process:
            if condition.meanwhile is not _nothing:
                time.sleep(dice.uniform(0.1, 1.0) * duration)
                (data,) = (root / "source").glob("*.data-*")
                condition.meanwhile(data, dice)
            out, err = process.communicate(timeout=PATIENCE)
        problem = _problem(root, condition, new, process.returncode, out + err)
    what = f"{name}{''.join(f' ({value})' for value in limits.values())}: {command}"
    outcome = f"exit {process.returncode}"
    outcome = outcome if problem is None else f"{problem}: {outcome}, {err!r}"[:1500]
    return Case(number, what, outcome, time.monotonic() - started, problem is not None)


def _expected(command: str) -> tuple[Tree, float]:
    """What a command publishes in good conditions, and how long it takes."""
    if command not in _EXPECTED:
        started = time.monotonic()
        with workspace() as root:
            (root / "temporary").mkdir()
            with _start(root, command, "out", Condition((0,)), {}) as process:
                _, err = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{command}: {err}")
            _EXPECTED[command] = tree(root / "out"), time.monotonic() - started
    return _EXPECTED[command]


def _start(
    root: Path, command: str, output: str, condition: Condition, limits: Mapping[int, int]
) -> subprocess.Popen[str]:
    arguments = [output if argument == "OUTPUT" else argument for argument in COMMANDS[command]]
    shell = [
        "bash",
        "-c",
        f'exec "$@" {condition.redirection}',
        "bash",
        sys.executable,
        "-m",
        "gptconvert",
        *arguments,
    ]
    setting = "".join(f"resource.setrlimit({key}, ({value}, {value})); " for key, value in limits.items())
    code = f"import os, resource, sys; {setting}os.execvp(sys.argv[1], sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *shell] if limits else shell,
        cwd=root,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "TMPDIR": str(root / "temporary"),
            **condition.environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _problem(root: Path, condition: Condition, new: Tree, code: int, messages: str) -> str | None:
    """Which promise is broken; None if none is."""
    if code not in condition.codes:
        return "wrong exit code"
    if "a bug in gptconvert" in messages and code != 5:
        return "blames gptconvert"
    if "Traceback" in messages:
        return "traceback"
    published = tree(root / "out")
    if published not in ({}, new) or (code == 0 and published != new):
        return "partial output"
    left = [*leftovers(root, "temporary", "parent"), *(path.name for path in (root / "temporary").iterdir())]
    return f"leftovers ({', '.join(left)})" if left else None
