"""Hash and write streams of bytes: one thread fills blocks, three background threads consume them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection

from gptconvert.model.export import PlannedFile
from gptconvert.model.tensors import Segment
from gptconvert.publish.blocks import Block, BlockPool, Worker
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.sink import Sink
from gptconvert.publish.source_reader import SourceReader

Progress = Callable[[int], None]

#: Padding is written in pieces of this size.
_ZEROS = memoryview(bytes(1 << 16))


class BlockPipeline:
    """Three background threads: one hashes tensors, one hashes files, one writes.

    Args:
        directory: the output directory.
        stop: cancellation event; set when a thread fails.
        settings: the file system, and the number and size of blocks.
        progress: called in the filling thread with the number of bytes of each block.
        cached: whether the files will be read next.

    Attributes:
        sinks: the files begun, in order.
    """

    def __init__(
        self,
        directory: str,
        stop: threading.Event,
        settings: IoSettings,
        progress: Progress | None,
        *,
        cached: bool,
    ) -> None:
        self._directory, self._stop, self._settings = directory, stop, settings
        self._progress, self._cached = progress, cached
        self._pool = BlockPool(stop, settings)
        self._tensor_hashing, self._file_hashing, self._writing = (Worker(stop) for _ in range(3))
        self.sinks: list[Sink] = []

    def begin(self, file: PlannedFile) -> FileStream:
        """Begin the next file; returns the stream to write to."""
        sink = Sink(
            self._directory,
            file,
            SourceReader(self._stop, self._settings),
            cached=self._cached,
            settings=self._settings,
        )
        self.sinks.append(sink)
        self._writing.submit(sink.open)
        return FileStream(self, sink)

    def acquire(self, offset: int) -> Block:
        """Wait for a free block.

        Raises:
            StoppedError: a thread failed.
        """
        return self._pool.acquire(offset)

    def submit(self, block: Block, sink: Sink) -> None:
        """Hand a filled block to the three threads."""
        block.share(3)
        self._tensor_hashing.submit(lambda: _update_digests(block), block)
        self._file_hashing.submit(lambda: sink.digest.update(block.data), block)
        self._writing.submit(lambda: sink.write(block), block)
        if self._progress is not None:
            self._progress(block.used)

    def end(self, sink: Sink) -> None:
        """Sync and close a file once its blocks are written."""
        self._writing.submit(sink.close)

    def close(self) -> None:
        """Wait for the threads, then close incomplete files."""
        for worker in (self._tensor_hashing, self._file_hashing, self._writing):
            worker.close()
        for sink in self.sinks:
            sink.abandon()

    def error(self) -> BaseException | None:
        """The error that a thread raised."""
        errors = (worker.error for worker in (self._writing, self._file_hashing, self._tensor_hashing))
        return next((error for error in errors if error is not None), None)


class FileStream:
    """The bytes of one file, in order, split into blocks.

    Attributes:
        sink: the file.
        position: number of bytes so far.
    """

    def __init__(self, pipeline: BlockPipeline, sink: Sink) -> None:
        self._pipeline, self.sink = pipeline, sink
        self._block: Block | None = None
        self.position = 0

    def write(
        self, data: bytes | memoryview, source: Segment | None = None, digests: Collection[hashlib._Hash] = ()
    ) -> None:
        """Append bytes.

        Args:
            data: the bytes.
            source: source segment with the same bytes, which the kernel can copy.
            digests: hashes to update with the bytes.
        """
        rest = memoryview(data)
        while rest:
            if self._block is None:
                self._block = self._pipeline.acquire(self.position)
            n = self._block.append(rest, source, digests)
            rest, self.position = rest[n:], self.position + n
            if source is not None:
                source = Segment(source.path, source.offset + n, source.nbytes - n)
            if self._block.full:
                self._flush()

    def pad(self, position: int) -> None:
        """Append zeros up to ``position``."""
        while self.position < position:
            self.write(_ZEROS[: position - self.position])

    def close(self) -> None:
        """Submit the last block and complete the file."""
        self._flush()
        self._pipeline.end(self.sink)

    def _flush(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            self._pipeline.submit(block, self.sink)


def _update_digests(block: Block) -> None:
    for start, end, digest in block.digests:
        digest.update(block.data[start:end])
