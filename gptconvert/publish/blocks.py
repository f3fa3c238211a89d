"""Bytes on their way to the disk, in a fixed set of page-aligned buffers: memory is bounded whatever is written."""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

from gptconvert.model.tensors import Segment
from gptconvert.publish.source_reader import StoppedError

#: Bytes of one block: large enough for the disk, small enough that Ctrl-C and the progress bar keep up.
BLOCK_BYTES = 4 << 20
#: Blocks under way at once: one being filled, two being used, and some that even out the speeds of the threads.
BLOCKS = 6


class Block:
    """A run of bytes of one file.

    Attributes:
        offset: where it starts in the file.
        used: how many bytes of it are filled.
        copies: (position in the block, where the same bytes lie in a source file).
        hashed: (first, last + 1, what is to see these bytes).
    """

    def __init__(self, buffer: mmap.mmap, free: SimpleQueue[mmap.mmap], offset: int) -> None:
        self._buffer, self._free = buffer, free
        self._view = memoryview(buffer)
        self._users, self._lock = 0, threading.Lock()
        self.offset, self.used = offset, 0
        self.copies: list[tuple[int, Segment]] = []
        self.hashed: list[tuple[int, int, hashlib._Hash]] = []

    @property
    def room(self) -> memoryview:
        """What can still be filled."""
        return self._view[self.used :]

    @property
    def data(self) -> memoryview:
        """What is filled."""
        return self._view[: self.used]

    def padded(self, alignment: int) -> memoryview:
        """What is filled, and zeros up to a multiple of ``alignment``."""
        end = self.used + -self.used % alignment
        self._view[self.used : end] = bytes(end - self.used)
        return self._view[:end]

    def filled(self, nbytes: int, source: Segment | None = None, hashes: Iterable[hashlib._Hash] = ()) -> None:
        """``nbytes`` more are filled, with the bytes of ``source``; ``hashes`` are to see them."""
        self.hashed += [(self.used, self.used + nbytes, sha) for sha in hashes]
        if source is not None:
            at, last = self.copies[-1] if self.copies else (0, None)
            ends = None if last is None else (last.path, last.end, at + last.nbytes)
            if last is not None and ends == (source.path, source.offset, self.used):
                self.copies[-1] = at, Segment(last.path, last.offset, last.nbytes + source.nbytes)
            else:
                self.copies.append((self.used, source))
        self.used += nbytes

    def shared(self, users: int) -> None:
        """From here on it belongs to ``users`` threads; each releases it once."""
        self._users = users

    def release(self) -> None:
        """A user is done with it; the last one gives the buffer back."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self._view.release()
        self._free.put(self._buffer)


class Blocks:
    """The buffers.

    Args:
        stop: set by whoever fails; then no more are handed out.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(BLOCKS):
            self._free.put(mmap.mmap(-1, BLOCK_BYTES))  # takes memory when it is first filled

    def take(self, offset: int) -> Block:
        """An empty block, as soon as one is free.

        Raises:
            StoppedError: another thread failed.
        """
        while not self._stop.is_set():
            try:
                return Block(self._free.get(timeout=0.1), self._free, offset)
            except Empty:
                continue
        raise StoppedError


class Worker:
    """A thread that does what it is handed, in order; after a failure, its own or another's, nothing more.

    Args:
        stop: set when something fails here.

    Attributes:
        error: what failed here.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop, self._pool = stop, ThreadPoolExecutor(1)
        self.error: BaseException | None = None

    def hand(self, work: Callable[[], None], block: Block | None = None) -> None:
        """Do ``work`` after what came before; ``block`` is released then, whatever happens."""
        self._pool.submit(self._do, work, block)

    def close(self) -> None:
        """Wait until everything is done."""
        self._pool.shutdown()

    def _do(self, work: Callable[[], None], block: Block | None) -> None:
        try:
            if not self._stop.is_set():
                work()
        except BaseException as error:
            self.error = error
            self._stop.set()
        finally:
            if block is not None:
                block.release()
