"""Deferred files are made while others are written: concurrently, in order, and cancelled on any failure."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptconvert.errors import InputError, OutputError, UnsupportedError
from gptconvert.model.export import Placed, PlannedFile, place
from gptconvert.model.tensors import Segment, Stored
from gptconvert.publish.deferred import DeferredFiles
from gptconvert.publish.file_system import OS
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.source_reader import StoppedError
from gptconvert.publish.writer import write_and_digest, write_files
from tests.helpers import openai_checkpoint
from tests.publishing import failing, file_system

Crc32c = Callable[[Placed], int]
#: Far longer than any test needs; a test that waits this long fails.
LONG = 20.0


def data_file(directory: Path, name: str = "data", count: int = 64) -> PlannedFile:
    """A file with one stored tensor, whose source is beside the output."""
    source = directory / f"{name}.source"
    source.write_bytes(np.arange(count, dtype="<f4").tobytes())
    tensor = Stored((Segment(str(source), 0, 4 * count),), np.dtype(np.float32), (count,))
    placed, nbytes = place([("w", tensor, "w")])
    return PlannedFile(name, nbytes, tensors=placed)


def deferred(name: str, finish: Callable[[Crc32c, threading.Event], bytes]) -> PlannedFile:
    return PlannedFile(name, 7, finish=finish)


def until_stopped(crc32c: Crc32c, stop: threading.Event) -> bytes:
    """Slow work that only cancellation ends."""
    assert stop.wait(LONG), "it was not cancelled"
    raise RuntimeError("in the middle of it")


def test_files_are_made_while_others_are_written(tmp_path: Path) -> None:
    """The copy and the work wait for each other, so they finish only if they run concurrently."""
    working, copying = threading.Event(), threading.Event()

    def work(crc32c: Crc32c, stop: threading.Event) -> bytes:
        working.set()
        assert copying.wait(LONG), "nothing was written in the meantime"
        return b"done"

    def progress(nbytes: int) -> None:
        assert working.wait(LONG), "the work had not begun"
        copying.set()

    write_files(str(tmp_path), [deferred("late", work), data_file(tmp_path)], progress)
    assert (tmp_path / "late").read_bytes() == b"done"


def test_records_have_the_real_size(tmp_path: Path) -> None:
    (record,) = write_files(str(tmp_path), [deferred("f", lambda crc32c, stop: b"x" * 1000)])
    assert (record.nbytes, record.sha256) == (1000, hashlib.sha256(b"x" * 1000).hexdigest())
    assert (tmp_path / "f").read_bytes() == b"x" * 1000


def test_in_plan_order_in_one_thread_and_written_last(tmp_path: Path) -> None:
    called: list[tuple[str, int]] = []
    created: list[str] = []

    def finish(name: str) -> PlannedFile:
        def work(crc32c: Crc32c, stop: threading.Event) -> bytes:
            called.append((name, threading.get_ident()))
            return name.encode()

        return deferred(name, work)

    def create(path: str) -> int:
        created.append(os.path.basename(path))
        return OS.create(path)

    files = [finish("c"), data_file(tmp_path, "z"), finish("a"), finish("b")]
    write_files(str(tmp_path), files, settings=IoSettings(file_system(create=create)))
    assert [name for name, _ in called] == ["c", "a", "b"]
    assert len({thread for _, thread in called} | {threading.get_ident()}) == 2
    assert created == ["z", "c", "a", "b"]


def test_a_checksum_waits_for_its_file(tmp_path: Path) -> None:
    """The checksum covers all bytes of the file, even if it is slow."""
    import google_crc32c

    file, waiting = data_file(tmp_path), threading.Event()

    def index(crc32c: Crc32c, stop: threading.Event) -> bytes:
        waiting.set()
        return crc32c(file.tensors[0]).to_bytes(4, "little")

    def progress(nbytes: int) -> None:
        assert waiting.wait(LONG)

    write_files(str(tmp_path), [file, deferred("index", index)], progress)
    found = int.from_bytes((tmp_path / "index").read_bytes(), "little")
    assert found == google_crc32c.value((tmp_path / "data").read_bytes())


def test_its_error_reaches_the_caller_and_stops_the_copy(tmp_path: Path) -> None:
    copying, stop = threading.Event(), threading.Event()

    def fail(crc32c: Crc32c, stop: threading.Event) -> bytes:
        assert copying.wait(LONG)
        raise UnsupportedError("no such graph")

    def progress(nbytes: int) -> None:
        copying.set()
        assert stop.wait(LONG), "it was not cancelled"

    files = [deferred("f", fail), data_file(tmp_path, "a"), data_file(tmp_path, "b")]
    with pytest.raises(UnsupportedError, match="no such graph"):
        write_files(str(tmp_path), files, progress, stop=stop)
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "f").exists()


def test_a_failed_copy_cancels_the_work(tmp_path: Path) -> None:
    full = IoSettings(file_system(allocate=failing(errno.ENOSPC)))
    with pytest.raises(OutputError, match="No space left"):
        write_files(str(tmp_path), [deferred("f", until_stopped), data_file(tmp_path)], settings=full)


def test_a_failed_copy_ends_the_wait_for_a_checksum(tmp_path: Path) -> None:
    """Wait for the checksum of a file that is never begun."""
    first, second = data_file(tmp_path, "a"), data_file(tmp_path, "b")
    waiting, stop = threading.Event(), threading.Event()
    ended: list[BaseException] = []

    def index(crc32c: Crc32c, stop: threading.Event) -> bytes:
        waiting.set()
        try:
            return bytes(crc32c(second.tensors[0]))
        except BaseException as error:
            ended.append(error)
            raise

    def full(*_: object) -> None:
        assert waiting.wait(LONG)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def progress(nbytes: int) -> None:
        assert stop.wait(LONG), "it was not cancelled"

    files, io = [first, second, deferred("index", index)], IoSettings(file_system(allocate=full))
    with pytest.raises(OutputError, match="No space left"):
        write_files(str(tmp_path), files, progress, stop=stop, settings=io)
    assert [type(error) for error in ended] == [StoppedError]


def test_failure_elsewhere_cancels_the_work_and_is_reported(tmp_path: Path) -> None:
    broken = IoSettings(file_system(open_source=failing(errno.EIO)))
    checkpoint = openai_checkpoint(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="Input/output error"):
        write_and_digest(str(tmp_path / "out"), [deferred("f", until_stopped)], checkpoint, settings=broken)


def test_an_interrupt_cancels_the_work(tmp_path: Path) -> None:
    def progress(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files(str(tmp_path), [deferred("f", until_stopped), data_file(tmp_path)], progress)


def test_without_deferred_files_no_thread_starts(tmp_path: Path) -> None:
    before = threading.active_count()
    files = DeferredFiles([data_file(tmp_path)], threading.Event())
    assert threading.active_count() == before
    assert not files.need_checksums
