"""Reading files, and reading back written files: the bytes are the same cached and with direct I/O."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptconvert.errors import InputError
from gptconvert.model.tensors import Segment
from gptconvert.publish.file_system import OS, FileSystem
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.source_reader import FileDigest, ReadBack, SourceReader, StoppedError, digest_files
from tests.publishing import FaultyFileSystem, at_most, failing, file_system

CONTENT = np.random.default_rng(0).integers(0, 256, 50_001, np.uint8).tobytes()


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "f").write_bytes(CONTENT)
    return str(tmp_path / "f")


def evict(path: str) -> None:
    """Force a file to the disk and evict it from the page cache."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cached(path: str) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return OS.is_cached(descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def cold(file: str) -> str:
    """An uncached file in a file system that supports direct I/O."""
    evict(file)
    descriptor = os.open(file, os.O_RDONLY)
    supported = OS.bypass_cache(descriptor, True)
    os.close(descriptor)
    if cached(file) or not supported:
        pytest.skip("this file system keeps everything in memory")
    return file


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 50_000), nbytes=st.integers(1, 50_001), block=st.sampled_from([1, 511, 4096, 10_000]))
def test_any_segment(file: str, offset: int, nbytes: int, block: int) -> None:
    segment = Segment(file, offset, min(nbytes, len(CONTENT) - offset))
    evict(file)
    with ReadBack(settings=IoSettings(read_bytes=block if nbytes < 1000 else max(block, 511))) as reader:
        assert b"".join(bytes(b) for b in reader.blocks([segment])) == CONTENT[offset : segment.end]


def test_reading_back_does_not_fill_the_page_cache(cold: str) -> None:
    with ReadBack() as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(cold, 3, 40_000)])) == CONTENT[3:40_003]
    assert not cached(cold)


def test_cached_beginning_does_not_make_a_file_cached(cold: str) -> None:
    descriptor = os.open(cold, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(descriptor, 100, 0)
    os.close(descriptor)
    assert not cached(cold)
    Path(cold).read_bytes()
    assert cached(cold)


def test_a_cached_file_is_read_from_the_cache(file: str) -> None:
    Path(file).read_bytes()
    caching = file_system(bypass_cache=lambda *_: pytest.fail("it is cached"))
    with ReadBack(settings=IoSettings(caching)) as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(file, 7, 9000)])) == CONTENT[7:9007]


def test_a_file_system_without_direct_io(cold: str) -> None:
    with ReadBack(settings=IoSettings(file_system(bypass_cache=lambda *_: False))) as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(cold, 7, 9000)])) == CONTENT[7:9007]


class LateRefusal(FileSystem):
    """Accept direct I/O, then refuse to read except at the start of a file."""

    refused = 0

    def read_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and offset:
            self.refused += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().read_into(descriptor, buffer, offset)


def test_a_file_system_that_refuses_late(cold: str) -> None:
    late = LateRefusal()
    with ReadBack(settings=IoSettings(late, read_bytes=9000)) as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(cold, 7, 30_000)])) == CONTENT[7:30_007]
    assert late.refused == 1


def test_short_reads(cold: str) -> None:
    with ReadBack(settings=IoSettings(FaultyFileSystem(at_most(4096)))) as reader:
        assert b"".join(bytes(b) for b in reader.blocks([Segment(cold, 5000, 30_000)])) == CONTENT[5000:35_000]


def test_several_files(tmp_path: Path, file: str) -> None:
    (tmp_path / "g").write_bytes(b"other")
    with ReadBack() as reader:
        blocks = reader.blocks([Segment(file, 0, 10), Segment(str(tmp_path / "g"), 1, 4), Segment(file, 10, 3)])
        assert [bytes(block) for block in blocks] == [CONTENT[:10], b"ther", CONTENT[10:13]]


def test_truncated_missing_and_unreadable(file: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="truncated; expected 50002 bytes, found 50001 bytes"), ReadBack() as reader:
        list(reader.blocks([Segment(file, 50_000, 2)]))
    with pytest.raises(InputError, match="truncated; expected 50011 bytes"), ReadBack() as reader:
        list(reader.blocks([Segment(file, 50_010, 1)]))
    with pytest.raises(InputError, match="No such file"), ReadBack() as reader:
        list(reader.blocks([Segment(str(tmp_path / "nothing"), 0, 1)]))
    broken = IoSettings(file_system(read_into=failing(errno.EIO)))
    with pytest.raises(InputError, match="Input/output error"), ReadBack(settings=broken) as reader:
        list(reader.blocks([Segment(file, 0, 1)]))


def test_stops_when_cancelled(file: str) -> None:
    stop = threading.Event()
    with ReadBack(stop) as reader:
        blocks = reader.blocks([Segment(file, 0, 10), Segment(file, 10, 10)])
        next(blocks)
        stop.set()
        with pytest.raises(StoppedError):
            next(blocks)


def test_system_without_mincore(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert cached(file)


class TestSourceReader:
    @pytest.mark.parametrize("read_bytes", [2, 1 << 20])
    def test_keeps_one_file_open(self, tmp_path: Path, read_bytes: int) -> None:
        for name in "ab":
            (tmp_path / name).write_bytes(b"12345")
        with SourceReader(settings=IoSettings(read_bytes=read_bytes)) as reader:
            first = reader.open(str(tmp_path / "a"))
            assert reader.open(str(tmp_path / "a")) == first
            segments = [Segment(str(tmp_path / n), 1, 3) for n in "aba"]
            assert b"".join(reader.blocks(segments)) == b"234234234"


@pytest.mark.parametrize("read_bytes", [7, 1 << 20])
class TestDigestFiles:
    def test_whole_files(self, tmp_path: Path, read_bytes: int) -> None:
        (tmp_path / "a").write_bytes(b"x" * 1000)
        (tmp_path / "b").write_bytes(b"")
        paths = [str(tmp_path / "a"), str(tmp_path / "b")]
        assert digest_files(paths, settings=IoSettings(read_bytes=read_bytes)) == {
            paths[0]: FileDigest(1000, hashlib.sha256(b"x" * 1000).hexdigest()),
            paths[1]: FileDigest(0, hashlib.sha256().hexdigest()),
        }

    def test_large_files_get_a_crc32c_without_verification(self, tmp_path: Path, read_bytes: int) -> None:
        small, large = b"s" * 999, b"l" * 1000
        (tmp_path / "small").write_bytes(small)
        (tmp_path / "large").write_bytes(large)
        paths = [str(tmp_path / "small"), str(tmp_path / "large")]
        io = IoSettings(read_bytes=read_bytes, sha256_up_to=999)
        assert digest_files(paths, thorough=False, settings=io) == {
            paths[0]: FileDigest(999, hashlib.sha256(small).hexdigest()),
            paths[1]: FileDigest(1000, f"{google_crc32c.value(large):08x}", "crc32c"),
        }
        assert digest_files(paths, settings=io)[paths[1]] == FileDigest(1000, hashlib.sha256(large).hexdigest())

    def test_missing_files(self, tmp_path: Path, read_bytes: int) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            digest_files([str(tmp_path / "nothing")], settings=IoSettings(read_bytes=read_bytes))

    def test_stops_when_cancelled(self, tmp_path: Path, read_bytes: int) -> None:
        stop = threading.Event()
        stop.set()
        (tmp_path / "f").write_bytes(b"content")
        with pytest.raises(StoppedError):
            digest_files([str(tmp_path / "f")], stop, settings=IoSettings(read_bytes=read_bytes))
