"""The writer: every byte at its planned offset, with every copy method, and digests that agree with hashlib."""

from __future__ import annotations

import dataclasses
import errno
import os
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.errors import InputError, OutputError, UnsupportedError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.export import Placed, PlannedFile
from gptconvert.model.tensors import Cast, Segment, Stored, Transposed
from gptconvert.publish.file_system import COPY_METHODS, copy_by_read, copy_by_sendfile, copy_in_kernel
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.writer import copy_of, write_files
from tests.helpers import ROOT, content, stored_tensors
from tests.publish.cases import check, make_files, planned, sha, stored
from tests.publishing import FaultyFileSystem, at_most, failing, file_system

#: Far longer than any test needs; a test that waits this long fails.
LONG = 20.0


class TestCopyOf:
    def test_whole_file(self, tmp_path: Path) -> None:
        a, b = stored(tmp_path / "s", 3, 5)
        assert copy_of(planned("f", [a, b])) == str(tmp_path / "s")

    def test_not_a_whole_file(self, tmp_path: Path) -> None:
        a, b = stored(tmp_path / "s", 3, 5)
        for file in (
            planned("f", [a]),
            planned("f", [b]),
            planned("f", [b, a]),
            planned("f", [a, b], head=b"h"),
            planned("f", [a, b], tail=1),
            PlannedFile.of_bytes("f", b""),
            planned("f", [a, Cast(b, BFLOAT16)]),
        ):
            assert copy_of(file) is None


@pytest.mark.parametrize(
    "copy_methods",
    [COPY_METHODS, (copy_in_kernel,), (copy_by_sendfile,), (copy_by_read,)],
    ids=["first that works", "copy_file_range", "sendfile", "read and write"],
)
@pytest.mark.parametrize("limit", [1 << 20, 3], ids=["whole", "short"])
def test_every_kind_of_tensor_with_every_copy_method(tmp_path: Path, copy_methods: Any, limit: int) -> None:
    files = make_files(tmp_path)
    faulty = FaultyFileSystem(at_most(limit), copy_methods=copy_methods)
    out = tmp_path / "out"
    out.mkdir()
    steps: list[int] = []
    io = IoSettings(faulty, block_bytes=50, copy_read_bytes=11)
    written = write_files(str(out), files, steps.append, settings=io)
    for file, record in zip(files, written, strict=True):
        check(out, file, record)
    assert sum(steps) == sum(file.nbytes for file in files)
    assert min(steps) > 0


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], int, int]:
    """Source size, (start, length) of each tensor in it, head size and alignment of the target."""
    size = draw(st.integers(1, 60))
    starts = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    spans = [(start, draw(st.integers(0, size - start))) for start in starts]
    return size, spans, draw(st.integers(0, 9)), draw(st.sampled_from([1, 4, 64]))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_any_layout(layout: tuple[int, list[tuple[int, int]], int, int]) -> None:
    size, spans, head, alignment = layout
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "s").write_bytes(np.random.default_rng(size).bytes(size))
        tensors = [Stored((Segment(str(directory / "s"), a, n),), np.dtype("u1"), (n,)) for a, n in spans]
        file = planned("f", list(tensors), b"h" * head, alignment)
        (written,) = write_files(name, [file])
        check(directory, file, written)
        if copy_of(file) is not None:
            assert (directory / "s").read_bytes() == (directory / "f").read_bytes()


class TestFinish:
    """A deferred file may record the checksums of the others, at any position in the plan."""

    @staticmethod
    def index_of(*files: PlannedFile) -> PlannedFile:
        placed = [item for file in files for item in file.tensors]
        return PlannedFile(
            "index", 0, finish=lambda crc, stop: b"".join(struct.pack("<I", crc(item)) for item in placed)
        )

    def test_checksums_match_the_written_bytes(self, tmp_path: Path) -> None:
        files = [file for file in make_files(tmp_path) if file.tensors]
        index = self.index_of(*files)
        (tmp_path / "out").mkdir()
        written = write_files(str(tmp_path / "out"), [index, *files])
        assert [file.path for file in written] == ["index", *(file.path for file in files)]
        contents = [(content(file), item) for file in files for item in file.tensors]
        found = [data[item.offset : item.offset + item.tensor.nbytes] for data, item in contents]
        expected = b"".join(struct.pack("<I", google_crc32c.value(data)) for data in found)
        assert (tmp_path / "out" / "index").read_bytes() == expected
        assert written[0].sha256 == sha(expected)

    def test_recorded_checksums_are_not_computed_again(self, tmp_path: Path) -> None:
        (plain,) = stored(tmp_path / "s", 3)
        known = dataclasses.replace(plain, crc32c=7)
        swapped = dataclasses.replace(known, dtype=np.dtype(">f4"))
        file = planned("f", [known, swapped])
        write_files(str(tmp_path), [file, self.index_of(file)])
        other_order = google_crc32c.value(np.frombuffer((tmp_path / "s").read_bytes(), ">f4").astype("<f4").tobytes())
        assert (tmp_path / "index").read_bytes() == struct.pack("<II", 7, other_order)

    def test_any_size_made_while_the_others_are_written(self, tmp_path: Path) -> None:
        started = threading.Event()

        def finish(crc32c: Any, stop: Any) -> bytes:
            started.set()
            return b"longer than planned"

        def slow(_: int) -> None:
            assert started.wait(LONG), "the other file was not begun"

        files = [planned("f", [*stored(tmp_path / "s", 3)]), PlannedFile("index", 4, finish=finish)]
        _, index = write_files(str(tmp_path), files, slow)
        assert (index.nbytes, index.sha256) == (19, sha(b"longer than planned"))
        assert (tmp_path / "index").read_bytes() == b"longer than planned"

    def test_its_error_is_reported(self, tmp_path: Path) -> None:
        def fail(crc32c: Any, stop: Any) -> bytes:
            raise UnsupportedError("cannot be made")

        files = [planned("f", [*stored(tmp_path / "s", 3)]), PlannedFile("index", 4, finish=fail)]
        with pytest.raises(UnsupportedError, match="cannot be made"):
            write_files(str(tmp_path), files)

    def test_failure_elsewhere_ends_its_wait(self, tmp_path: Path) -> None:
        file = planned("f", [*stored(tmp_path / "s", 5)])
        os.truncate(tmp_path / "s", 3)
        with pytest.raises(InputError, match="truncated"):
            write_files(str(tmp_path), [file, self.index_of(file)])


def test_files_are_synced(tmp_path: Path) -> None:
    synced: list[int] = []
    recording = file_system(sync=lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    files = make_files(tmp_path)
    (tmp_path / "out").mkdir()
    write_files(str(tmp_path / "out"), files, settings=IoSettings(recording))
    assert synced == [file.nbytes for file in files]


class TestFailures:
    def test_truncated_source(self, tmp_path: Path) -> None:
        file = planned("f", [*stored(tmp_path / "s", 5, 7)])
        os.truncate(tmp_path / "s", 20)
        with pytest.raises(InputError, match="truncated; expected 48 bytes, found 20 bytes"):
            write_files(str(tmp_path), [file])

    def test_missing_source(self, tmp_path: Path) -> None:
        file = planned("f", [*stored(tmp_path / "s", 5, 7)])
        (tmp_path / "s").unlink()
        with pytest.raises(InputError, match="cannot be read"):
            write_files(str(tmp_path), [file])

    def test_a_full_disk_names_file_and_bytes(self, tmp_path: Path) -> None:
        full = file_system(allocate=failing(errno.ENOSPC), free_bytes=lambda path: 37)
        file = planned("deep/f", [*stored(tmp_path / "s", 5, 7)])
        with pytest.raises(
            OutputError,
            match=r"deep/f: .*No space left.* expected 48 bytes, found 0 bytes written, 37 bytes free",
        ):
            write_files(str(tmp_path), [file], settings=IoSettings(full))

    def test_existing_files_are_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"old")
        with pytest.raises(OutputError, match="File exists"):
            write_files(str(tmp_path), [PlannedFile.of_bytes("f", b"new")])
        assert (tmp_path / "f").read_bytes() == b"old"

    @pytest.mark.parametrize("operation", ["open_source", "read"])
    def test_unreadable_source(self, tmp_path: Path, operation: str) -> None:
        broken = file_system(**{operation: failing(errno.EIO)})
        with pytest.raises(InputError, match=r"cannot be read \(Input/output error\)"):
            write_files(str(tmp_path), [planned("f", [*stored(tmp_path / "s", 5, 7)])], settings=IoSettings(broken))

    def test_a_value_too_large_for_fp16(self, tmp_path: Path) -> None:
        values = np.array([[1, -70000], [3, 65504]], np.float32)
        base = stored_tensors(tmp_path / "s", {"w": values})["w"]
        narrow = Transposed(Cast(base, np.dtype(np.float16)))
        file = PlannedFile("f", 8, b"", (Placed("h.0.w", narrow, 0),))
        with pytest.raises(
            UnsupportedError, match=r"h\.0\.w: a value is too large for float16; .*found 70000"
        ) as caught:
            write_files(str(tmp_path), [file])
        assert "bf16" in str(caught.value.hint)
        assert caught.value.exit_code == 4

    def test_values_that_just_fit_fp16(self, tmp_path: Path) -> None:
        values = np.array([65504, 65519.996, -65504, 1e-9], np.float32)
        base = stored_tensors(tmp_path / "s", {"w": values})["w"]
        file = PlannedFile("f", 8, b"", (Placed("w", Cast(base, np.dtype(np.float16)), 0),))
        write_files(str(tmp_path), [file])
        assert (tmp_path / "f").read_bytes() == values.astype(np.float16).tobytes()

    def test_infinities_of_the_source_are_not_overflows(self, tmp_path: Path) -> None:
        base = stored_tensors(tmp_path / "s", {"w": np.array([1, np.inf, np.nan], np.float32)})["w"]
        file = PlannedFile("f", 6, b"", (Placed("w", Cast(base, np.dtype(np.float16)), 0),))
        write_files(str(tmp_path), [file])


MEMORY = """
import resource, sys
import numpy as np
from gptconvert.model.export import PlannedFile, place
from gptconvert.model.tensors import Cast, Segment, Stored, Transposed
from gptconvert.publish.writer import write_files
path, rows, columns = sys.argv[1] + "/s", 6144, 8192
with open(path, "wb") as file:
    file.truncate(rows * columns * 4)
tensor = Stored((Segment(path, 0, rows * columns * 4),), np.dtype(np.float32), (rows, columns))
placed, end = place([("raw", tensor, None), ("half", Cast(tensor, np.dtype(np.float16)), None)])
with open("/proc/self/status") as status:
    now = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + (96 << 20), resource.RLIM_INFINITY))
write_files(sys.argv[1], [PlannedFile("f", end, b"", placed)])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Copy and convert a tensor of 192 MiB within 96 MiB of private memory, including two threads' stacks."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "f").stat().st_size == 288 << 20
    (tmp_path / "f").unlink()
