"""A record of what a supervising process must know if this one dies without unwinding.

The command line runs in a child process (:mod:`gptconvert.supervisor`), because memory-mapped input that is truncated
kills the process that reads it. Entries are lines of JSON in a file shared with the supervisor. Without a journal,
:func:`record` does nothing.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Journal:
    """The entries of one command.

    Attributes:
        descriptor: file shared with the supervisor; None to record in this process only.
        entries: (event, value), in order: ``reading`` (path → file state), ``staging`` (absolute output path),
            ``published`` (path as the user gave it, or address), ``ended`` (absolute output path), ``remote`` (what
            an upload has left on the hub so far, for the user), ``code`` (exit code, once all has been reported).
    """

    descriptor: int | None = None
    entries: list[tuple[str, Any]] = field(default_factory=list)

    def record(self, event: str, value: Any) -> None:
        """Append an entry. Failures are ignored: the journal matters only if something else fails too."""
        self.entries.append((event, value))
        if self.descriptor is not None:
            with suppress(OSError):
                os.write(self.descriptor, (json.dumps([event, value]) + "\n").encode())

    def values(self, event: str) -> list[Any]:
        """The values recorded for an event."""
        return [value for name, value in self.entries if name == event]


_current: Journal | None = None


def begin(descriptor: int | None = None) -> Journal:
    """Begin the journal of this process; a journal begun earlier is continued if it has the shared file."""
    global _current
    if _current is None or _current.descriptor is None or descriptor is not None:
        _current = Journal(descriptor)
    return _current


def record(event: str, value: Any) -> None:
    """Append an entry to the journal of this process, if it has one."""
    if _current is not None:
        _current.record(event, value)


def create() -> int:
    """A file without a name, to share with a child process; returns its descriptor."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):
            return os.memfd_create("gptconvert-journal")
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def read(descriptor: int) -> Journal:
    """The journal that another process wrote; an incomplete last line is left out."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]
    return Journal(entries=[(event, value) for event, value in map(json.loads, lines)])
