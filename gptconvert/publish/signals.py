"""Raise SIGINT, SIGTERM and SIGHUP as exceptions, so that open files and staging directories are cleaned up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: SIGHUP: a closed terminal or a dropped connection. Windows has none.
SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


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

    raising_depth = 0
    hold_depth = 0
    pending: int | None = None
    raised: int | None = None
    finished: int | None = None


def _handle(signum: int, frame: FrameType | None) -> None:
    if _State.finished is not None:
        os._exit(_State.finished)
    if _State.raised is not None:
        return  # already unwinding: a second Ctrl-C must not interrupt the cleanup
    if _State.hold_depth:
        _State.pending = _State.pending or signum
        return
    _State.raised = signum
    raise Interrupted(signum)


def handled() -> list[signal.Signals]:
    """The signals to handle: those that are ignored (``nohup``, background jobs) stay ignored."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def install() -> None:
    """Raise :class:`Interrupted`, once, on a signal, from now until the process ends."""
    for number in handled():
        signal.signal(number, _handle)
    _State.raising_depth += 1
    _State.raised, _State.pending, _State.finished = None, None, None


def finish(code: int) -> None:
    """From now on, a signal ends the process at once with the exit code of its work, which is done."""
    _State.finished = code


@contextmanager
def raising() -> Iterator[None]:
    """Raise :class:`Interrupted`, once, on a signal inside the context; restore the handlers afterwards.

    Inside another such context, or after :func:`install`, it changes nothing. The same outside the main thread, where
    Python does not run handlers.
    """
    if threading.current_thread() is not threading.main_thread() or _State.raising_depth:
        yield
        return
    before = {number: signal.getsignal(number) for number in handled()}
    try:
        install()
        yield
    finally:
        _State.raising_depth = 0
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


def check() -> None:
    """Raise again the signal that was raised before, if any: a library or a finalizer may have swallowed it.

    Raises:
        Interrupted: a signal was raised inside the current context.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and _State.raising_depth and _State.raised is not None:
        raise Interrupted(_State.raised)
