"""Progress reporting for long runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: Starts a stage with a number of steps (0 if unknown); the result is called with each number of steps completed.
Stage = Callable[[str, int], Callable[[int], None]]


class Progress(Protocol):
    """Receives stages and steps; see ``gptconvert.cli.output.Progress``."""

    def stage(self, name: str, total: int = 0) -> None: ...
    def advance(self, count: int) -> None: ...


class Silent:
    """Discards all progress."""

    def stage(self, name: str, total: int = 0) -> None:
        """Do nothing."""

    def advance(self, count: int) -> None:
        """Do nothing."""
