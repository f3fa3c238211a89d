"""How campaigns run the cases that read damaged files, and judge their outcomes.

Allowed are success and a :class:`GptConvertError` of exit code 2, 3, 4 or 7, within a budget of processor time and
memory. An error that only the boundary of the sources caught is a failure too: its cause needs a message of its own.
Cases run in a child process, so that a crash is found too and is the outcome of its case.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from types import FrameType

from campaigns.report import Case
from gptconvert.errors import GptConvertError, UnforeseenError

#: Exit codes that damaged input may have. 2: the damage makes an option necessary.
ALLOWED = frozenset((2, 3, 4, 7))
#: Processor time of one case.
MAX_SECONDS = 5.0
#: Memory in MiB that one process may take, over what it takes after the imports.
MAX_MEMORY = 400.0
#: Seconds after which a child that has not finished its case is killed: C code does not see the timer.
HANGS = 90.0
#: Where files of cases are written: in memory, if the system can.
MEMORY_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None
#: Cases that one child runs.
PER_CHILD = 2000

RunCase = Callable[[int, int], Case]


class _TooSlowError(BaseException):
    """Raised by the timer in the middle of a case."""


def outcome_of(use: Callable[[], object], *, debug: bool = False, refusals: tuple[type[Exception], ...] = ()) -> str:
    """Run ``use``; its outcome as text.

    Args:
        use: reads the input.
        debug: whether to print the traceback of an error.
        refusals: further exceptions that are allowed, of parsers whose callers turn them into ours.
    """
    late: list[bool] = []
    outcome = "ok"
    try:
        with _timer(late):
            use()
    except GptConvertError as error:
        outcome = f"exit {error.exit_code}"
        if isinstance(error, UnforeseenError):
            outcome = f"unforeseen: {type(error.__cause__).__name__}: {str(error.__cause__)[:200]}"
        _show(debug)
    except refusals:
        outcome = "exit 3"
        _show(debug)
    except BaseException as error:  # Rust libraries raise panics that are not Exceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"escaped: {type(error).__name__}: {str(error)[:200]}"
        _show(debug)
    return "slow: stopped by the timer" if late else outcome


def is_allowed(outcome: str) -> bool:
    """Whether damaged input may have this outcome."""
    return outcome == "ok" or outcome in {f"exit {code}" for code in ALLOWED}


def _show(debug: bool) -> None:
    if debug:
        traceback.print_exc()


@contextmanager
def _timer(late: list[bool]) -> Iterator[None]:
    """Stop the block after four times the budget; ``late`` is then not empty, whatever becomes of the exception."""

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


def in_child(run_case: RunCase, seed: int, first: int, end: float, memory: float = MAX_MEMORY) -> Iterator[Case]:
    """The outcomes of cases that one child process runs, until the time is over or it dies.

    Args:
        run_case: runs the case of a seed and a number.
        seed: of the cases.
        first: number of the first case.
        end: value of ``time.monotonic()`` from which on no case begins.
        memory: that the child may take over its memory at the start, in MiB.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(run_case, seed, first, end, memory, there))
    child.start()
    there.close()
    running = first
    try:
        while here.poll(HANGS):
            if (message := here.recv()) is None:
                child.join()
                return
            yield message
            running = message.number + 1
        child.kill()
        yield Case(running, f"case {running}", f"hangs: killed after {HANGS:.0f} s", HANGS, failed=True)
    except EOFError:
        child.join()
        yield Case(running, f"case {running}", f"killed: exit code {child.exitcode}", 0.0, failed=True)
    finally:  # also when the caller stops early
        child.kill()
        child.join()


def _child(run_case: RunCase, seed: int, first: int, end: float, memory: float, results: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    base, number, used = _peak_memory(), first, 0.0
    while time.monotonic() < end and number < first + PER_CHILD and used <= memory:
        case, used = run_case(seed, number), _peak_memory() - base
        if used > memory and not case.failed:
            case = replace(case, outcome=f"memory: {used:.0f} MiB", failed=True)
        results.send(case)
        number += 1  # after too much memory, a new process measures from the start
    results.send(None)


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
