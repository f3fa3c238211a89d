"""Write planned files at the speed of one copy, in the memory of a few blocks.

The calling thread reads or computes each placed tensor, feeds its checks (:mod:`gptconvert.publish.source_scan`) and
fills blocks. Three background threads hash and write the blocks (:mod:`gptconvert.publish.block_pipeline`).

Files are synced to disk before they are published, so the page cache saves no time, and filling it costs more
processor time than everything else (docs/performance.md): large files are written with direct I/O. Small files that
will be read next are copied by the kernel and stay cached.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from gptconvert.kernels.cast import with_fast_casts
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Placed, PlannedFile
from gptconvert.model.tensors import Segment, merge_segments
from gptconvert.publish.block_pipeline import BlockPipeline, FileStream, Progress
from gptconvert.publish.consumers import TensorConsumers
from gptconvert.publish.deferred import DeferredFiles
from gptconvert.publish.finite import checked_chunks, raw_bytes
from gptconvert.publish.io_settings import DEFAULT_IO, IoSettings
from gptconvert.publish.sink import Sink
from gptconvert.publish.source_reader import FileDigest, SourceReader, StoppedError, digest_files
from gptconvert.publish.source_scan import SourceScan

Result = TypeVar("Result")


@dataclass(frozen=True)
class WrittenFile:
    """The record of a written file.

    Attributes:
        path: relative to the output directory, with forward slashes.
        nbytes: its size.
        sha256: of its bytes.
        computed: SHA-256 of each computed (not copied) tensor, by name; taken before writing.
    """

    path: str
    nbytes: int
    sha256: str
    computed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """The files that one run wrote, and the digests of everything it read.

    Attributes:
        files: in plan order.
        tensors: (file, tensor name) → SHA-256 of the tensor's bytes, taken before writing.
        sources: input file → size and digest.
        notes: for the user, one sentence each.
    """

    files: tuple[WrittenFile, ...]
    tensors: Mapping[tuple[str, str], str]
    sources: Mapping[str, FileDigest]
    notes: tuple[str, ...] = ()


def write_and_digest(
    directory: str,
    files: Sequence[PlannedFile],
    checkpoint: Checkpoint,
    progress: Progress | None = None,
    *,
    allow_nonfinite: bool = False,
    verified: bool = True,
    settings: IoSettings = DEFAULT_IO,
) -> Written:
    """Write ``files`` into ``directory`` and, in the same pass, check and hash the source.

    Args:
        directory: an existing directory without these files.
        files: the planned files.
        checkpoint: the source of the tensors.
        progress: called in this thread with the number of bytes of each block.
        allow_nonfinite: accept NaN and infinities.
        verified: whether the files will be verified next. If so, small files stay in the page cache, every tensor is
            hashed, and large inputs are hashed with SHA-256. Each of these two costs as much as hashing the files.
        settings: the file system and block sizes.

    Raises:
        OutputError: a file could not be written.
        InputError: a source file is damaged or cannot be read, or contains values that are not finite.
        UnsupportedError: a value does not fit the dtype it is cast to.
    """
    copies = {file.path: source for file in files if (source := copy_of(file)) is not None}
    others = [path for path in dict.fromkeys(checkpoint.source.files) if path not in copies.values()]
    placed = [(file.path, tensor) for file in files for tensor in file.tensors if verified]
    scan = SourceScan(checkpoint, [p.tensor for _, p in placed])
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool, _stopping(stop):
        writer = _Writer(directory, files, stop, settings, progress, scan, hash_tensors=verified, cached=verified)
        rest = pool.submit(_stopping_others, stop, partial(scan.run_unclaimed, stop, settings))
        digest = partial(digest_files, others, stop, thorough=verified, settings=settings)
        sources = pool.submit(_stopping_others, stop, digest)

        def check_source() -> tuple[str, ...]:
            rest.result()
            return scan.check_results(allow_nonfinite=allow_nonfinite)

        try:
            written = writer.write(check_source)
            notes, digests, found = check_source(), scan.digests(), sources.result()
        except StoppedError:
            error = _first_error((rest, sources))
            raise error from error.__cause__
        finally:
            stop.set()  # before the pool waits for its threads
    by_path = {file.path: file for file in written}
    return Written(
        tuple(written),
        {(path, p.name): digests.of(p.tensor) or by_path[path].computed[p.name] for path, p in placed},
        found | {source: FileDigest(by_path[path].nbytes, by_path[path].sha256) for path, source in copies.items()},
        notes,
    )


def write_files(
    directory: str,
    files: Iterable[PlannedFile],
    progress: Progress | None = None,
    *,
    stop: threading.Event | None = None,
    cached: bool = True,
    settings: IoSettings = DEFAULT_IO,
) -> list[WrittenFile]:
    """Write ``files`` into ``directory`` and sync them to disk.

    Args:
        directory: an existing directory without these files.
        files: the planned files; head and tensors do not overlap.
        progress: called with the number of bytes of each block.
        stop: cancellation event; once set, writing raises :class:`StoppedError`.
        cached: whether the files will be read next, so that small ones should stay in the page cache.
        settings: the file system and block sizes.

    Raises:
        OutputError: a file could not be written.
        InputError: a source file cannot be read, or is shorter than planned.
        UnsupportedError: a value does not fit the dtype it is cast to.
    """
    stop = stop or threading.Event()
    with _stopping(stop):
        return _Writer(directory, list(files), stop, settings, progress, cached=cached).write()


def copy_of(file: PlannedFile) -> str | None:
    """The source file of which ``file`` is a byte-for-byte copy according to the plan; None if it is not a copy."""
    segments: list[Segment] = []
    for placed in file.tensors:
        stored = placed.tensor.segments()
        if stored is None or placed.offset != sum(segment.nbytes for segment in segments):
            return None
        segments = list(merge_segments((*segments, *stored)))
    match segments:
        case [Segment(path, 0, nbytes)] if nbytes == file.nbytes and not file.head:
            with suppress(OSError):
                return path if os.path.getsize(path) == nbytes else None
    return None


class _Writer:
    """The thread that produces the bytes of every file."""

    def __init__(
        self,
        directory: str,
        files: Sequence[PlannedFile],
        stop: threading.Event,
        settings: IoSettings,
        progress: Progress | None,
        scan: SourceScan | None = None,
        *,
        hash_tensors: bool = True,
        cached: bool = True,
    ) -> None:
        self.files, self.stop, self.settings, self.hash_tensors = files, stop, settings, hash_tensors
        self.reader = SourceReader(stop, settings)
        self.pipeline = BlockPipeline(directory, stop, settings, progress, cached=cached)
        self.deferred = DeferredFiles(files, stop)
        # Claim all tasks before another thread runs the unclaimed ones.
        self.consumers = {
            id(placed): TensorConsumers(placed, scan, crc32c=self.deferred.need_checksums)
            for file in files
            for placed in file.tensors
        }

    def write(self, check_source: Callable[[], object] = lambda: None) -> list[WrittenFile]:
        """Write all files; returns their records in plan order.

        Args:
            check_source: called once every byte of the source has been read; raises if the source is damaged, without
                waiting for the deferred files.
        """
        try:
            with self.reader:
                for file in (file for file in self.files if file.finish is None):
                    self._write(file)
                check_source()
                for file, content in self.deferred.contents():
                    self._write(PlannedFile.of_bytes(file.path, content))
            self._close()
        except StoppedError:
            self._close()
            found = self._error() or StoppedError()
            raise found from found.__cause__
        except BaseException:
            self.stop.set()
            self._close()  # again if it was interrupted: a thread must not write to a directory that is being removed
            raise
        if (error := self._error()) is not None:
            raise error
        written = {sink.file.path: _record(sink) for sink in self.pipeline.sinks}
        return [written[file.path] for file in self.files]

    def _close(self) -> None:
        self.pipeline.close()
        self.deferred.close()

    def _error(self) -> BaseException | None:
        """The error that stopped the threads."""
        return self.pipeline.error() or self.deferred.error()

    def _write(self, file: PlannedFile) -> None:
        """Stream the bytes of one file."""
        stream = self.pipeline.begin(file)
        stream.write(file.head)
        for placed in file.tensors:
            stream.pad(placed.offset)
            consumers = self.consumers.pop(id(placed))
            if placed.tensor.segments() is None:
                self._compute(stream, placed, consumers)
            else:
                self._copy(stream, placed, consumers)
            if self.deferred.need_checksums:
                self.deferred.set_checksum(placed, consumers.crc32c)
        stream.pad(file.nbytes)
        stream.close()

    def _copy(self, stream: FileStream, placed: Placed, consumers: TensorConsumers) -> None:
        for segment in merge_segments(placed.tensor.segments() or ()):
            offset = segment.offset
            for data in self.reader.blocks((segment,), self.settings.copy_read_bytes):
                stream.write(data, Segment(segment.path, offset, len(data)), consumers.update(segment, data))
                offset += len(data)
            consumers.complete(segment)

    def _compute(self, stream: FileStream, placed: Placed, consumers: TensorConsumers) -> None:
        digests = {placed.name: hashlib.sha256()} if self.hash_tensors else {}
        stream.sink.tensor_digests |= digests
        for chunk in checked_chunks(placed.name, with_fast_casts(placed.tensor)):
            data = raw_bytes(chunk)
            consumers.update_crc32c(data)
            stream.write(data, digests=digests.values())


def _record(sink: Sink) -> WrittenFile:
    """The record of a complete file."""
    computed = {name: digest.hexdigest() for name, digest in sink.tensor_digests.items()}
    return WrittenFile(sink.file.path, sink.file.nbytes, sink.digest.hexdigest(), computed)


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Set the cancellation event if the context is interrupted: its threads would keep the process alive."""
    try:
        yield
    except BaseException:
        stop.set()
        raise


def _stopping_others(stop: threading.Event, task: Callable[[], Result]) -> Result:
    """Run ``task``; set the cancellation event if it fails."""
    try:
        return task()
    except BaseException:
        stop.set()
        raise


def _first_error(tasks: Iterable[Future[Any]]) -> BaseException:
    """The error that stopped the others."""
    errors = [error for task in tasks if (error := task.exception()) is not None]
    return next((error for error in errors if not isinstance(error, StoppedError)), StoppedError())
