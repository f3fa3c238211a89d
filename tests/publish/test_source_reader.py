"""Reading back what was written: the same bytes from the page cache and from the disk, and the cache left alone."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptconvert.errors import InputError
from gptconvert.model.tensors import Segment
from gptconvert.publish import fileops, source_reader
from gptconvert.publish.source_reader import ReadBack, StoppedError

CONTENT = np.random.default_rng(0).integers(0, 256, 50_001, np.uint8).tobytes()


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "f").write_bytes(CONTENT)
    return str(tmp_path / "f")


def forget(path: str) -> None:
    """Force a file to the disk and out of the page cache."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cached(path: str) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return fileops.is_cached(descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def cold(file: str) -> str:
    """A file that is not in the page cache, in a file system that can be read past it."""
    forget(file)
    descriptor = os.open(file, os.O_RDONLY)
    can = fileops.bypass_cache(descriptor, True)
    os.close(descriptor)
    if cached(file) or not can:
        pytest.skip("this file system keeps everything in memory")
    return file


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 50_000), nbytes=st.integers(1, 50_001), block=st.sampled_from([1, 511, 4096, 10_000]))
def test_any_segment(file: str, offset: int, nbytes: int, block: int) -> None:
    segment = Segment(file, offset, min(nbytes, len(CONTENT) - offset))
    forget(file)
    before, source_reader.BLOCK_BYTES = source_reader.BLOCK_BYTES, block if nbytes < 1000 else max(block, 511)
    try:
        with ReadBack() as reader:
            assert b"".join(bytes(b) for b in reader.blocks([segment])) == CONTENT[offset : segment.end]
    finally:
        source_reader.BLOCK_BYTES = before


def test_what_is_read_does_not_enter_the_page_cache(cold: str) -> None:
    with ReadBack() as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(cold, 3, 40_000)])) == CONTENT[3:40_003]
    assert not cached(cold)


def test_a_file_whose_beginning_was_read_is_not_in_the_page_cache(cold: str) -> None:
    descriptor = os.open(cold, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(descriptor, 100, 0)
    os.close(descriptor)
    assert not cached(cold)
    Path(cold).read_bytes()
    assert cached(cold)


def test_what_is_in_the_page_cache_is_taken_from_there(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(file).read_bytes()
    monkeypatch.setattr(fileops, "bypass_cache", lambda *_: pytest.fail("it is there already"))
    with ReadBack() as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(file, 7, 9000)])) == CONTENT[7:9007]


def test_a_file_system_without_a_way_past_the_cache(cold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileops, "bypass_cache", lambda *_: False)
    with ReadBack() as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(cold, 7, 9000)])) == CONTENT[7:9007]


def test_a_file_system_that_finds_out_late(cold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.preadv, []

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and offset:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(source_reader, "BLOCK_BYTES", 9000)
    with ReadBack() as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(cold, 7, 30_000)])) == CONTENT[7:30_007]
    assert len(refused) == 1


def test_short_reads(cold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileops, "fault", lambda operation, nbytes: min(nbytes, 4096))
    with ReadBack() as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(cold, 5000, 30_000)])) == CONTENT[5000:35_000]


def test_several_files(tmp_path: Path, file: str) -> None:
    (tmp_path / "g").write_bytes(b"other")
    with ReadBack() as reader:
        blocks = reader.blocks([Segment(file, 0, 10), Segment(str(tmp_path / "g"), 1, 4), Segment(file, 10, 3)])
        assert [bytes(block) for block in blocks] == [CONTENT[:10], b"ther", CONTENT[10:13]]


def test_truncated_missing_and_unreadable(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="truncated; expected 50002 bytes, found 50001 bytes"), ReadBack() as reader:
        list(reader.blocks([Segment(file, 50_000, 2)]))
    with pytest.raises(InputError, match="truncated; expected 50011 bytes"), ReadBack() as reader:
        list(reader.blocks([Segment(file, 50_010, 1)]))
    with pytest.raises(InputError, match="No such file"), ReadBack() as reader:
        list(reader.blocks([Segment(str(tmp_path / "nothing"), 0, 1)]))
    monkeypatch.setattr(fileops, "read_into", failing(errno.EIO))
    with pytest.raises(InputError, match="Input/output error"), ReadBack() as reader:
        list(reader.blocks([Segment(file, 0, 1)]))


def failing(code: int) -> Callable[..., Any]:
    def act(*_: object) -> Any:
        raise OSError(code, os.strerror(code))

    return act


def test_stops_when_told(file: str) -> None:
    stop = threading.Event()
    with ReadBack(stop) as reader:
        blocks = reader.blocks([Segment(file, 0, 10), Segment(file, 10, 10)])
        next(blocks)
        stop.set()
        with pytest.raises(StoppedError):
            next(blocks)


def test_where_it_cannot_be_told_what_is_cached(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert cached(file)
