"""The errors that users may see. Each has a message, a location, expected and found values, a hint and an exit code.

Exit codes are a contract (docs/cli.md): 2 usage, 3 input invalid or corrupt, 4 unsupported feature,
5 verification failed, 6 output I/O, 7 unsafe input refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

#: The likely cause of a truncated file, and the hint about it.
UNFINISHED = "the download or copy did not finish"
FETCH_AGAIN = f"{UNFINISHED}: fetch the file again"


#: Optional packages, by extra of the distribution. Hints name the packages, not the extra: that also works in a
#: checkout that was never installed.
EXTRAS: dict[str, tuple[str, ...]] = {
    "tf": ("tensorflow>=2.18",),
    "h5": ("h5py>=3.11",),
    "flax": ("msgpack>=1.1",),
    "gguf": ("gguf>=0.19", "xllamacpp>=2026.10"),
    "tflite": ("ai-edge-litert>=2.3",),
    "report": ("matplotlib>=3.9",),
    "cluster": ("dask[distributed]>=2024.5",),
    "remote": ("fsspec>=2024.5",),
    "gpt1-tokenizer": ("ftfy>=6.1", "spacy>=3.7"),
}


def install_hint(extra: str) -> str:
    """The command that installs the packages of an extra."""
    return "pip install " + " ".join(f"'{requirement}'" for requirement in EXTRAS[extra])


#: Longest line of a message, in characters: names come from untrusted files.
MAX_LINE = 4000


def printable(text: object) -> str:
    """``text`` on one line of limited length, with control characters escaped: names come from untrusted files."""
    whole = str(text)
    shown = whole if len(whole) <= MAX_LINE else f"{whole[: MAX_LINE - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def short_repr(value: object, most: int = 80) -> str:
    """``repr`` of a value, cut to ``most`` characters: values in untrusted files may be huge."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


class GptConvertError(Exception):
    """Base class of every error raised on purpose.

    Args:
        message: what is wrong, in one sentence without the file name.
        path: the file or directory at fault.
        item: the tensor, configuration key or option at fault.
        expected: what should have been there.
        found: what was there.
        hint: what to do next.
    """

    exit_code: ClassVar[int] = 3
    kind: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        item: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else os.fspath(path)
        self.item = item
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.hint = hint

    def __str__(self) -> str:
        where = "".join(f"{printable(part)}: " for part in (self.path, self.item) if part is not None)
        lines = where + "\n".join(printable(line) for line in self.message.splitlines())
        if self.expected is not None:
            lines += f"; expected {printable(self.expected)}"
        if self.found is not None:
            lines += f"{'; found' if self.expected is None else ', found'} {printable(self.found)}"
        return lines

    def as_dict(self) -> dict[str, object]:
        """The fields for ``--json``."""
        return {
            "kind": self.kind,
            "exit_code": self.exit_code,
            "message": self.message,
            "file": self.path,
            "tensor": self.item,  # the key is fixed by the schema
            "expected": self.expected,
            "found": self.found,
            "hint": self.hint,
        }


class UsageError(GptConvertError):
    """The request is invalid (a wrong option value, a missing source)."""

    exit_code = 2
    kind = "usage"


class InputError(GptConvertError):
    """The checkpoint is invalid, incomplete or corrupt."""

    exit_code = 3
    kind = "input"


class UnforeseenError(InputError):
    """Reading failed with an exception that the reader does not foresee: the cause of this error."""


class UnsupportedError(GptConvertError):
    """The checkpoint is valid, but needs a feature that is not implemented."""

    exit_code = 4
    kind = "unsupported"


class VerificationError(GptConvertError):
    """The artifact does not compute what the checkpoint computes. Nothing is published."""

    exit_code = 5
    kind = "verification"
    #: The report as plain values, for ``--json``.
    report: dict[str, object] | None = None
    #: What was converted, with digests, as in manifest.json; None if unknown.
    source: dict[str, object] | None = None


class OutputError(GptConvertError):
    """The output could not be written."""

    exit_code = 6
    kind = "output"


class UnsafeInputError(GptConvertError):
    """The input attempts what a checkpoint must not do: run code, leave its directory, expand without bound."""

    exit_code = 7
    kind = "unsafe"


def reason(error: Exception) -> str:
    """Why an operation failed: ``No space left on device``."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def reason_and_file(error: OSError, shown: str | None = None) -> str:
    """:func:`reason`, with the file at fault unless it is ``shown`` already."""
    name = None if error.filename is None else os.fsdecode(error.filename)
    return reason(error) if name in (None, shown) else f"{reason(error)}: {name}"


def is_unreadable(error: GptConvertError) -> bool:
    """Whether the operating system could not read a file that exists: a fault of the machine, not of the file."""
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)


@contextmanager
def os_errors_as(kind: type[GptConvertError], what: str, path: str) -> Iterator[None]:
    """Convert :class:`OSError` to an error of ours.

    Args:
        kind: :class:`InputError` or :class:`OutputError`.
        what: the operation that failed: "cannot be read".
        path: the file or directory that the user knows.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{what} ({reason_and_file(error, path)})", path=path) from error
