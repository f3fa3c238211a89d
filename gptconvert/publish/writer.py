"""Planned files to bytes on disk, at the speed of one copy and in the memory of a few blocks.

Four threads hand blocks on (:mod:`gptconvert.publish.blocks`). The caller's reads the source or computes, and shows
every byte to those who want to know something of it (``source_scan``); the second hashes tensors,
the third the files to be; the fourth writes them.

Files are forced to the disk before they are published, so the way through the page cache buys nothing, and the memory
for it costs more processor time than all else (docs/performance.md): blocks of large files go to the disk directly.
Small ones, where somebody reads them next, are copied by the kernel.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import google_crc32c

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Placed, PlannedFile
from gptconvert.model.tensors import Segment, Stored, merge_segments
from gptconvert.publish.blocks import BLOCK_BYTES, Block, Blocks, Worker
from gptconvert.publish.deferred import DeferredFiles
from gptconvert.publish.finite import checked_chunks, raw_bytes
from gptconvert.publish.sink import Sink
from gptconvert.publish.source_reader import FileDigest, SourceReader, StoppedError, digest_files
from gptconvert.publish.source_scan import Reading, SourceScan

#: Bytes read at once: they stay in a core's own cache while everybody looks at them.
READ_BYTES = 512 << 10

Progress = Callable[[int], None]


@dataclass(frozen=True)
class WrittenFile:
    """A file as it lies on disk.

    Attributes:
        path: relative to the output directory, with forward slashes.
        nbytes: its size.
        sha256: of its bytes.
        computed: digests of the tensors that were not copied but computed, by name, taken before writing.
    """

    path: str
    nbytes: int
    sha256: str
    computed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """Everything one run wrote and read.

    Attributes:
        files: in the order planned.
        tensors: (file, tensor name) → SHA-256 of the tensor's bytes, from the source.
        sources: input file → size and digest.
        notes: what the user should know (one sentence each).
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
) -> Written:
    """Write ``files`` into ``directory`` and, at the same time, check and hash what they are made of.

    Args:
        directory: exists; none of the files does.
        files: their plans.
        checkpoint: where the tensors come from.
        progress: called in this thread with the bytes on their way to the disk.
        allow_nonfinite: convert NaN and infinities.
        verified: whether the files will be verified next. Then small ones are to be in the page cache; and every
            tensor is hashed by itself too, and large inputs with SHA-256, each of which costs as much again as
            hashing the files.

    Raises:
        OutputError: a file could not be written.
        InputError: a source file is damaged, has become unreadable, or holds values that are not finite.
        UnsupportedError: a value does not fit the dtype asked for.
    """
    copies = {file.path: source for file in files if (source := copy_of(file)) is not None}
    others = [path for path in dict.fromkeys(checkpoint.source.files) if path not in copies.values()]
    placed = [(file.path, tensor) for file in files for tensor in file.tensors if verified]
    scan = SourceScan(checkpoint, [p.tensor for _, p in placed])
    stop = threading.Event()
    writer = _Writer(directory, files, progress, stop, scan, each_tensor=verified, cached=verified)
    with ThreadPoolExecutor(2) as pool:
        rest = pool.submit(_watched, stop, lambda: scan.read_rest(stop))
        sources = pool.submit(_watched, stop, lambda: digest_files(others, stop, thorough=verified))

        def examine() -> tuple[str, ...]:
            rest.result()
            return scan.judge(allow_nonfinite=allow_nonfinite)

        try:
            written = writer.write(examine)
            notes, digests, found = examine(), scan.digests(), sources.result()
        except StoppedError:
            raise _cause((rest, sources)) from None
        finally:
            stop.set()
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
) -> list[WrittenFile]:
    """Write ``files`` into ``directory``; each is on the disk when this returns.

    Args:
        directory: exists; none of the files does.
        files: their plans; head and tensors do not overlap.
        progress: called with the bytes on their way to the disk.
        stop: when set by another thread, writing ends with :class:`StoppedError`.
        cached: whether the files will be read at once, and so small ones are to be in the page cache.

    Raises:
        OutputError: a file could not be written.
        InputError: a source file cannot be read or has become too short.
        UnsupportedError: a value does not fit the dtype asked for.
    """
    return _Writer(directory, list(files), progress, stop or threading.Event(), cached=cached).write()


def copy_of(file: PlannedFile) -> str | None:
    """The source file that ``file`` repeats byte for byte, if the plan alone says so."""
    segments: list[Segment] = []
    for placed in file.tensors:
        place = placed.tensor.segments()
        if place is None or placed.offset != sum(segment.nbytes for segment in segments):
            return None
        segments = list(merge_segments((*segments, *place)))
    match segments:
        case [Segment(path, 0, nbytes)] if nbytes == file.nbytes and not file.head:
            with suppress(OSError):
                return path if os.path.getsize(path) == nbytes else None
    return None


class _Writer:
    """The thread that fills blocks, and the three that follow."""

    def __init__(
        self,
        directory: str,
        files: Sequence[PlannedFile],
        progress: Progress | None,
        stop: threading.Event,
        scan: SourceScan | None = None,
        *,
        each_tensor: bool = True,
        cached: bool = True,
    ) -> None:
        self.directory, self.files, self.progress, self.stop = directory, files, progress, stop
        self.each_tensor, self.cached = each_tensor, cached
        self.blocks = Blocks(stop)
        self.tensor_hashing, self.hashing, self.writing = (Worker(stop) for _ in range(3))
        self.sinks: list[Sink] = []
        self.shown = {id(p): _readings(p, scan) for file in files for p in file.tensors}
        self.finishing = DeferredFiles(files, stop)

    def write(self, examine: Callable[[], object] = lambda: None) -> list[WrittenFile]:
        """All files, in the order planned.

        Args:
            examine: called when all bytes of the source were seen; raises if they are no good. Files that take long
                to finish are not waited for then.
        """
        try:
            with SourceReader(self.stop) as self.reader:
                for file in (file for file in self.files if file.finish is None):
                    self._write(file)
                examine()
                for file, content in self.finishing.contents():
                    self._write(PlannedFile.of_bytes(file.path, content))
        except StoppedError:
            self._close()
            raise self._error() or StoppedError from None
        except BaseException:
            self.stop.set()
            self._close()
            raise
        self._close()
        if (error := self._error()) is not None:
            raise error
        written = {sink.file.path: _written(sink) for sink in self.sinks}
        return [written[file.path] for file in self.files]

    def _close(self) -> None:
        for thread in (self.tensor_hashing, self.hashing, self.writing, self.finishing):
            thread.close()
        for sink in self.sinks:
            sink.abandon()

    def _error(self) -> BaseException | None:
        """What made everything stop."""
        errors = (self.writing.error, self.hashing.error, self.tensor_hashing.error, self.finishing.error())
        return next((error for error in errors if error is not None), None)

    def _write(self, file: PlannedFile) -> None:
        """Hand on one file's bytes, front to back; digests are not known yet."""
        sink = Sink(self.directory, file, SourceReader(self.stop), cached=self.cached)
        self.sinks.append(sink)
        self.writing.hand(sink.open)
        stream = _Stream(self, sink)
        stream.put(file.head)
        for placed in file.tensors:
            stream.pad(placed.offset)
            look = _Look(placed, self.shown.pop(id(placed)), crc32c=self.finishing.wanted)
            if placed.tensor.segments() is None:
                sink.computed |= self._compute(stream, placed, look)
            else:
                self._read(stream, placed, look)
            if self.finishing.wanted:
                self.finishing.tell(placed, look.crc32c)
        stream.pad(file.nbytes)
        stream.flush()
        self.writing.hand(sink.close)

    def _read(self, stream: _Stream, placed: Placed, look: _Look) -> None:
        for segment in merge_segments(placed.tensor.segments() or ()):
            offset = segment.offset
            for data in self.reader.blocks((segment,), READ_BYTES):
                stream.put(data, Segment(segment.path, offset, len(data)), look.at(segment, data))
                offset += len(data)
            look.readings.pop(segment, None)  # it may come again in this tensor, and was seen

    def _compute(self, stream: _Stream, placed: Placed, look: _Look) -> dict[str, hashlib._Hash]:
        """Hand on a computed tensor's bytes; returns what they are hashed with, by its name."""
        hashed = {placed.name: hashlib.sha256()} if self.each_tensor else {}
        for chunk in checked_chunks(placed.name, placed.tensor):
            data = raw_bytes(chunk)
            look.crc(data)
            stream.put(data, hashes=hashed.values())
        return hashed


def _readings(placed: Placed, scan: SourceScan | None) -> dict[Segment | None, Reading]:
    """What is wanted of a placed tensor's bytes: of all (None), and of single segments."""
    place = merge_segments(placed.tensor.segments() or ())
    if scan is None or not place:
        return {}
    wanted: dict[Segment | None, Reading | None] = {None: scan.take(place)}
    if len(place) > 1:
        wanted |= {segment: scan.take((segment,)) for segment in dict.fromkeys(place)}
    return {segment: reading for segment, reading in wanted.items() if reading is not None}


class _Look:
    """What is found out about a placed tensor's bytes as they pass by."""

    def __init__(self, placed: Placed, readings: dict[Segment | None, Reading], *, crc32c: bool) -> None:
        self.readings, self.crc32c = readings, 0
        self.summing = crc32c
        tensor = placed.tensor
        if isinstance(tensor, Stored) and tensor.dtype.isnative and tensor.crc32c is not None:
            self.crc32c, self.summing = tensor.crc32c, False  # compared with the bytes by the scan

    def at(self, segment: Segment, data: bytes) -> list[hashlib._Hash]:
        """The next bytes of a segment; returns what is still to see them."""
        wanted = [self.readings[key] for key in (None, segment) if key in self.readings]
        for reading in wanted:
            reading.check(data)
        self.crc(data)
        return [reading.sha256 for reading in wanted if reading.sha256 is not None]

    def crc(self, data: bytes | memoryview) -> None:
        """The next bytes, for the checksum alone."""
        if self.summing:
            self.crc32c = google_crc32c.extend(self.crc32c, bytes(data))


class _Stream:
    """One file's bytes, cut into blocks that are hashed and written."""

    def __init__(self, writer: _Writer, sink: Sink) -> None:
        self.writer, self.sink = writer, sink
        self.block: Block | None = None
        self.position = 0

    def put(
        self, data: bytes | memoryview, source: Segment | None = None, hashes: Collection[hashlib._Hash] = ()
    ) -> None:
        """The next bytes; ``source`` is where a file has the same, ``hashes`` are to see them."""
        done = 0
        while done < len(data):
            if self.block is None:
                self.block = self.writer.blocks.take(self.position)
            room = self.block.room
            n = min(len(room), len(data) - done)
            room[:n] = data[done : done + n]
            here = None if source is None else Segment(source.path, source.offset + done, n)
            self.block.filled(n, here, hashes)
            done, self.position = done + n, self.position + n
            if n == len(room):
                self.flush()

    def pad(self, position: int) -> None:
        """Zeros up to ``position``."""
        while self.position < position:
            self.put(bytes(min(position - self.position, BLOCK_BYTES)))

    def flush(self) -> None:
        """Hand on what there is."""
        block, self.block = self.block, None
        if block is None:
            return
        block.shared(3)
        self.writer.tensor_hashing.hand(lambda: _hash_tensors(block), block)
        self.writer.hashing.hand(lambda: self.sink.sha.update(block.data), block)
        self.writer.writing.hand(lambda: self.sink.write(block), block)
        if self.writer.progress is not None:
            self.writer.progress(block.used)


def _written(sink: Sink) -> WrittenFile:
    """A file that is on the disk, all its bytes hashed."""
    computed = {name: sha.hexdigest() for name, sha in sink.computed.items()}
    return WrittenFile(sink.file.path, sink.file.nbytes, sink.sha.hexdigest(), computed)


def _hash_tensors(block: Block) -> None:
    for first, end, sha in block.hashed:
        sha.update(block.data[first:end])


def _watched(stop: threading.Event, work: Callable[[], Any]) -> Any:
    """Do ``work``; a failure stops the others."""
    try:
        return work()
    except BaseException:
        stop.set()
        raise


def _cause(tasks: Iterable[Future[Any]]) -> BaseException:
    """The error that made the others stop."""
    errors = [error for task in tasks if (error := task.exception()) is not None]
    return next((error for error in errors if not isinstance(error, StoppedError)), StoppedError())
