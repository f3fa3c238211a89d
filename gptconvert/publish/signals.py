"""Raise SIGINT, SIGTERM and SIGHUP as exceptions, so that open files and staging directories are cleaned up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: SIGHUP: a closed terminal or a dropped connection. Windows has none.
_SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(SystemExit):
    """A signal interrupted the program. If uncaught, the process exits with the shell's code for the signal.

    Attributes:
        signum: the signal.
        code: 128 + signum: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class _State:
    """State of the handler, which runs only in the main thread, so no lock is needed."""

    hold_depth = 0
    pending: int | None = None
    raised = False


def _handle(signum: int, frame: FrameType | None) -> None:
    if _State.raised:
        return  # already unwinding: a second Ctrl-C must not interrupt the cleanup
    if _State.hold_depth:
        _State.pending = _State.pending or signum
        return
    _State.raised = True
    raise Interrupted(signum)


@contextmanager
def raising() -> Iterator[None]:
    """Raise :class:`Interrupted`, once, on one of these signals inside the context; restore the handlers afterwards.

    Ignored signals (``nohup``, background jobs) stay ignored. Does nothing outside the main thread, where Python does
    not run handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _handle) for number in handled}
    _State.raised, _State.pending = False, None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Delay signals until the end of the context, so that they cannot separate steps that belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.hold_depth += 1
    try:
        yield
    finally:
        _State.hold_depth -= 1
    if not _State.hold_depth and _State.pending is not None:
        signum, _State.pending = _State.pending, None
        _handle(signum, None)
