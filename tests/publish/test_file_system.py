"""File operations on systems with limited support, and with interference by another process."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from gptconvert.publish.file_system import COPY_METHODS, OS, FileSystem
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.writer import write_files
from tests.publish.cases import check, planned, stored
from tests.publishing import failing


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_falls_back_where_the_kernel_cannot_copy(tmp_path: Path, code: int) -> None:
    refusing = FileSystem((failing(code), failing(code), COPY_METHODS[-1]))
    file = planned("f", [*stored(tmp_path / "s", 5, 7)])
    (written,) = write_files(str(tmp_path), [file], settings=IoSettings(refusing))
    check(tmp_path, file, written)


def test_failed_copy_is_not_retried_with_another_method(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    source = OS.open_source(str(tmp_path / "f"))
    with pytest.raises(OSError, match="Input/output error"):
        FileSystem((failing(errno.EIO), COPY_METHODS[-1])).copy(source, 0, source, 0, 5)
    os.close(source)


def test_falls_back_when_the_kernel_copies_nothing(tmp_path: Path) -> None:
    empty = FileSystem((lambda *_: 0, *COPY_METHODS[1:]))
    file = planned("f", [*stored(tmp_path / "s", 5, 7)])
    (written,) = write_files(str(tmp_path), [file], settings=IoSettings(empty))
    check(tmp_path, file, written)


def test_files_that_cannot_be_allocated_are_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    file = planned("f", [*stored(tmp_path / "s", 5, 7)], alignment=64, tail=9)
    (written,) = write_files(str(tmp_path), [file])
    check(tmp_path, file, written)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        os.close(OS.create(str(tmp_path / "f")))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


class TestLock:
    def test_one_holder_at_a_time(self, tmp_path: Path) -> None:
        path = str(tmp_path / "lock")
        descriptor = OS.lock(path)
        assert descriptor is not None
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
        assert OS.lock(path) is None
        OS.unlock(path, descriptor)
        assert not (tmp_path / "lock").exists()

    def test_removed_lock_file_is_not_locked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The owner finishes between our open and our lock; a third process could create a new file."""
        path, opened = str(tmp_path / "lock"), []
        real = os.open

        def racing(name: str, *rest: int) -> int:
            descriptor = real(name, *rest)
            if not opened:
                os.unlink(name)
            opened.append(name)
            return descriptor

        monkeypatch.setattr(os, "open", racing)
        descriptor = OS.lock(path)
        assert descriptor is not None
        assert len(opened) == 2
        assert os.path.samestat(os.fstat(descriptor), os.stat(path))
        os.close(descriptor)


def test_a_lock_that_cannot_be_signed_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk."""
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        OS.lock(str(tmp_path / "lock"))
    assert not list(tmp_path.iterdir())
