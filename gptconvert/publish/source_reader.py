"""Input files read block by block, and hashed whole."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import google_crc32c

from gptconvert.errors import InputError
from gptconvert.model.tensors import Segment
from gptconvert.publish import fileops

#: Small enough to stay in a core's cache while every consumer looks at it, large enough to hide Python.
BLOCK_BYTES = 1 << 20
#: Files up to this size are hashed in no time.
SMALL_BYTES = 64 << 20


class StoppedError(Exception):
    """Another thread failed; its error is the one to report."""


@dataclass(frozen=True)
class FileDigest:
    """What tells a whole file from others.

    Attributes:
        nbytes: its size.
        value: its digest, in hexadecimal.
        algorithm: ``sha256``, or ``crc32c``, which costs a fourteenth of that.
    """

    nbytes: int
    value: str
    algorithm: str = "sha256"


class SourceReader:
    """Reads input files block by block; the file used last stays open.

    Args:
        stop: when set, reading raises :class:`StoppedError`.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self._stop = stop or threading.Event()
        self._path, self._descriptor = "", -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file used last."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor, self._path = -1, ""

    def open(self, path: str) -> int:
        """A descriptor for reading; it belongs to this object.

        Raises:
            InputError: the file cannot be opened.
            StoppedError: asked to stop.
        """
        if self._stop.is_set():
            raise StoppedError
        if self._path != path:
            self.close()
            with _readable(path):
                self._descriptor, self._path = os.open(path, os.O_RDONLY | os.O_CLOEXEC), path
        return self._descriptor

    def read(self, path: str, nbytes: int, offset: int) -> bytes:
        """At most ``nbytes``; none at the end of the file.

        Raises:
            InputError: the file cannot be read.
            StoppedError: asked to stop.
        """
        with _readable(path):
            return fileops.read(self.open(path), nbytes, offset)

    def blocks(self, segments: Iterable[Segment], nbytes: int | None = None) -> Iterator[bytes]:
        """The bytes of ``segments``, one after the other, at most ``nbytes`` (default :data:`BLOCK_BYTES`) at once.

        Raises:
            InputError: a file cannot be read or has become too short.
        """
        return _in_blocks(self.read, segments, nbytes or BLOCK_BYTES)


class ReadBack:
    """Reads what was written, from the disk unless it is in the page cache anyway: what nobody reads next shall not
    take the place of what somebody does.

    Args:
        stop: when set, reading raises :class:`StoppedError`.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self._files = SourceReader(stop)
        self._path, self._direct = "", False
        self._room = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def blocks(self, segments: Iterable[Segment]) -> Iterator[memoryview]:
        """The bytes of ``segments``, one after the other; each block is valid until the next is asked for.

        Raises:
            InputError: a file cannot be read or has become too short.
        """
        return _in_blocks(self._read, segments, BLOCK_BYTES)

    def _read(self, path: str, nbytes: int, offset: int) -> memoryview:
        descriptor = self._files.open(path)
        with _readable(path):
            if self._path != path:
                self._direct = not fileops.is_cached(descriptor) and fileops.bypass_cache(descriptor, True)
                self._path = path
            try:
                return self._filled(descriptor, nbytes, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = fileops.bypass_cache(
                    descriptor, False
                )  # this file system finds out late that it cannot
                return self._filled(descriptor, nbytes, offset)

    def _filled(self, descriptor: int, nbytes: int, offset: int) -> memoryview:
        before = offset % fileops.ALIGNMENT if self._direct else 0
        room = before + nbytes
        room += -room % fileops.ALIGNMENT if self._direct else 0
        if len(self._room) < room:
            self._room = memoryview(mmap.mmap(-1, room))  # begins at a page
        found = fileops.read_into(descriptor, self._room[:room], offset - before)
        return self._room[before : min(found, before + nbytes)]


Data = TypeVar("Data", bytes, memoryview)


def _in_blocks(read: Callable[[str, int, int], Data], segments: Iterable[Segment], nbytes: int) -> Iterator[Data]:
    for segment in segments:
        offset = segment.offset
        while offset < segment.end:
            data = read(segment.path, min(nbytes, segment.end - offset), offset)
            if not data:
                raise truncated(segment.path, segment.end, offset)
            yield data
            offset += len(data)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error


def truncated(path: str, expected: int, found: int) -> InputError:
    """The error for a file that ends too early."""
    return InputError("file is truncated", path=path, expected=f"{expected} bytes", found=f"{found} bytes")


def digest_files(
    paths: Iterable[str], stop: threading.Event | None = None, *, thorough: bool = True
) -> dict[str, FileDigest]:
    """Size and digest of whole files.

    Args:
        paths: which.
        stop: when set, reading ends with :class:`StoppedError`.
        thorough: SHA-256 of all of them, not of those up to :data:`SMALL_BYTES` alone.

    Raises:
        InputError: a file cannot be read.
    """
    found = {}
    with SourceReader(stop) as reader:
        for path in paths:
            hashing = thorough or not reader.read(path, 1, SMALL_BYTES)
            found[path] = (_sha256 if hashing else _crc32c)(reader, path)
    return found


def _sha256(reader: SourceReader, path: str) -> FileDigest:
    sha, offset = hashlib.sha256(), 0
    while data := reader.read(path, BLOCK_BYTES, offset):
        sha.update(data)
        offset += len(data)
    return FileDigest(offset, sha.hexdigest())


def _crc32c(reader: SourceReader, path: str) -> FileDigest:
    value, offset = 0, 0
    while data := reader.read(path, BLOCK_BYTES, offset):
        value = google_crc32c.extend(value, data)
        offset += len(data)
    return FileDigest(offset, f"{value:08x}", "crc32c")
