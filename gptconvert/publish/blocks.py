"""Blocks of bytes to write, in a fixed set of page-aligned buffers, which bounds memory use."""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

from gptconvert.model.tensors import Segment
from gptconvert.publish.io_settings import DEFAULT_IO, IoSettings
from gptconvert.publish.source_reader import StoppedError


class Block:
    """Consecutive bytes of one file.

    Attributes:
        offset: in the file.
        used: number of bytes filled.
        copies: (position in the block, source segment with the same bytes).
        digests: (start, end, hash to update with these bytes of the block).
    """

    def __init__(self, buffer: mmap.mmap, free: SimpleQueue[mmap.mmap], offset: int) -> None:
        self._buffer, self._free = buffer, free
        self._view = memoryview(buffer)
        self._users, self._lock = 0, threading.Lock()
        self.offset, self.used = offset, 0
        self.copies: list[tuple[int, Segment]] = []
        self.digests: list[tuple[int, int, hashlib._Hash]] = []

    @property
    def full(self) -> bool:
        """Whether no more bytes fit."""
        return self.used == len(self._view)

    @property
    def data(self) -> memoryview:
        """The filled bytes."""
        return self._view[: self.used]

    def padded(self, alignment: int) -> memoryview:
        """The filled bytes, padded with zeros to a multiple of ``alignment``."""
        end = self.used + -self.used % alignment
        self._view[self.used : end] = bytes(end - self.used)
        return self._view[:end]

    def append(self, data: memoryview, source: Segment | None = None, digests: Iterable[hashlib._Hash] = ()) -> int:
        """Append as much of ``data`` as fits; returns the number of bytes.

        Args:
            data: bytes.
            source: source segment that begins with the same bytes.
            digests: hashes to update with the appended bytes, later and in another thread.
        """
        start = self.used
        n = min(len(data), len(self._view) - start)
        self._view[start : start + n] = data[:n]
        self.used += n
        self.digests += [(start, self.used, digest) for digest in digests]
        if source is not None:
            self._add_copy(start, Segment(source.path, source.offset, n))
        return n

    def _add_copy(self, start: int, source: Segment) -> None:
        """Record the source of bytes, merged with the previous record if contiguous."""
        if self.copies:
            at, last = self.copies[-1]
            if (last.path, last.end, at + last.nbytes) == (source.path, source.offset, start):
                self.copies[-1] = at, Segment(last.path, last.offset, last.nbytes + source.nbytes)
                return
        self.copies.append((start, source))

    def share(self, users: int) -> None:
        """Share the block among ``users`` threads, each of which releases it once."""
        self._users = users

    def release(self) -> None:
        """End one thread's use; the last one returns the buffer to the pool."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self._view.release()
        self._free.put(self._buffer)


class BlockPool:
    """The free buffers.

    Args:
        stop: cancellation event; once set, :meth:`acquire` raises.
        settings: the number and size of blocks.
    """

    def __init__(self, stop: threading.Event, settings: IoSettings = DEFAULT_IO) -> None:
        self._stop = stop
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(settings.block_count):
            self._free.put(mmap.mmap(-1, settings.block_bytes))  # occupies memory only once filled

    def acquire(self, offset: int) -> Block:
        """Wait for a free buffer; returns an empty block.

        Raises:
            StoppedError: ``stop`` was set.
        """
        while not self._stop.is_set():
            try:
                return Block(self._free.get(timeout=0.1), self._free, offset)
            except Empty:
                continue
        raise StoppedError


class Worker:
    """A background thread that runs tasks in order, and skips the remaining ones after a failure in any thread.

    Args:
        stop: cancellation event; set when a task fails.

    Attributes:
        error: the error that a task raised.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop, self._pool = stop, ThreadPoolExecutor(1)
        self.error: BaseException | None = None

    def submit(self, task: Callable[[], None], block: Block | None = None) -> None:
        """Queue ``task``; ``block`` is released after it in any case."""
        self._pool.submit(self._run, task, block)

    def close(self) -> None:
        """Wait until every task has run or been skipped."""
        self._pool.shutdown()

    def _run(self, task: Callable[[], None], block: Block | None) -> None:
        try:
            if not self._stop.is_set():
                task()
        except BaseException as error:
            self.error = error
            self._stop.set()
        finally:
            if block is not None:
                block.release()
