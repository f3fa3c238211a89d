"""One file being written, block by block."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gptconvert.errors import OutputError, reason_and_file
from gptconvert.model.export import PlannedFile
from gptconvert.model.tensors import Segment
from gptconvert.publish.blocks import Block
from gptconvert.publish.file_system import ALIGNMENT, FileSystem
from gptconvert.publish.io_settings import DEFAULT_IO, IoSettings
from gptconvert.publish.source_reader import SourceReader, truncated_error

#: Hints for errors that free space does not cure.
HINTS = {
    errno.EFBIG: "the file system, or `ulimit -f`, limits the size of a file: choose another disk, or for "
    "safetensors a smaller --max-shard-size",
    errno.EDQUOT: "your disk quota is full: free some space, or choose an output on another disk",
}
#: Errors of a copy that only its target can have.
_OUTPUT_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_READ_BYTES = 1 << 20


class Sink:
    """A file being written. The writing thread calls its methods, except :meth:`abandon`.

    Args:
        directory: the output directory.
        file: the planned file.
        reader: opens the source files of copied blocks.
        cached: whether the file will be read next. If so, and unless it is large, it is written through the page
            cache and the kernel copies stored bytes. Otherwise direct I/O is used where supported.
        settings: the file system, and the size limits of cached and direct I/O.

    Attributes:
        digest: of the bytes written; updated by the hashing thread.
        tensor_digests: of each computed (not copied) tensor, by name; likewise.
    """

    def __init__(
        self,
        directory: str,
        file: PlannedFile,
        reader: SourceReader,
        *,
        cached: bool,
        settings: IoSettings = DEFAULT_IO,
    ) -> None:
        self.directory, self.file, self.reader = directory, file, reader
        self.file_system = settings.file_system
        self.cached = file.nbytes <= settings.cached_up_to if cached else file.nbytes < settings.direct_from
        self.digest = hashlib.sha256()
        self.tensor_digests: dict[str, hashlib._Hash] = {}
        self.descriptor, self.position, self.direct = -1, 0, False

    def open(self) -> None:
        """Create the file and its parent directories."""
        with self._os_errors():
            _make_parents(self.file_system, self.directory, self.file.path)
            self.descriptor = self.file_system.create(os.path.join(self.directory, self.file.path))
            self.file_system.allocate(self.descriptor, self.file.nbytes)
            if not self.cached:
                self.direct = self.file_system.bypass_cache(self.descriptor, True)

    def write(self, block: Block) -> None:
        """Write the next block."""
        with self._os_errors():
            if self.direct:
                self._write_directly(block)
            else:
                self._write_cached(block)
            self.position += block.used

    def close(self) -> None:
        """Sync the complete file to disk and close it."""
        with self._os_errors():
            if self.direct:
                self.file_system.truncate(self.descriptor, self.file.nbytes)  # the last block was padded
            self.file_system.sync(self.descriptor)
            self.reader.close()
            self._close()

    def abandon(self) -> None:
        """Close the file, if it is open, without completing it."""
        self.reader.close()
        with suppress(OSError):  # the file will be removed
            self._close()

    def _close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1  # closed once, even if closing fails
        if descriptor >= 0:
            self.file_system.close(descriptor)

    def _write_directly(self, block: Block) -> None:
        try:
            self.file_system.write(self.descriptor, block.padded(ALIGNMENT), block.offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Unsupported by the file system, or at this alignment (after a short write).
            self.direct = self.file_system.bypass_cache(self.descriptor, False)
            self.file_system.write(self.descriptor, block.data, block.offset)

    def _write_cached(self, block: Block) -> None:
        at = 0
        for start, segment in block.copies:
            self.file_system.write(self.descriptor, block.data[at:start], block.offset + at)
            self._copy(segment, block.offset + start)
            at = start + segment.nbytes
        self.file_system.write(self.descriptor, block.data[at:], block.offset + at)

    def _copy(self, segment: Segment, offset: int) -> None:
        source, done = self.reader.open(segment.path), 0
        while done < segment.nbytes:
            rest = segment.nbytes - done
            try:
                n = self.file_system.copy(source, segment.offset + done, self.descriptor, offset + done, rest)
            except OSError as error:
                self._blame(error, segment, segment.offset + done)
                raise
            if not n:
                raise truncated_error(segment.path, segment.end, segment.offset + done)
            done += n

    def _blame(self, error: OSError, segment: Segment, offset: int) -> None:
        """Raise :class:`InputError` if a failed copy failed at its source, which a read shows."""
        if error.errno in _OUTPUT_FULL:
            return
        end = segment.end
        while offset < end and (read := self.reader.read(segment.path, min(end - offset, _READ_BYTES), offset)):
            offset += len(read)

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Convert :class:`OSError` to :class:`OutputError`."""
        try:
            yield
        except OSError as error:
            path = os.path.join(self.directory, self.file.path)
            found = f"{self.position} bytes written"
            with suppress(OSError):
                found += f", {self.file_system.free_bytes(self.directory)} bytes free"
            raise OutputError(
                f"cannot be written ({reason_and_file(error, path)})",
                path=path,
                expected=f"{self.file.nbytes} bytes",
                found=found,
                hint=HINTS.get(error.errno or 0, "free some space, or choose an output on another disk"),
            ) from error


def _make_parents(file_system: FileSystem, directory: str, relative: str) -> None:
    for name in os.path.dirname(relative).split("/"):
        directory = os.path.join(directory, name)
        if not os.path.isdir(directory):
            with suppress(FileExistsError):
                file_system.make_directory(directory)
