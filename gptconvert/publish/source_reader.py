"""Read files block by block, and hash whole files."""

from __future__ import annotations

import errno
import hashlib
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import google_crc32c

from gptconvert.errors import InputError, os_errors_as
from gptconvert.model.tensors import Segment
from gptconvert.publish.file_system import ALIGNMENT
from gptconvert.publish.io_settings import DEFAULT_IO, IoSettings


class StoppedError(Exception):
    """The cancellation event was set: another thread failed, and its error is the one to report."""


@dataclass(frozen=True)
class FileDigest:
    """Identifies the content of a whole file.

    Attributes:
        nbytes: its size.
        value: its digest, in hexadecimal.
        algorithm: ``sha256``, or ``crc32c``, which is fourteen times as fast.
    """

    nbytes: int
    value: str
    algorithm: str = "sha256"


class SourceReader:
    """Read input files block by block; keep the last one open.

    Args:
        stop: cancellation event; once set, reading raises :class:`StoppedError`.
        settings: the file system and read sizes.
    """

    def __init__(self, stop: threading.Event | None = None, settings: IoSettings = DEFAULT_IO) -> None:
        self._stop, self._settings = stop or threading.Event(), settings
        self._path, self._descriptor = "", -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open file."""
        descriptor, self._descriptor, self._path = self._descriptor, -1, ""
        if descriptor >= 0:
            with suppress(OSError):  # everything was read
                self._settings.file_system.close(descriptor)

    def open(self, path: str) -> int:
        """Open a file; returns its descriptor, which this object closes.

        Raises:
            InputError: the file cannot be opened.
            StoppedError: ``stop`` was set.
        """
        if self._stop.is_set():
            raise StoppedError
        if self._path != path:
            self.close()
            with os_errors_as(InputError, "cannot be read", path):
                self._descriptor, self._path = self._settings.file_system.open_source(path), path
        return self._descriptor

    def read(self, path: str, nbytes: int, offset: int) -> bytes:
        """Read up to ``nbytes``; empty at the end of the file.

        Raises:
            InputError: the file cannot be read.
            StoppedError: ``stop`` was set.
        """
        with os_errors_as(InputError, "cannot be read", path):
            return self._settings.file_system.read(self.open(path), nbytes, offset)

    def blocks(self, segments: Iterable[Segment], nbytes: int | None = None) -> Iterator[bytes]:
        """The bytes of ``segments``, in order, in blocks of up to ``nbytes`` (default :attr:`IoSettings.read_bytes`).

        Raises:
            InputError: a file cannot be read, or ends before a segment does.
            StoppedError: ``stop`` was set.
        """
        return _in_blocks(self.read, segments, nbytes or self._settings.read_bytes)

    def whole(self, path: str) -> Iterator[bytes]:
        """All bytes of a file, block by block.

        Raises:
            InputError: the file cannot be read.
            StoppedError: ``stop`` was set.
        """
        offset = 0
        while data := self.read(path, self._settings.read_bytes, offset):
            yield data
            offset += len(data)


class ReadBack:
    """Read written files: from the page cache if they are cached, otherwise with direct I/O.

    A file that is compared once should not evict cached data that is used next.

    Args:
        stop: cancellation event; once set, reading raises :class:`StoppedError`.
        settings: the file system and read sizes.
    """

    def __init__(self, stop: threading.Event | None = None, settings: IoSettings = DEFAULT_IO) -> None:
        self._files, self._settings = SourceReader(stop, settings), settings
        self._path, self._direct = "", False
        self._buffer = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def blocks(self, segments: Iterable[Segment]) -> Iterator[memoryview]:
        """The bytes of ``segments``, in order; each block is valid only until the next is read.

        Raises:
            InputError: a file cannot be read, or ends before a segment does.
            StoppedError: ``stop`` was set.
        """
        return _in_blocks(self._read, segments, self._settings.read_bytes)

    def _read(self, path: str, nbytes: int, offset: int) -> memoryview:
        file_system, descriptor = self._settings.file_system, self._files.open(path)
        with os_errors_as(InputError, "cannot be read", path):
            if self._path != path:
                self._direct = not file_system.is_cached(descriptor) and file_system.bypass_cache(descriptor, True)
                self._path = path
            try:
                return self._read_into_buffer(descriptor, nbytes, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                # Some file systems accept direct I/O and then fail to read.
                self._direct = file_system.bypass_cache(descriptor, False)
                return self._read_into_buffer(descriptor, nbytes, offset)

    def _read_into_buffer(self, descriptor: int, nbytes: int, offset: int) -> memoryview:
        before = offset % ALIGNMENT if self._direct else 0
        size = before + nbytes
        size += -size % ALIGNMENT if self._direct else 0
        if len(self._buffer) < size:
            self._buffer = memoryview(mmap.mmap(-1, size))  # page-aligned
        found = self._settings.file_system.read_into(descriptor, self._buffer[:size], offset - before)
        return self._buffer[before : min(found, before + nbytes)]


Data = TypeVar("Data", bytes, memoryview)


def _in_blocks(read: Callable[[str, int, int], Data], segments: Iterable[Segment], nbytes: int) -> Iterator[Data]:
    for segment in segments:
        offset = segment.offset
        while offset < segment.end:
            data = read(segment.path, min(nbytes, segment.end - offset), offset)
            if not data:
                raise truncated_error(segment.path, segment.end, offset)
            yield data
            offset += len(data)


def truncated_error(path: str, expected: int, found: int) -> InputError:
    """The error for a file that ends early."""
    return InputError("file is truncated", path=path, expected=f"{expected} bytes", found=f"{found} bytes")


def digest_files(
    paths: Iterable[str],
    stop: threading.Event | None = None,
    *,
    thorough: bool = True,
    settings: IoSettings = DEFAULT_IO,
) -> dict[str, FileDigest]:
    """The size and digest of whole files.

    Args:
        paths: the files.
        stop: cancellation event; once set, reading raises :class:`StoppedError`.
        thorough: use SHA-256 for all files, including those larger than :attr:`IoSettings.sha256_up_to`.
        settings: the file system and read sizes.

    Raises:
        InputError: a file cannot be read.
    """
    found = {}
    with SourceReader(stop, settings) as reader:
        for path in paths:
            use_sha256 = thorough or not reader.read(path, 1, settings.sha256_up_to)
            found[path] = (_sha256 if use_sha256 else _crc32c)(reader.whole(path))
    return found


def _sha256(blocks: Iterable[bytes]) -> FileDigest:
    digest, nbytes = hashlib.sha256(), 0
    for block in blocks:
        digest.update(block)
        nbytes += len(block)
    return FileDigest(nbytes, digest.hexdigest())


def _crc32c(blocks: Iterable[bytes]) -> FileDigest:
    value, nbytes = 0, 0
    for block in blocks:
        value = google_crc32c.extend(value, block)
        nbytes += len(block)
    return FileDigest(nbytes, f"{value:08x}", "crc32c")
