"""SIGINT and SIGTERM as exceptions, so that everything opened and staged is cleaned up on the way out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal asked the program to stop; uncaught, the process exits with the shell's code for it.

    Attributes:
        signum: the signal.
        code: 128 + signum: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class _State:
    """Between handler and main thread; handlers run in the main thread only, so no lock is needed."""

    holding = 0
    waiting: int | None = None
    raised = False


def _handle(signum: int, frame: FrameType | None) -> None:
    if _State.raised:
        return  # already unwinding: a second Ctrl-C must not interrupt the cleaning up
    if _State.holding:
        _State.waiting = _State.waiting or signum
        return
    _State.raised = True
    raise Interrupted(signum)


@contextmanager
def raising() -> Iterator[None]:
    """Within: SIGINT and SIGTERM raise :class:`Interrupted`, once. Afterwards: handlers as they were.

    A signal that is ignored (``nohup``, background jobs) stays ignored. Outside the main thread, where Python
    delivers no signals, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _handle) for number in heeded}
    _State.raised, _State.waiting = False, None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Within: a signal waits for the end, so that two steps which belong together both happen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.holding += 1
    try:
        yield
    finally:
        _State.holding -= 1
    if not _State.holding and _State.waiting is not None:
        signum, _State.waiting = _State.waiting, None
        _handle(signum, None)
