"""Every way in which this program changes the file system, one small function each.

They stand together so that tests can make any single operation fail, fall short or be the last one before a crash
(:data:`fault`): what is published must be whole whichever it is. The idea is SQLite's (sqlite.org/testing.html).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Callable
from contextlib import suppress

#: What writes that bypass the page cache must be multiples of: the largest sector of disks in use.
ALIGNMENT = 4096
#: Bytes of one block that passes through this process where the kernel cannot copy by itself.
BLOCK_BYTES = 8 << 20
#: Pages that are looked at to tell whether a file lies in the page cache; of one just opened the first ones do.
SAMPLES = 9
#: Errors by which a file system or kernel says that it lacks a way of copying, not that copying failed.
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSOCK, errno.EPERM}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _no_fault(operation: str, nbytes: int) -> int:
    return nbytes


#: Called before each operation with its name and the bytes it wants to move (0 if none); returns how many of them
#: it may move, or raises what the system would. Replaced by tests only.
fault: Callable[[str, int], int] = _no_fault


def make_directory(path: str) -> None:
    """A new directory, its mode left to the umask."""
    fault("mkdir", 0)
    os.mkdir(path, 0o777)


def create(path: str) -> int:
    """A new file open for writing and reading, its mode left to the umask."""
    fault("create", 0)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def bypass_cache(descriptor: int, wanted: bool) -> bool:
    """Let writes go to the disk without a stop in the page cache, or no longer; returns whether they do now.

    Such writes need buffers, offsets and lengths that are multiples of :data:`ALIGNMENT`. Not all systems and file
    systems have them.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if wanted else 0))
    except OSError:
        return False
    return wanted


def allocate(descriptor: int, nbytes: int) -> None:
    """Give the file its final size and its blocks, all zero, so that a full disk shows now."""
    fault("allocate", 0)
    if nbytes == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        os.ftruncate(descriptor, nbytes)


def write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of ``data`` at ``offset``."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view[: fault("write", len(view))], offset)
        view, offset = view[written:], offset + written


def truncate(descriptor: int, nbytes: int) -> None:
    """Cut the file to ``nbytes``."""
    fault("truncate", 0)
    os.ftruncate(descriptor, nbytes)


def read(descriptor: int, nbytes: int, offset: int) -> bytes:
    """At most ``nbytes`` at ``offset``; fewer where the file ends or the system likes."""
    return os.pread(descriptor, fault("read", nbytes), offset)


def is_cached(descriptor: int) -> bool:
    """Whether a file lies in the page cache, judged by some of its pages; True where that cannot be told."""
    import ctypes

    import numpy as np

    in_core, size = getattr(ctypes.CDLL(None), "mincore", None), os.fstat(descriptor).st_size
    if in_core is None or not size:
        return True
    mapped = np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)  # for its address
    answer = (ctypes.c_ubyte * 1)()
    for sample in range(SAMPLES):
        offset = (size - 1) * sample // (SAMPLES - 1)
        page = mapped.ctypes.data + offset - offset % mmap.PAGESIZE
        if not in_core(ctypes.c_void_p(page), ctypes.c_size_t(1), answer) and not answer[0] & 1:
            return False
    return True


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` on, or less of it where the file ends or the system likes; returns how much."""
    return os.preadv(descriptor, [buffer[: fault("read", len(buffer))]], offset)


def copy(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Copy at most ``nbytes`` between two open files, inside the kernel where it can; returns how many.

    0 means that the source ends there.
    """
    allowed = fault("copy", nbytes)
    for method in _METHODS:
        try:
            copied = method(source, source_offset, target, target_offset, allowed)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            continue
        # Some file systems answer 0 to copy_file_range although there is data: only a read tells the end.
        if copied or method is _METHODS[-1]:
            return copied
    return 0


Copy = Callable[[int, int, int, int, int], int]


def _copy_in_kernel(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    return os.copy_file_range(source, target, nbytes, source_offset, target_offset)


def _copy_by_sendfile(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    os.lseek(target, target_offset, os.SEEK_SET)
    return os.sendfile(target, source, source_offset, nbytes)


def _copy_by_read(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
    return os.pwrite(target, os.pread(source, min(nbytes, BLOCK_BYTES), source_offset), target_offset)


#: From best to slowest; macOS has only the last.
_METHODS: tuple[Copy, ...] = (
    *((_copy_in_kernel, _copy_by_sendfile) if hasattr(os, "copy_file_range") else ()),
    _copy_by_read,
)


def sync(descriptor: int) -> None:
    """Wait until the file's bytes are on the disk."""
    fault("fsync", 0)
    os.fsync(descriptor)


def sync_path(path: str) -> None:
    """:func:`sync` of a file or directory by name (a directory's entries are its bytes)."""
    fault("fsync", 0)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot force directories says so thus
            raise
    finally:
        os.close(descriptor)


def rename(source: str, target: str) -> None:
    """Atomic; takes the place of an empty directory, never of anything else."""
    fault("rename", 0)
    os.rename(source, target)


def exchange(first: str, second: str) -> None:
    """Two names change places, atomically.

    Raises:
        OSError: ``ENOSYS``, ``EINVAL`` or ``EOPNOTSUPP`` where the system or file system cannot.
    """
    import ctypes

    fault("exchange", 0)
    rename_at = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename_at is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename_at(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), first, None, second)


def remove_directory(path: str) -> None:
    """An empty directory."""
    fault("rmdir", 0)
    os.rmdir(path)


def remove_tree(path: str) -> None:
    """A directory and all in it."""
    fault("remove", 0)
    shutil.rmtree(path)


def remove_file(path: str) -> None:
    """A file's name."""
    fault("unlink", 0)
    os.unlink(path)


def lock(path: str) -> int | None:
    """Take the lock file at ``path``, made if absent, with this process's id in it.

    The kernel lets go of it when the process dies, however it dies; so a lock is never stale, only its file is.

    Returns:
        the descriptor that holds the lock; None if another process does.

    Raises:
        OSError: no lock can be had here at all.
    """
    while True:
        fault("lock", 0)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have removed the file between our opening and our locking it: then it guards nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def unlock(path: str, descriptor: int) -> None:
    """Remove the lock file while it is still held, then let go."""
    try:
        remove_file(path)
    finally:
        os.close(descriptor)
