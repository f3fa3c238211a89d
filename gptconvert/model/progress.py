"""How a long run reports what it is doing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: Starts a stage of so many steps (0: unknown); call the result with each number of steps done.
Stage = Callable[[str, int], Callable[[int], None]]


class Progress(Protocol):
    """Receives stages and steps; see ``gptconvert.cli.output.Progress``."""

    def stage(self, name: str, total: int = 0) -> None: ...
    def advance(self, count: int) -> None: ...


class Silent:
    """No progress."""

    def stage(self, name: str, total: int = 0) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""
