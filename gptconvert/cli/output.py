"""Output: tables or one JSON object on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

import click

from gptconvert.errors import OutputError, printable
from gptconvert.model.schema import SCHEMA_VERSION

#: Windows has no such signal.
SIGPIPE = 13


class StreamError(OutputError):
    """Stdout cannot be written: the result of the command is lost."""


#: Names of the standard streams whose text was lost.
lost: set[str] = set()


def print_json(fields: Mapping[str, object]) -> None:
    """Print the object of ``--json``, in ASCII, which works in any encoding and for file names that are not UTF-8."""
    emit(json.dumps({"schema_version": SCHEMA_VERSION, **fields}, indent=2))


def print_json_line(fields: Mapping[str, object]) -> None:
    """:func:`print_json` on one line, for one of many results."""
    emit(json.dumps({"schema_version": SCHEMA_VERSION, **fields}))


def emit(text: str = "", *, nl: bool = True) -> None:
    """Print a part of the result on stdout. If stdout was closed before the program began, add it to :data:`lost`.

    Raises:
        StreamError: stdout cannot be written, as on a full disk.
        SystemExit: stdout is a pipe whose reader has ended, as in ``… | head``. Ends the program as SIGPIPE would.
    """
    if sys.stdout is None or getattr(sys.stdout, "name", None) == os.devnull:  # see gptconvert.supervisor
        lost.add("stdout")
        return
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        discard(sys.stdout)
        raise SystemExit(128 + SIGPIPE) from None
    except OSError as error:
        discard(sys.stdout)
        hint = "only the text or JSON for stdout is lost; the rest of the command is done"
        raise StreamError(f"stdout cannot be written ({error.strerror})", hint=hint) from error


def emit_error(text: str, color: bool | None = None) -> None:
    """Print a line on stderr. If that fails, add stderr to :data:`lost`; the command goes on."""
    try:
        click.echo(text, err=True, color=color)
    except OSError:
        discard(sys.stderr)
        lost.add("stderr")


def discard(stream: TextIO) -> None:
    """Lead a broken stream nowhere, so that what it still holds does not fail at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def flush() -> None:
    """Flush the standard streams now: at exit, a failure would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            discard(stream)


def note(text: str, quiet: bool = False) -> None:
    """Print one sentence on stderr unless ``quiet``."""
    if not quiet:
        emit_error(f"note: {printable(text)}")


def human_bytes(count: float) -> str:
    """Format a size: 1234567 → ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def table(rows: Sequence[Sequence[str]], indent: str = "  ", right: Iterable[int] = ()) -> str:
    """Align columns; those in ``right`` to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = set(right)

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if i in aligned else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return (indent + "  ".join(cells)).rstrip()

    return "\n".join(line(row) for row in rows)


#: Progress bars that leave room for the bar in 80 columns.
BYTES = "{desc} {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt}B, {rate_fmt}"
STEPS = "{desc} |{bar}| {n} of {total}"
#: A stage with a larger total counts bytes, not steps (layers, probes).
MAX_STEPS = 10_000


class Progress:
    """A progress bar in bytes, shown only on a terminal."""

    def __init__(self, quiet: bool) -> None:
        self.shown = not quiet and sys.stderr.isatty()
        self.bar: Any = None

    def stage(self, name: str, total: int = 0) -> None:
        """Begin a stage of ``total`` bytes or steps (0 if unknown)."""
        self.close()
        if self.shown:
            from tqdm import tqdm

            self.bar = tqdm(
                desc=name,
                total=total or None,
                unit="B",
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
                bar_format=BYTES if total > MAX_STEPS else STEPS if total else "{desc} [{elapsed}]",
                file=sys.stderr,
            )

    def advance(self, count: int) -> None:
        """Add ``count`` bytes or steps to the current stage."""
        if self.bar is not None:
            self.bar.update(count)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
