"""SHA-256 of files while they are being written: read back, in a thread of its own, as far as they are final."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from gptconvert.errors import OutputError
from gptconvert.publish import fileops
from gptconvert.publish.source_reader import BLOCK_BYTES, StoppedError


@dataclass(frozen=True)
class _Range:
    """Bytes of a file that are final."""

    path: str
    start: int
    stop: int


class ReadBack:
    """Hashes files behind the one who writes them, each from front to back, one file after the other.

    A context manager: leaving it by an exception ends the thread.

    Args:
        stop: set by whoever fails first, here or elsewhere; then the thread ends.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._queue: SimpleQueue[_Range | None] = SimpleQueue()
        self._pool = ThreadPoolExecutor(1)
        self._hashing = self._pool.submit(self._follow)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop.set()
        self._queue.put(None)
        self._pool.shutdown()
        reason = self._hashing.exception()
        if isinstance(error, StoppedError) and reason is not None:
            raise reason from None

    def extend(self, path: str, start: int, stop: int) -> None:
        """Bytes ``start`` to ``stop`` of ``path`` are final; they follow those announced before."""
        self._queue.put(_Range(path, start, stop))

    def digests(self) -> dict[str, str]:
        """Path → hex digest of everything announced.

        Raises:
            OutputError: a file could not be read back.
            StoppedError: another thread failed.
        """
        self._queue.put(None)
        return self._hashing.result()

    def _follow(self) -> dict[str, str]:
        hashes: dict[str, str] = {}
        item = self._queue.get()
        while item is not None:
            path, sha = item.path, hashlib.sha256()
            with _reading(path, self._stop) as descriptor:
                while item is not None and item.path == path:
                    self._hash(descriptor, item, sha)
                    item = self._queue.get()
            hashes[path] = sha.hexdigest()
        return hashes

    def _hash(self, descriptor: int, item: _Range, sha: Any) -> None:
        offset = item.start
        while offset < item.stop:
            if self._stop.is_set():
                raise StoppedError
            data = fileops.read(descriptor, min(BLOCK_BYTES, item.stop - offset), offset)
            if not data:
                raise OSError(errno.EIO, "file became shorter")
            sha.update(data)
            offset += len(data)


@contextmanager
def _reading(path: str, stop: threading.Event) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        stop.set()
        raise OutputError(f"cannot be read back ({error.strerror})", path=path) from error
