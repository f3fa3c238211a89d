"""Temporary directories that outlive no run: those of killed runs are found by their locks, and removed."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress

PREFIX = "gptconvert-scratch-"


class Scratch:
    """A temporary directory, removed at the end; use as a context manager, or call :meth:`remove`.

    It is locked while in use. The kernel releases the lock when the process ends, however it ends, and
    :func:`remove_abandoned` removes directories without a lock.

    Attributes:
        path: the directory.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self) -> None:
        remove_abandoned()
        while True:
            self.path = tempfile.mkdtemp(prefix=PREFIX)
            self._descriptor = _lock(self.path)
            # Before it was locked, another run may have taken it for abandoned.
            if self._descriptor is None or os.path.isdir(self.path):
                return
            os.close(self._descriptor)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the directory and what is in it; what cannot be removed now is tried again by later runs."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with suppress(OSError):
                os.close(descriptor)


def remove_abandoned() -> None:
    """Remove this user's scratch directories that no process uses."""
    with suppress(OSError):
        root = tempfile.gettempdir()
        for name in os.listdir(root):
            if name.startswith(PREFIX):
                _remove_abandoned(os.path.join(root, name))


def _remove_abandoned(path: str) -> None:
    descriptor = _lock(path)
    if descriptor is None:
        return
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(path: str) -> int | None:
    """Lock a directory; returns the descriptor that holds the lock, or None if another process does."""
    import fcntl

    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
    return None
