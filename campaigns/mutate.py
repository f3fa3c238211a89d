"""Mutation fuzzing: damage copies of the fixtures of every source format, and open them.

Allowed are success and a :class:`GptConvertError` of exit code 2, 3, 4 or 7, within a budget of processor time and
memory. An error that only the boundary of the sources caught is a failure too: its cause needs a message of its own.
A child process runs the cases, so that a crash is found too and counts as the case's outcome.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from campaigns.mutations import mutate
from campaigns.report import Case, Report
from gptconvert.containers.untrusted import boundary
from gptconvert.errors import GptConvertError, UnforeseenError
from gptconvert.inspection import inspect, open_checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.package.tokenizer import tokenizer_files

FIXTURES = Path(__file__).parents[1] / "fixtures"
#: Checkpoint → the format that a command names, or None to detect it, and options that open it.
SOURCES: Mapping[str, tuple[str | None, dict[str, Any]]] = {
    **{
        f"tiny-gpt2/{name}": (None, {}) for name in ("hf-safetensors", "hf-safetensors-sharded", "hf-bare", "hf-bf16")
    },
    **{f"tiny-gpt2/{name}": ("hf", {}) for name in ("hf-bin", "hf-bin-legacy", "hf-bin-sharded", "hf-variant")},
    **{f"originals/{name}": ("hf", {}) for name in ("h5-gpt2", "flax-gpt2", "flax-gpt-neo")},
    **{f"tiny-gpt2/{name}": (None, {}) for name in ("openai-tf", "openai-tf-adam", "openai-tf-partitioned")},
    **{f"tiny-gpt2/{name}": ("openai-tf", {}) for name in ("openai-tf-bf16", "openai-tf-sharded")},
    "gpt2-stdlib": ("openai-tf", {}),
    "originals/gpt1": ("openai-gpt1", {"n_head": 3}),
    "originals/llmc": (None, {}),
    "originals/megatron": ("megatron", {}),
    "originals/mesh-jax": ("mesh-jax", {}),
    "originals/mesh-tf": ("mesh-tf", {}),
    "originals/nanogpt": ("nanogpt", {}),
    "originals/nanogpt-old": (None, {}),
    "originals/neox-pipeline": ("neox", {}),
    "originals/neox-sequential": ("neox", {}),
}
#: Exit codes that damaged input may have. 2: the damage makes an option necessary.
ALLOWED = frozenset((2, 3, 4, 7))
MAX_SECONDS = 5.0
#: Memory in MiB that one process may take, over what it takes after the imports.
MAX_MEMORY = 400
#: Largest tensor that is read, in bytes.
MAX_READ = 1 << 20


class _TooSlowError(BaseException):
    """Raised by the timer in the middle of a case."""


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over.

    Args:
        seed: of the cases.
        seconds: wall time.
        start: number of the first case.
        only: run this case alone, and print the traceback of its error.
    """
    report, end = Report("mutate", seed, next=start), time.monotonic() + seconds
    if only is not None:
        report.add(run_case(seed, only, debug=True))
        return report
    while time.monotonic() < end:
        for case in _in_child(seed, report.next, end):
            report.add(case)
    return report


def _in_child(seed: int, first: int, end: float) -> Iterator[Case]:
    """The outcomes of cases that one child process runs, until the time is over or it dies."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(seed, first, end, there))
    child.start()
    there.close()
    running, what = first, "unknown"
    try:
        while (message := here.recv()) is not None:
            if isinstance(message, Case):
                yield message
                running = message.number + 1
            else:
                running, what = message
    except EOFError:
        child.join()
        yield Case(running, what, f"killed: exit code {child.exitcode}", 0.0, failed=True)
    child.join()


def _child(seed: int, first: int, end: float, results: Connection) -> None:
    base, number = _peak_memory(), first
    while time.monotonic() < end and number < first + 2000:
        results.send((number, f"case {number}"))
        case, used = run_case(seed, number), _peak_memory() - base
        if used > MAX_MEMORY and not case.failed:
            case = Case(number, case.what, f"memory: {used:.0f} MiB", case.seconds, failed=True)
        results.send(case)
        if used > MAX_MEMORY:
            break  # a new process measures from the start
        number += 1
    results.send(None)


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_case(seed: int, number: int, *, debug: bool = False) -> Case:
    """Damage a fixture and open it."""
    dice = random.Random(f"{seed}:{number}")
    name = dice.choice(list(SOURCES))
    format, options = SOURCES[name]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        folder = Path(root) / "model"
        shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("golden.npz"))
        what = " + ".join(mutate(dice, folder) for _ in range(dice.choice((1, 1, 1, 2))))
        path = _entry(folder, dice)
        started = time.process_time()
        outcome, failed = _outcome(path, dice.choice((format, None)), Options(**options), debug)
        seconds = time.process_time() - started
    if seconds > MAX_SECONDS and not failed:
        outcome, failed = f"slow: {seconds:.1f} s", True
    return Case(number, f"{name}, {what}", outcome, seconds, failed)


def _entry(folder: Path, dice: random.Random) -> Path:
    """The path to open: the directory, or the only kind of file that some formats have."""
    files = sorted(folder.glob("gpt2_*.bin"))
    return dice.choice(files) if files else folder


def _outcome(path: Path, format: str | None, options: Options, debug: bool) -> tuple[str, bool]:
    """The outcome of opening a checkpoint, as text, and whether it is not allowed."""
    late: list[bool] = []
    try:
        with _timer(late):
            _use(path, format, options)
    except GptConvertError as error:
        if debug:
            traceback.print_exc()
        outcome, failed = f"exit {error.exit_code}", error.exit_code not in ALLOWED
        if isinstance(error, UnforeseenError):
            outcome, failed = f"unforeseen: {type(error.__cause__).__name__}: {str(error.__cause__)[:200]}", True
    except BaseException as error:  # Rust libraries raise panics that are not Exceptions
        if debug:
            traceback.print_exc()
        outcome, failed = f"escaped: {type(error).__name__}: {str(error)[:200]}", True
        if isinstance(error, KeyboardInterrupt):
            raise
    else:
        outcome, failed = "ok", False
    return ("slow: stopped by the timer", True) if late else (outcome, failed)


def _use(path: Path, format: str | None, options: Options) -> None:
    """Open a checkpoint, describe it, and read its small tensors and its tokenizer."""
    checkpoint = open_checkpoint(path, options, format=format)
    for weight in checkpoint.weights.values():
        if weight.nbytes <= MAX_READ:
            weight.read()
    with boundary(path, "a tokenizer"):
        tokenizer_files(checkpoint)
    if format is None:
        inspect(path, options)


@contextmanager
def _timer(late: list[bool]) -> Iterator[None]:
    """Stop the block after twice the budget; ``late`` is then not empty, whatever becomes of the exception."""

    def stop(number: int, frame: FrameType | None) -> None:
        late.append(True)
        raise _TooSlowError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 4 * MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
