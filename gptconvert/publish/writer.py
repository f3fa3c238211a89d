"""Planned files to bytes on disk, at the speed of one copy and in the memory of a few blocks.

Stored tensors that are neighbours in source and target become one kernel copy; the rest is computed chunk by chunk.
While the main thread copies, others hash: one follows the written bytes, one reads the source
(:mod:`gptconvert.publish.digest`). Everything they read was just written or read by a neighbour, so it is in the
page cache. One more builds the files that are not known beforehand (:mod:`gptconvert.publish.finishing`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from gptconvert.checkpoint import Checkpoint
from gptconvert.errors import OutputError
from gptconvert.publish import fileops
from gptconvert.publish.digest import digest_tensors
from gptconvert.publish.finishing import Finishing
from gptconvert.publish.readback import ReadBack
from gptconvert.publish.source_reader import FileDigest, SourceReader, StoppedError, digest_files, truncated
from gptconvert.publish.values import checked_chunks, raw_bytes
from gptconvert.targets.plan import Placed, PlannedFile
from gptconvert.tensors import Segment, merge_segments

#: Bytes of one kernel copy: small enough that Ctrl-C and the progress bar keep up.
COPY_BYTES = 32 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True)
class WrittenFile:
    """A file as it lies on disk.

    Attributes:
        path: relative to the output directory, with forward slashes.
        nbytes: its size.
        sha256: of its bytes, read back.
        computed: digests of the tensors that were not copied but computed, by name, taken before writing.
        copy_of: the source file whose bytes these are, all of them and nothing else; None: no such file.
    """

    path: str
    nbytes: int
    sha256: str
    computed: Mapping[str, str] = field(default_factory=dict)
    copy_of: str | None = None


@dataclass(frozen=True)
class Written:
    """Everything one run wrote and read.

    Attributes:
        files: in the order planned.
        tensors: (file, tensor name) → SHA-256 of the tensor's bytes, from the source.
        sources: input file → size and SHA-256.
        notes: what the user should know (one sentence each).
    """

    files: tuple[WrittenFile, ...]
    tensors: Mapping[tuple[str, str], str]
    sources: Mapping[str, FileDigest]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """Bytes of a file that one kernel copy makes."""

    offset: int
    segment: Segment

    def leads_to(self, offset: int, segment: Segment) -> bool:
        """Whether ``segment``, bound for ``offset``, follows at once in both files."""
        mine = self.segment
        return (mine.path, mine.end, self.offset + mine.nbytes) == (segment.path, segment.offset, offset)


def write_and_digest(
    directory: str,
    files: Sequence[PlannedFile],
    checkpoint: Checkpoint,
    progress: Progress | None = None,
    *,
    allow_nonfinite: bool = False,
    each_tensor: bool = True,
) -> Written:
    """Write ``files`` into ``directory`` and, at the same time, check and hash what they are made of.

    Args:
        directory: exists; none of the files does.
        files: their plans.
        checkpoint: where the tensors come from.
        progress: called in this thread with the bytes just written.
        allow_nonfinite: convert NaN and infinities.
        each_tensor: hash every tensor by itself too, which costs as much again as hashing the files.

    Raises:
        OutputError: a file could not be written.
        InputError: a source file is damaged, has become unreadable, or holds values that are not finite.
        UnsupportedError: a value does not fit the dtype asked for.
    """
    copies = {file.path: source for file in files if (source := copy_of(file)) is not None}
    others = [path for path in dict.fromkeys(checkpoint.source.files) if path not in copies.values()]
    placed = [(file.path, tensor) for file in files for tensor in file.tensors if each_tensor]
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        tensors = pool.submit(
            digest_tensors, checkpoint, [p.tensor for _, p in placed], allow_nonfinite=allow_nonfinite, stop=stop
        )
        sources = pool.submit(digest_files, others, stop)
        tasks: tuple[Future[Any], ...] = (tensors, sources)
        for task in tasks:
            task.add_done_callback(lambda done: stop.set() if done.exception() else None)
        try:
            written = write_files(directory, files, progress, stop=stop)
            digests, found = tensors.result(), sources.result()
        except StoppedError:
            raise _cause(tasks) from None
        finally:
            stop.set()
    by_path = {file.path: file for file in written}
    return Written(
        tuple(written),
        {(path, p.name): digests.of(p.tensor) or by_path[path].computed[p.name] for path, p in placed},
        found | {source: FileDigest(by_path[path].nbytes, by_path[path].sha256) for path, source in copies.items()},
        digests.notes,
    )


def write_files(
    directory: str,
    files: Iterable[PlannedFile],
    progress: Progress | None = None,
    *,
    stop: threading.Event | None = None,
) -> list[WrittenFile]:
    """Write ``files`` into ``directory``; each is on the disk, and read back, when this returns.

    Args:
        directory: exists; none of the files does.
        files: their plans; head and tensors do not overlap.
        progress: called with the bytes just written.
        stop: when set by another thread, writing ends with :class:`StoppedError`.

    Raises:
        OutputError: a file could not be written or read back.
        InputError: a source file cannot be read or has become too short.
        UnsupportedError: a value does not fit the dtype asked for.
    """
    files, stop = list(files), stop or threading.Event()
    computed: dict[str, dict[str, str]] = {}
    sizes = {file.path: file.nbytes for file in files}
    with (
        ReadBack(stop) as behind,
        SourceReader(stop) as reader,
        Finishing(directory, files, stop) as finishing,
    ):
        for file in chain((file for file in files if file.finish is None), finishing.files()):
            computed[file.path] = _FileWriter(directory, file, reader, behind, progress, stop).write()
            sizes[file.path] = file.nbytes
            finishing.wrote(file)
        digests = behind.digests()
    return [
        WrittenFile(
            file.path,
            sizes[file.path],
            digests[os.path.join(directory, file.path)],
            computed[file.path],
            copy_of(file),
        )
        for file in files
    ]


def runs(file: PlannedFile) -> list[Run | Placed]:
    """The file's tensors in order: what the kernel copies, neighbours joined, and what must be computed."""
    found: list[Run | Placed] = []
    for placed in file.tensors:
        segments, offset = placed.tensor.segments(), placed.offset
        if segments is None:
            found.append(placed)
            continue
        for segment in merge_segments(segments):
            last = found[-1] if found else None
            if isinstance(last, Run) and last.leads_to(offset, segment):
                found[-1] = Run(last.offset, merge_segments((last.segment, segment))[0])
            else:
                found.append(Run(offset, segment))
            offset += segment.nbytes
    return found


def copy_of(file: PlannedFile) -> str | None:
    """The source file that ``file`` repeats byte for byte, if the plan alone says so."""
    match runs(file):
        case [Run(0, Segment(path, 0, nbytes))] if nbytes == file.nbytes and not file.head:
            with suppress(OSError):
                return path if os.path.getsize(path) == nbytes else None
    return None


@dataclass
class _FileWriter:
    """Writes one file from front to back."""

    directory: str
    file: PlannedFile
    reader: SourceReader
    behind: ReadBack
    progress: Progress | None
    stop: threading.Event
    position: int = 0

    @property
    def path(self) -> str:
        return os.path.join(self.directory, self.file.path)

    def write(self) -> dict[str, str]:
        """The file, on the disk; returns the digests of its computed tensors."""
        try:
            _make_parents(self.directory, self.file.path)
            with fileops.create(self.path) as target:
                self.behind.extend(self.path, 0, 0)
                fileops.allocate(target, self.file.nbytes)
                fileops.write(target, self.file.head, 0)
                self._reached(len(self.file.head))
                computed = self._write_tensors(target)
                self._reached(self.file.nbytes)
                fileops.sync(target)
        except OSError as error:
            raise self._failed(error) from error
        return computed

    def _write_tensors(self, target: int) -> dict[str, str]:
        computed = {}
        for run in runs(self.file):
            if isinstance(run, Run):
                self._copy(target, run)
            else:
                computed[run.name] = self._compute(target, run)
        return computed

    def _copy(self, target: int, run: Run) -> None:
        source, segment, done = self.reader.open(run.segment.path), run.segment, 0
        while done < segment.nbytes:
            if self.stop.is_set():
                raise StoppedError
            wanted = min(COPY_BYTES, segment.nbytes - done)
            copied = fileops.copy(source, segment.offset + done, target, run.offset + done, wanted)
            if not copied:
                raise truncated(segment.path, segment.end, segment.offset + done)
            done += copied
            self._reached(run.offset + done)

    def _compute(self, target: int, placed: Placed) -> str:
        sha, offset = hashlib.sha256(), placed.offset
        for chunk in checked_chunks(placed.name, placed.tensor):
            if self.stop.is_set():
                raise StoppedError
            data = raw_bytes(chunk)
            fileops.write(target, data, offset)
            sha.update(data)
            offset += len(data)
            self._reached(offset)
        return sha.hexdigest()

    def _reached(self, position: int) -> None:
        """All bytes before ``position`` are final."""
        if position > self.position:
            self.behind.extend(self.path, self.position, position)
            if self.progress is not None:
                self.progress(position - self.position)
            self.position = position

    def _failed(self, error: OSError) -> OutputError:
        space = os.statvfs(self.directory)
        return OutputError(
            f"cannot be written ({error.strerror})",
            path=self.file.path,
            expected=f"{self.file.nbytes} bytes",
            found=f"{self.position} bytes written, {space.f_bavail * space.f_frsize} bytes free",
            hint="free some space, or name an output on another disk",
        )


def _cause(tasks: Iterable[Future[Any]]) -> BaseException:
    """The error that made the others stop."""
    errors = [error for task in tasks if (error := task.exception()) is not None]
    return next((error for error in errors if not isinstance(error, StoppedError)), StoppedError())


def _make_parents(directory: str, relative: str) -> None:
    for name in os.path.dirname(relative).split("/"):
        directory = os.path.join(directory, name)
        if not os.path.isdir(directory):
            fileops.make_directory(directory)
