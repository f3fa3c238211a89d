"""Progress reporting for long runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: Starts a stage with a number of steps (0 if unknown); the result is called with each number of steps completed.
Stage = Callable[[str, int], Callable[[int], None]]


class Progress(Protocol):
    """Receives the progress of a long run: an object with these two methods, passed as ``progress``.

    A run is a sequence of stages. ``stage`` is called in the thread that runs the conversion or verification,
    ``advance`` in other threads too, perhaps in several at once. Both should return quickly. An exception that one of
    them raises cancels the run: it reaches the caller, and nothing is published.
    """

    def stage(self, name: str, total: int = 0) -> None:
        """A stage begins, and the one before it has ended.

        Args:
            name: for the user, such as ``writing``, ``running onnxruntime, default options`` or ``publishing``.
            total: bytes (``writing``, ``comparing weights``) or steps (all others) in the stage; 0 if unknown.
        """

    def advance(self, count: int) -> None:
        """``count`` more bytes or steps of the current stage are done."""


class Silent:
    """Discards all progress."""

    def stage(self, name: str, total: int = 0) -> None:
        """Do nothing."""

    def advance(self, count: int) -> None:
        """Do nothing."""
