"""Run the command line in a child process, and clean up and explain if it dies.

Input is memory-mapped. If another program truncates a mapped file, or its disk fails, the kernel kills the process
that reads it (SIGBUS), and no handler in Python can prevent that. Crashes of native libraries and the kernel's
out-of-memory killer end a process in the same way.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from gptconvert.errors import GptConvertError, InputError
from gptconvert.publish import journal, signals
from gptconvert.verify.heap import set_heap_limits

_PR_SET_PDEATHSIG = 1
#: Seconds that a child may take to clean up after a signal; then it is killed, and the parent cleans up.
GRACE = 15.0
_UNREADABLE = "the file was truncated while it was being read, or its disk failed"


def supervise(command: Callable[[], int]) -> None:
    """Run ``command`` in a child process, and exit with its code; in this process if no other can be started.

    Signals reach the child, which cleans up and decides the exit code. A process killed by a signal exits with
    128 + its number, or with 3 if reading its input killed it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # until the handlers are in place
    try:
        descriptor = journal.create()
        parent, child = os.getpid(), os.fork()
    except OSError:
        parent, child, descriptor = 0, 0, -1
    if child:
        code = _watch(child, descriptor)
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)
    if parent:
        _end_with(parent)
        set_heap_limits()
        journal.begin(descriptor)
    sys.exit(_run(command))


def _run(command: Callable[[], int]) -> int:
    """Run ``command``; signals raise :class:`~gptconvert.publish.signals.Interrupted`."""
    signals.install()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
        code = command()
    except signals.Interrupted as error:  # while the command line is imported
        code = 128 + error.signum
    signals.finish(code)
    journal.record("code", code)
    return code


def _watch(child: int, descriptor: int) -> int:
    """Forward signals to the child until it ends; returns the exit code."""
    forwarded: list[int] = []

    def forward(signum: int, _: object) -> None:
        if not forwarded:
            signal.setitimer(signal.ITIMER_REAL, GRACE)
        forwarded.append(signum)
        with suppress(ProcessLookupError):
            os.kill(child, signum)

    def end(_: int, __: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    for number in signals.handled():
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    # Once it is reaped, another process may get the child's number.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*signals.SIGNALS, signal.SIGALRM))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    record = journal.read(descriptor)
    left = _clean_up(record)
    if code >= 0:
        return code
    if record.values("code"):  # a second signal ended it after it had reported the first
        return int(record.values("code")[-1])
    from gptconvert.publish.scratch import remove_abandoned

    remove_abandoned()
    killed_for = forwarded[0] if forwarded and code == -signal.SIGKILL else -code
    return _explain(killed_for, record, left)


def _clean_up(record: journal.Journal) -> list[str]:
    """Remove what the child left beside its outputs; returns what could not be removed."""
    left = []
    for output in dict.fromkeys(record.values("staging")):
        if output not in record.values("ended"):
            from gptconvert.publish.workspace import clean_up_after

            left += clean_up_after(output)
    return left


def _explain(signum: int, record: journal.Journal, left: list[str]) -> int:
    """Report that a signal killed the child; returns the exit code."""
    from gptconvert.cli import interrupted, is_json, joined, outcome, report

    consequence = joined(outcome(record, sys.argv[1:]), *left)
    if signum in signals.SIGNALS:
        return interrupted(signum, consequence, is_json(sys.argv[1:]))
    name = signal.Signals(signum).name if signum in signal.Signals.__members__.values() else f"signal {signum}"
    error, code = GptConvertError(f"the process was killed by {name}", hint=consequence or None), 128 + signum
    if signum == signal.SIGBUS:
        error, code = _unreadable(record, consequence), InputError.exit_code
    elif signum == signal.SIGKILL:
        error.hint = joined("memory may have run out", consequence)
    report(error, code, is_json(sys.argv[1:]))
    return code


def _unreadable(record: journal.Journal, consequence: str) -> InputError:
    """The error for mapped input that could not be read: it names the files that changed."""
    from gptconvert.cli import joined
    from gptconvert.publish.manifest import changed_error, changed_since

    changed: list[str] = []
    with suppress(InputError):
        changed = [path for reading in record.values("reading") for path in changed_since(reading)]
    error = changed_error(changed) if changed else InputError(f"input cannot be read: {_UNREADABLE}")
    error.hint = joined(error.hint, consequence) or None
    return error


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is killed."""
    with suppress(ImportError, AttributeError, OSError):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
