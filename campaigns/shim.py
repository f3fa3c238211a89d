"""Make the calls to the operating system that gptconvert makes fail, in this process.

A shim replaces the functions of ``os``, ``fcntl``, ``mmap`` and ``open``, and lets those calls fail that gptconvert
makes, or the standard library for it.
"""

from __future__ import annotations

import builtins
import fcntl
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

#: module → names of the functions to replace.
FUNCTIONS: dict[Any, str] = {
    os: "stat lstat statvfs mkdir open close fstat fsync pread preadv pwrite ftruncate posix_fallocate sendfile "
    "copy_file_range rename unlink rmdir scandir listdir",
    fcntl: "flock fcntl",
    mmap: "mmap",
    builtins: "open",
}
#: Modules that call the functions for gptconvert.
CALLERS = ("gptconvert", "genericpath", "posixpath", "shutil")


class Call(NamedTuple):
    """A call.

    Attributes:
        name: of the function.
        path: the file; "" if unknown.
        line: module and line that call it.
    """

    name: str
    path: str
    line: str


@dataclass
class Shim:
    """Makes calls fail.

    Attributes:
        fails: number of a call → whether it fails.
        code: error number.
        calls: so far.
        failed: the calls that failed.
    """

    fails: Callable[[int], bool] = lambda number: False
    code: int = 0
    calls: list[Call] = field(default_factory=list)
    failed: list[Call] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the functions."""
        with ExitStack() as stack:
            for module, names in FUNCTIONS.items():
                for name in names.split():
                    stack.enter_context(mock.patch.object(module, name, self._wrap(name, getattr(module, name))))
            yield

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            module = frame.f_globals.get("__name__", "")
            if module.split(".")[0] not in CALLERS or (name == "mmap" and args[0] == -1):
                return function(*args, **kwargs)
            made = Call(name, _path_of(args[0]), f"{module}:{frame.f_lineno}")
            with self._lock:
                self.calls.append(made)
                fails = self.fails(len(self.calls) - 1)
                self.failed += [made] if fails else []
            if not fails:
                return function(*args, **kwargs)
            if name == "close":  # Linux closes the file even if it reports an error
                function(*args)
            raise OSError(self.code, os.strerror(self.code), args[0] if isinstance(args[0], str) else None)

        return call


def _path_of(argument: object) -> str:
    if isinstance(argument, int):
        with suppress(OSError):
            return os.readlink(f"/proc/self/fd/{argument}").removesuffix(" (deleted)")
        return ""
    return os.path.abspath(os.fsdecode(argument)) if isinstance(argument, str | bytes) else ""
