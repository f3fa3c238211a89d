"""Errors caused by limits of the machine or the process: memory, open files, threads."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from gptconvert.errors import GptConvertError, OutputError

FILES = (errno.EMFILE, errno.ENFILE)
#: Messages of libraries that have no class for exhausted memory, in lower case.
MEMORY_MESSAGES = (
    "allocate memory",  # PyTorch, the C library
    "bad_alloc",  # C++
    "bad allocation",  # onnxruntime
    "failed to map segment",  # the dynamic linker
    "can't start new thread",  # Python: a thread needs memory for its stack
    "out of memory",
)


def limit_error(error: BaseException) -> OutputError | None:
    """The error for the limit that caused ``error``; None if another cause did.

    An :class:`OutputError` keeps its message, which may say that the output is published, and gets another hint.
    """
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in FILES:
            message, found = "too many open files", _limit("RLIMIT_NOFILE", "ulimit -n")
            hint = "raise the limit: ulimit -n"
        elif _is_memory(cause):
            message, found = "out of memory", _limit("RLIMIT_AS", "ulimit -v")
            hint = "close other programs, raise the limit, or use a machine with more memory"
        else:
            continue
        if isinstance(error, OutputError):
            error.hint = ": ".join(filter(None, (message, found, hint)))
            return error
        path = error.path if isinstance(error, GptConvertError) else _path_of(cause)
        return OutputError(message, path=path, found=found, hint=hint)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, unless it is one of ours, and what caused it."""
    if not isinstance(error, GptConvertError):
        yield error
    elif error.__cause__ is not None and not isinstance(error.__cause__, MemoryError):
        # Not MemoryError: damaged files state sizes that no memory can hold.
        yield from _causes(error.__cause__)


def _path_of(error: BaseException) -> str | None:
    name = error.filename if isinstance(error, OSError) else None
    return None if name is None else os.fsdecode(name)


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower()
    return any(message in text for message in MEMORY_MESSAGES)


def _limit(name: str, shown: str) -> str | None:
    """A limit of this process; None if there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    value = resource.getrlimit(getattr(resource, name))[0]
    return None if value == resource.RLIM_INFINITY else f"a limit of {value} ({shown})"
