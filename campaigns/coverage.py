"""Which jumps between lines of gptconvert a call takes: the guide of the fuzzing campaign."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import gptconvert

PACKAGE = str(Path(gptconvert.__file__).parent)
#: A file, a line of it, and the line that ran next in the same call.
Arc = tuple[str, int, int]


@contextmanager
def traced(arcs: set[Arc]) -> Iterator[None]:
    """Add the arcs that the block runs, in this thread. Tracing makes it several times as slow."""

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        return _on_line(arcs, code) if code.co_filename.startswith(PACKAGE) else None

    previous = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(previous)


def _on_line(arcs: set[Arc], code: CodeType) -> Callable[[FrameType, str, Any], Any]:
    """The trace function of one call."""
    file, last = code.co_filename[len(PACKAGE) + 1 :], code.co_firstlineno

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal last
        if event == "line":
            arcs.add((file, last, frame.f_lineno))
            last = frame.f_lineno
        return on_line

    return on_line
