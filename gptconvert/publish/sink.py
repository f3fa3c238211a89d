"""One file being written, block by block."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from gptconvert.errors import OutputError
from gptconvert.model.export import PlannedFile
from gptconvert.model.tensors import Segment
from gptconvert.publish import fileops
from gptconvert.publish.blocks import BLOCK_BYTES, Block
from gptconvert.publish.source_reader import SourceReader, truncated

#: Larger files go to the disk directly even if they will be read at once.
MOST_CACHED = 1 << 30


class Sink:
    """A file being written. Its methods are called in the writing thread, but for :meth:`abandon`.

    Args:
        directory: of the output.
        file: the plan.
        reader: for copies.
        cached: whether the file will be read at once, and so is to be in the page cache if it is not large: then the
            kernel copies what it can. Else blocks go straight to the disk where they can.

    Attributes:
        sha: of the file's bytes; others fill it.
        computed: of each tensor that is not copied but computed, by name; others fill these too.
    """

    def __init__(self, directory: str, file: PlannedFile, reader: SourceReader, *, cached: bool) -> None:
        self.directory, self.file, self.reader = directory, file, reader
        self.cached = file.nbytes <= MOST_CACHED if cached else file.nbytes < BLOCK_BYTES
        self.sha = hashlib.sha256()
        self.computed: dict[str, hashlib._Hash] = {}
        self.descriptor, self.position, self.direct = -1, 0, False

    def open(self) -> None:
        """Create the file and the directories it lies in."""
        with self._failing():
            _make_parents(self.directory, self.file.path)
            self.descriptor = fileops.create(os.path.join(self.directory, self.file.path))
            fileops.allocate(self.descriptor, self.file.nbytes)
            if not self.cached:
                self.direct = fileops.bypass_cache(self.descriptor, True)

    def write(self, block: Block) -> None:
        """The next block."""
        with self._failing():
            if self.direct:
                self._write_directly(block)
            else:
                self._write_cached(block)
            self.position += block.used

    def close(self) -> None:
        """Everything is written: force it to the disk."""
        with self._failing():
            if self.direct:
                fileops.truncate(self.descriptor, self.file.nbytes)  # the last block was padded
            fileops.sync(self.descriptor)
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file as it is."""
        self.reader.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _write_directly(self, block: Block) -> None:
        try:
            fileops.write(self.descriptor, block.padded(fileops.ALIGNMENT), block.offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Not in this file system, or not at this alignment (after a write that fell short).
            self.direct = fileops.bypass_cache(self.descriptor, False)
            fileops.write(self.descriptor, block.data, block.offset)

    def _write_cached(self, block: Block) -> None:
        at = 0
        for start, segment in block.copies:
            fileops.write(self.descriptor, block.data[at:start], block.offset + at)
            self._copy(segment, block.offset + start)
            at = start + segment.nbytes
        fileops.write(self.descriptor, block.data[at:], block.offset + at)

    def _copy(self, segment: Segment, offset: int) -> None:
        source, done = self.reader.open(segment.path), 0
        while done < segment.nbytes:
            n = fileops.copy(source, segment.offset + done, self.descriptor, offset + done, segment.nbytes - done)
            if not n:
                raise truncated(segment.path, segment.end, segment.offset + done)
            done += n

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            space = os.statvfs(self.directory)
            raise OutputError(
                f"cannot be written ({error.strerror})",
                path=self.file.path,
                expected=f"{self.file.nbytes} bytes",
                found=f"{self.position} bytes written, {space.f_bavail * space.f_frsize} bytes free",
                hint="free some space, or name an output on another disk",
            ) from error


def _make_parents(directory: str, relative: str) -> None:
    for name in os.path.dirname(relative).split("/"):
        directory = os.path.join(directory, name)
        if not os.path.isdir(directory):
            fileops.make_directory(directory)
