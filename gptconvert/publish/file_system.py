"""Every operation that changes the file system, one small method each.

Tests replace methods to make any single operation fail, fall short, or be the last one before a crash: the published
output must be complete in every case, as in SQLite's tests (sqlite.org/testing.html).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: Alignment of direct I/O: the largest sector size in use.
ALIGNMENT = 4096
#: Bytes copied at once where the kernel cannot copy.
COPY_BYTES = 8 << 20
#: Pages sampled to estimate whether a file is cached. The first pages of an open file always are.
SAMPLES = 9
#: Errors which mean that the file system or kernel does not support an operation, not that the operation failed.
_UNSUPPORTED = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSOCK, errno.EPERM}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

#: (source, source offset, target, target offset, bytes) → bytes copied, perhaps fewer.
CopyMethod = Callable[[int, int, int, int, int], int]


def copy_in_kernel(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Copy with ``copy_file_range``, which may share blocks instead of moving bytes."""
    return os.copy_file_range(source, target, nbytes, source_offset, target_offset)


def copy_by_sendfile(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Copy with ``sendfile``, from page cache to page cache."""
    os.lseek(target, target_offset, os.SEEK_SET)
    return os.sendfile(target, source, source_offset, nbytes)


def copy_by_read(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Copy through user space, which works everywhere."""
    return os.pwrite(target, os.pread(source, min(nbytes, COPY_BYTES), source_offset), target_offset)


#: Fastest first. Only the last is available on macOS.
COPY_METHODS: tuple[CopyMethod, ...] = (
    *((copy_in_kernel, copy_by_sendfile) if hasattr(os, "copy_file_range") else ()),
    copy_by_read,
)


class FileSystem:
    """The operating system's file operations.

    Tests override single methods to inject faults. Every method may raise :class:`OSError`.

    Args:
        copy_methods: tried in order until one is supported.
    """

    def __init__(self, copy_methods: tuple[CopyMethod, ...] = COPY_METHODS) -> None:
        self._copy_methods = copy_methods

    def make_directory(self, path: str) -> None:
        """Create a directory; the umask decides its mode."""
        os.mkdir(path, 0o777)

    def create(self, path: str) -> int:
        """Create a file and open it for writing and reading; the umask decides its mode."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open_source(self, path: str) -> int:
        """Open a file for reading."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self, descriptor: int) -> None:
        """Close a file. After an error it is closed too: a second attempt could hit another thread's file."""
        os.close(descriptor)

    def free_bytes(self, path: str) -> int:
        """Free space available to ordinary users in the file system of ``path``."""
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize

    def bypass_cache(self, descriptor: int, enable: bool) -> bool:
        """Switch direct I/O, which bypasses the page cache, on or off; returns whether it is now on.

        Direct I/O requires buffers, offsets and lengths that are multiples of :data:`ALIGNMENT`. Not every system
        and file system supports it.
        """
        if not hasattr(os, "O_DIRECT"):
            return False
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if enable else 0))
        except OSError:
            return False
        return enable

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Allocate the final size of an empty file, so that a full disk fails now rather than later."""
        if nbytes == 0:
            return
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            os.ftruncate(descriptor, nbytes)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        view = memoryview(data).cast("B")
        while view:
            written = self.write_some(descriptor, view, offset)
            view, offset = view[written:], offset + written

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write the beginning of ``data`` at ``offset``; returns the number of bytes written."""
        return os.pwrite(descriptor, data, offset)

    def truncate(self, descriptor: int, nbytes: int) -> None:
        """Truncate the file to ``nbytes``."""
        os.ftruncate(descriptor, nbytes)

    def read(self, descriptor: int, nbytes: int, offset: int) -> bytes:
        """Read up to ``nbytes`` at ``offset``; fewer at the end of the file or on a short read."""
        return os.pread(descriptor, nbytes, offset)

    def read_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        """Read into ``buffer`` from ``offset``; returns the number of bytes. May fall short, as :meth:`read`."""
        return os.preadv(descriptor, [buffer], offset)

    def is_cached(self, descriptor: int) -> bool:
        """Whether a file is in the page cache, judged by a sample of its pages; True if unknown."""
        import ctypes

        import numpy as np

        in_core = getattr(ctypes.CDLL(None), "mincore", None)
        try:
            size = os.fstat(descriptor).st_size
            if in_core is None or not size:
                return True
            mapped = np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)  # for its address
        except OSError:
            return True
        answer = (ctypes.c_ubyte * 1)()
        for sample in range(SAMPLES):
            offset = (size - 1) * sample // (SAMPLES - 1)
            page = mapped.ctypes.data + offset - offset % mmap.PAGESIZE
            if not in_core(ctypes.c_void_p(page), ctypes.c_size_t(1), answer) and not answer[0] & 1:
                return False
        return True

    def copy(self, source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
        """Copy up to ``nbytes`` between two open files, inside the kernel if possible.

        Returns:
            the number of bytes copied; 0 only at the end of the source.
        """
        for method in self._copy_methods:
            try:
                copied = method(source, source_offset, target, target_offset, nbytes)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                continue
            # On some file systems copy_file_range returns 0 before the end; only a read is conclusive.
            if copied or method is self._copy_methods[-1]:
                return copied
        return 0

    def sync(self, descriptor: int) -> None:
        """Sync the file to disk."""
        os.fsync(descriptor)

    def sync_path(self, path: str) -> None:
        """:meth:`sync` a file or directory by name (a directory's bytes are its entries)."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # from file systems that cannot sync directories
                error.filename = path
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: str, target: str) -> None:
        """Rename atomically; ``target`` may only be an empty directory if it exists."""
        os.rename(source, target)

    def exchange(self, first: str, second: str) -> None:
        """Swap two names atomically.

        Raises:
            OSError: ``ENOSYS``, ``EINVAL`` or ``EOPNOTSUPP`` if the system or file system does not support it.
        """
        import ctypes

        rename_at = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename_at is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if rename_at(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), first, None, second)

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def remove_tree(self, path: str) -> None:
        """Remove a directory, if it exists, and everything in it.

        What cannot be removed stays, and the first error is raised.
        """
        errors: list[OSError] = []

        def collect(function: Callable[..., Any], path: str, error: Any) -> None:
            found = error[1] if isinstance(error, tuple) else error
            errors.extend([] if isinstance(found, FileNotFoundError) else [found])

        handler: dict[str, Any] = {"onexc" if sys.version_info >= (3, 12) else "onerror": collect}
        shutil.rmtree(path, **handler)
        if errors:
            raise errors[0]

    def remove_file(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def lock(self, path: str) -> int | None:
        """Lock the file at ``path``, creating it if absent, and write this process's id to it.

        The kernel releases the lock when the process ends for any reason, so a lock is never stale; its file may be.

        Returns:
            the descriptor that holds the lock; None if another process holds it.

        Raises:
            OSError: the file system does not support locks.
        """
        while True:
            descriptor, created = _open_lock(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                created = True  # locked: nobody else depends on the file
                # The owner may have removed the file between our open and our lock, which is then useless.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
                        return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException as error:
                self._remove_lock(path, descriptor, error, created)
                raise
            os.close(descriptor)

    def _remove_lock(self, path: str, descriptor: int, error: BaseException, created: bool) -> None:
        """Close a lock file that could not be locked, and remove it if this process created it."""
        try:
            if created:
                self.remove_file(path)
        except OSError:
            if isinstance(error, OSError):
                error.filename = path  # so that the message names what is left
        finally:
            with suppress(OSError):
                os.close(descriptor)

    def unlock(self, path: str, descriptor: int) -> None:
        """Remove the lock file while it is locked, then release the lock."""
        try:
            self.remove_file(path)
        finally:
            with suppress(OSError):  # nothing was written that could be lost
                os.close(descriptor)


def _open_lock(path: str) -> tuple[int, bool]:
    """Open a lock file, and create it if absent; returns its descriptor, and whether it was created."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileExistsError):
        return os.open(path, flags | os.O_EXCL, 0o666), True
    return os.open(path, flags, 0o666), False


#: The default file system.
OS = FileSystem()
