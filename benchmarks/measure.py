"""Whole-process measurements: wall time, and peak anonymous and file-mapped memory summed over the process tree.

``VmHWM`` counts mapped file pages that the kernel may drop at any time, so it overstates the needs of a program that
memory-maps its input. The peak of ``RssAnon`` is the memory really needed; /proc keeps no high-water mark of it, so
it is sampled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

SAMPLE_SECONDS = 0.01
REST_SECONDS = 6


@dataclass(frozen=True)
class Run:
    """One run of a command."""

    seconds: float
    anon_mib: float
    file_mib: float
    code: int
    output: str


def run(command: Sequence[str], *, env: dict[str, str] | None = None) -> Run:
    """Run ``command`` and sample its memory."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})}
    )
    anon = file = 0.0
    while process.poll() is None:
        pages = [_rss(pid) for pid in _tree(process.pid)]
        anon = max(anon, sum(a for a, _ in pages))
        file = max(file, sum(f for _, f in pages))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    output = process.stdout.read() if process.stdout else ""
    return Run(seconds, anon / 1024, file / 1024, process.returncode, output)


def _tree(pid: int) -> list[int]:
    children = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():  # children are listed per thread
            children += (thread / "children").read_text().split()
    except OSError:
        pass
    return [pid, *(p for child in children for p in _tree(int(child)))]


def _rss(pid: int) -> tuple[int, int]:
    """(RssAnon, RssFile) in KiB."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return tuple(int(fields.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def interleaved(
    commands: dict[str, list[str]], rounds: int, output: Path | None = None, ballast: Path | None = None
) -> dict[str, list[Run]]:
    """Run every command ``rounds`` times in turn, so that drift of the machine affects all equally.

    Before each run, ``output`` is emptied and earlier writes are flushed to disk, so that all runs start from the
    same state. Free memory matters most: a virtual machine returns memory to its host after a few idle seconds, and
    getting it back takes longer than copying.

    Args:
        commands: name → command line.
        rounds: number of runs of each command.
        output: directory that the commands write to.
        ballast: if None, each run starts after :data:`REST_SECONDS` of rest and must first obtain its memory from the
            host, like a single command in practice. If a file, it is copied to ``output`` and removed before each
            run, so that as much memory as a copy needs is already free.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            if output is not None:
                shutil.rmtree(output, ignore_errors=True)
                output.mkdir(parents=True)
                os.sync()
                if ballast is None:
                    time.sleep(REST_SECONDS)
                else:
                    shutil.copy(ballast, output / "ballast")
                    (output / "ballast").unlink()
                    os.sync()
            result = run(command)
            if result.code:
                raise RuntimeError(f"{name} exited with {result.code}:\n{result.output}")
            runs[name].append(result)
    if output is not None:
        shutil.rmtree(output, ignore_errors=True)
    return runs


def median_ratio(runs: list[Run], base: list[Run]) -> float:
    """Median over the rounds of the ratio of wall times."""
    return median(a.seconds / b.seconds for a, b in zip(runs, base, strict=True))
