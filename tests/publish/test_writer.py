"""The writer: every byte where the plan says, whatever way the bytes take, and digests that hashlib agrees with."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.errors import InputError, OutputError, UnsupportedError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.export import Placed, PlannedFile, place
from gptconvert.model.tensors import Cast, LazyTensor, Segment, Stored, TensorSet, Transposed, filled
from gptconvert.model.transforms import concatenate, take_rows
from gptconvert.publish import blocks, fileops, sink, writer
from gptconvert.publish.source_reader import FileDigest, StoppedError
from gptconvert.publish.source_scan import SourceScan
from gptconvert.publish.writer import WrittenFile, copy_of, write_and_digest, write_files
from tests.helpers import ROOT, content, openai_checkpoint, stored_tensors

F32 = np.dtype(np.float32)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(path: Path, *sizes: int, seed: int = 0) -> list[Stored]:
    """Float32 vectors packed from the start of a new file."""
    values = np.random.default_rng(seed).normal(size=sum(sizes)).astype(np.float32)
    path.write_bytes(values.tobytes())
    starts = np.cumsum([0, *sizes[:-1]]) * 4
    pairs = zip(starts, sizes, strict=True)
    return [Stored((Segment(str(path), int(start), 4 * n),), F32, (n,)) for start, n in pairs]


def planned(
    path: str, tensors: list[LazyTensor], head: bytes = b"", alignment: int = 1, tail: int = 0
) -> PlannedFile:
    placed, end = place([(f"t{i}", t, None) for i, t in enumerate(tensors)], len(head), alignment)
    return PlannedFile(path, end + tail, head, placed)


def check(directory: Path, file: PlannedFile, written: WrittenFile) -> None:
    """The file on disk is the one planned, and its record is true."""
    data = (directory / file.path).read_bytes()
    assert data == content(file)
    assert (written.path, written.nbytes, written.sha256) == (file.path, len(data), sha(data))
    for placed in file.tensors:
        if placed.tensor.segments() is None:
            part = data[placed.offset : placed.offset + placed.tensor.nbytes]
            assert written.computed[placed.name] == sha(part)


class TestCopyOf:
    def test_a_whole_file_and_nothing_else(self, tmp_path: Path) -> None:
        a, b = stored(tmp_path / "s", 3, 5)
        assert copy_of(planned("f", [a, b])) == str(tmp_path / "s")

    def test_anything_less_or_more_is_none(self, tmp_path: Path) -> None:
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


def make_files(directory: Path) -> list[PlannedFile]:
    """Raw, transposed, cast, sliced, stacked, filled, empty; padded and not; from two source files."""
    rng = np.random.default_rng(1)
    floats = {"a": rng.normal(size=(7, 5)).astype("f4"), "b": rng.normal(size=(9, 5)).astype("f4")}
    a, b = stored_tensors(directory / "s1", floats).values()
    (c,) = stored_tensors(directory / "s2", {"c": rng.integers(0, 99, (4, 6)).astype("i2")}).values()
    swapped = Stored(a.segments() or (), np.dtype(">f4"), a.shape)
    mixed = [
        a,
        b,
        Transposed(b),
        Cast(a, BFLOAT16),
        take_rows(b, [(2, 4), (0, 1)]),
        concatenate([a, take_rows(a, [(1, 3)])]),
        filled(1.0, F32, (3,)),
        filled(2.0, F32, ()),
        filled(0.0, F32, (0, 4)),
        swapped,
        c,
    ]
    return [
        planned("deep/er/mixed.bin", mixed, b"head", alignment=64, tail=13),
        planned("deep/packed.bin", [c, a, b]),
        PlannedFile.of_bytes("small.json", b"{}"),
        PlannedFile.of_bytes("empty", b""),
    ]


def only(method: Any) -> tuple[Any, ...]:
    return (method,)


@pytest.fixture(
    params=[
        fileops._METHODS,
        only(fileops._copy_in_kernel),
        only(fileops._copy_by_sendfile),
        only(fileops._copy_by_read),
    ],
    ids=["first that works", "copy_file_range", "sendfile", "read and write"],
)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileops, "_METHODS", request.param)


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("shortest", [None, 3])
def test_every_kind_of_tensor_by_every_way_of_copying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortest: int | None
) -> None:
    files = make_files(tmp_path)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 50)
    monkeypatch.setattr(writer, "READ_BYTES", 11)
    if shortest is not None:
        monkeypatch.setattr(fileops, "fault", lambda operation, nbytes: min(nbytes, shortest))
    out = tmp_path / "out"
    out.mkdir()
    steps: list[int] = []
    written = write_files(str(out), files, steps.append)
    for file, record in zip(files, written, strict=True):
        check(out, file, record)
    assert sum(steps) == sum(file.nbytes for file in files)
    assert min(steps) > 0


class TestStraightToTheDisk:
    """Without the page cache, where the system can: the same bytes."""

    @pytest.fixture
    def bypassing(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
        """What was asked of every file, and what it answered."""
        asked: list[tuple[bool, bool]] = []
        real = fileops.bypass_cache

        def bypass_cache(descriptor: int, wanted: bool) -> bool:
            asked.append((wanted, real(descriptor, wanted)))
            return asked[-1][1]

        monkeypatch.setattr(fileops, "bypass_cache", bypass_cache)
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 2 * fileops.ALIGNMENT)
        monkeypatch.setattr(sink, "BLOCK_BYTES", 1)
        monkeypatch.setattr(writer, "READ_BYTES", 1000)
        return asked

    @pytest.fixture
    def large(self, tmp_path: Path) -> PlannedFile:
        a, b = stored(tmp_path / "s", 5000, 3001)
        return planned("f", [b, Cast(a, BFLOAT16), a], b"head", alignment=64, tail=9)

    @pytest.mark.usefixtures("bypassing")
    @pytest.mark.parametrize("shortest", [None, 5000, 4096])
    def test_same_bytes(
        self, tmp_path: Path, large: PlannedFile, monkeypatch: pytest.MonkeyPatch, shortest: int | None
    ) -> None:
        if shortest is not None:
            monkeypatch.setattr(fileops, "fault", lambda operation, nbytes: min(nbytes, shortest))
        (written,) = write_files(str(tmp_path), [large], cached=False)
        check(tmp_path, large, written)

    def test_it_is_asked_for_once(
        self, tmp_path: Path, large: PlannedFile, bypassing: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fileops, "copy", lambda *_: pytest.fail("a copy by the kernel goes through the cache"))
        (written,) = write_files(str(tmp_path), [large], cached=False)
        check(tmp_path, large, written)
        assert bypassing == [(True, True)]

    def test_not_for_files_that_are_read_next(
        self, tmp_path: Path, large: PlannedFile, bypassing: list[tuple[bool, bool]]
    ) -> None:
        write_files(str(tmp_path), [large])
        assert bypassing == []

    def test_large_files_even_if_they_are_read_next(
        self, tmp_path: Path, large: PlannedFile, bypassing: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sink, "MOST_CACHED", large.nbytes - 1)
        (written,) = write_files(str(tmp_path), [large])
        check(tmp_path, large, written)
        assert bypassing == [(True, True)]

    def test_a_file_system_that_cannot(
        self, tmp_path: Path, large: PlannedFile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fileops, "bypass_cache", lambda descriptor, wanted: False)
        (written,) = write_files(str(tmp_path), [large], cached=False)
        check(tmp_path, large, written)

    def test_a_file_system_that_finds_out_late(
        self, tmp_path: Path, large: PlannedFile, bypassing: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, refused = os.pwrite, [0]

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and offset:
                refused[0] += 1
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        (written,) = write_files(str(tmp_path), [large], cached=False)
        check(tmp_path, large, written)
        assert (refused, bypassing) == ([1], [(True, True), (False, False)])

    def test_a_full_disk_is_no_reason_to_try_again(
        self, tmp_path: Path, large: PlannedFile, bypassing: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match="No space left"):
            write_files(str(tmp_path), [large], cached=False)
        assert bypassing == [(True, True)]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_falls_back_where_the_kernel_cannot_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(os, "sendfile", refuse)
    (file,) = [planned("f", [*stored(tmp_path / "s", 5, 7)])]
    (written,) = write_files(str(tmp_path), [file])
    check(tmp_path, file, written)


def test_falls_back_where_the_kernel_says_nothing_was_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    (file,) = [planned("f", [*stored(tmp_path / "s", 5, 7)])]
    (written,) = write_files(str(tmp_path), [file])
    check(tmp_path, file, written)


def test_files_that_cannot_be_allocated_are_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    (file,) = [planned("f", [*stored(tmp_path / "s", 5, 7)], alignment=64, tail=9)]
    (written,) = write_files(str(tmp_path), [file])
    check(tmp_path, file, written)


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
    """A file that records the checksums of others is written after them, wherever it stands in the plan."""

    @staticmethod
    def index_of(*files: PlannedFile) -> PlannedFile:
        placed = [item for file in files for item in file.tensors]
        return PlannedFile(
            "index", 0, finish=lambda crc, stop: b"".join(struct.pack("<I", crc(item)) for item in placed)
        )

    def test_checksums_are_those_of_the_written_bytes(self, tmp_path: Path) -> None:
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
        turned = google_crc32c.value(np.frombuffer((tmp_path / "s").read_bytes(), ">f4").astype("<f4").tobytes())
        assert (tmp_path / "index").read_bytes() == struct.pack("<II", 7, turned)

    def test_it_may_be_of_any_size_and_is_made_while_the_others_are_written(self, tmp_path: Path) -> None:
        started = threading.Event()

        def finish(crc32c: Any, stop: Any) -> bytes:
            started.set()
            return b"longer than planned"

        def slow(_: int) -> None:
            assert started.wait(20), "nobody began with the other file"

        files = [planned("f", [*stored(tmp_path / "s", 3)]), PlannedFile("index", 4, finish=finish)]
        _, index = write_files(str(tmp_path), files, slow)
        assert (index.nbytes, index.sha256) == (19, sha(b"longer than planned"))
        assert (tmp_path / "index").read_bytes() == b"longer than planned"

    def test_its_failure_is_the_one_reported(self, tmp_path: Path) -> None:
        def fail(crc32c: Any, stop: Any) -> bytes:
            raise UnsupportedError("cannot be made")

        files = [planned("f", [*stored(tmp_path / "s", 3)]), PlannedFile("index", 4, finish=fail)]
        with pytest.raises(UnsupportedError, match="cannot be made"):
            write_files(str(tmp_path), files)

    def test_a_failure_elsewhere_ends_its_waiting(self, tmp_path: Path) -> None:
        file = planned("f", [*stored(tmp_path / "s", 5)])
        os.truncate(tmp_path / "s", 3)
        with pytest.raises(InputError, match="truncated"):
            write_files(str(tmp_path), [file, self.index_of(file)])


def test_files_are_on_the_disk_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(fileops, "sync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    files = make_files(tmp_path)
    (tmp_path / "out").mkdir()
    write_files(str(tmp_path / "out"), files)
    assert synced == [file.nbytes for file in files]


class TestFailures:
    def test_a_source_that_became_shorter(self, tmp_path: Path) -> None:
        file = planned("f", [*stored(tmp_path / "s", 5, 7)])
        os.truncate(tmp_path / "s", 20)
        with pytest.raises(InputError, match="truncated; expected 48 bytes, found 20 bytes"):
            write_files(str(tmp_path), [file])

    def test_a_source_that_is_gone(self, tmp_path: Path) -> None:
        file = planned("f", [*stored(tmp_path / "s", 5, 7)])
        (tmp_path / "s").unlink()
        with pytest.raises(InputError, match="cannot be read"):
            write_files(str(tmp_path), [file])

    def test_a_full_disk_names_file_and_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        file = planned("deep/f", [*stored(tmp_path / "s", 5, 7)])
        with pytest.raises(OutputError, match=r"deep/f: .*No space left.* expected 48 bytes, found 0 bytes written"):
            write_files(str(tmp_path), [file])

    def test_existing_files_are_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"theirs")
        with pytest.raises(OutputError, match="File exists"):
            write_files(str(tmp_path), [PlannedFile.of_bytes("f", b"ours")])
        assert (tmp_path / "f").read_bytes() == b"theirs"

    def test_a_source_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(operation: str, nbytes: int) -> int:
            if operation == "read":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return nbytes

        monkeypatch.setattr(fileops, "fault", fail)
        with pytest.raises(InputError, match=r"cannot be read \(Input/output error\)"):
            write_files(str(tmp_path), [planned("f", [*stored(tmp_path / "s", 5, 7)])])

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

    def test_infinities_of_the_source_are_no_overflow(self, tmp_path: Path) -> None:
        base = stored_tensors(tmp_path / "s", {"w": np.array([1, np.inf, np.nan], np.float32)})["w"]
        file = PlannedFile("f", 6, b"", (Placed("w", Cast(base, np.dtype(np.float16)), 0),))
        write_files(str(tmp_path), [file])


class TestWriteAndDigest:
    @staticmethod
    def plans(checkpoint: Any) -> list[PlannedFile]:
        names = sorted(checkpoint.weights)
        raw, raw_end = place([(n, checkpoint.weights[n], n) for n in names])
        half, half_end = place([(n, Cast(checkpoint.weights[n], BFLOAT16), n) for n in names])
        return [
            PlannedFile("raw", raw_end, b"", raw),
            PlannedFile("half", half_end, b"", half),
            PlannedFile.of_bytes("config.json", b"{}"),
        ]

    def test_digests_of_everything(self, tmp_path: Path) -> None:
        (tmp_path / "encoder.json").write_bytes(b"{}")
        checkpoint = openai_checkpoint(tmp_path, tokenizer={"encoder.json": str(tmp_path / "encoder.json")})
        files = self.plans(checkpoint)
        (tmp_path / "out").mkdir()
        written = write_and_digest(str(tmp_path / "out"), files, checkpoint)
        for file, record in zip(files, written.files, strict=True):
            check(tmp_path / "out", file, record)
            data = (tmp_path / "out" / file.path).read_bytes()
            for placed in file.tensors:
                part = data[placed.offset : placed.offset + placed.tensor.nbytes]
                assert written.tensors[file.path, placed.name] == sha(part)
        assert len(written.tensors) == 2 * len(checkpoint.weights)
        assert written.sources == {
            str(path): FileDigest(path.stat().st_size, sha(path.read_bytes()))
            for path in (tmp_path / "weights.raw", tmp_path / "encoder.json")
        }

    def test_a_copied_source_is_hashed_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = openai_checkpoint(tmp_path)
        source = tmp_path / "weights.raw"
        whole = Stored((Segment(str(source), 0, source.stat().st_size),), np.dtype("u1"), (source.stat().st_size,))
        file = PlannedFile("copy", whole.nbytes, b"", (Placed("all", whole, 0),))
        hashed: list[str] = []
        monkeypatch.setattr(writer, "digest_files", lambda paths, stop, thorough: hashed.extend(paths) or {})
        (tmp_path / "out").mkdir()
        written = write_and_digest(str(tmp_path / "out"), [file], checkpoint)
        assert hashed == []
        assert written.sources[str(source)] == FileDigest(whole.nbytes, sha(source.read_bytes()))

    def test_each_byte_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = openai_checkpoint(tmp_path)
        read: list[int] = []
        real = fileops.read
        monkeypatch.setattr(fileops, "read", lambda *args: (read.append(args[1]), real(*args))[1])
        monkeypatch.setattr(writer, "digest_files", lambda paths, stop, thorough: {})
        raw, _, _ = self.plans(checkpoint)
        (tmp_path / "out").mkdir()
        write_and_digest(str(tmp_path / "out"), [raw], checkpoint)
        unused = {name for name in checkpoint.source.tensors if name not in checkpoint.dropped}
        assert sum(read) == sum(checkpoint.source.tensors[name].nbytes for name in unused)

    def test_a_tensor_that_comes_twice_in_another(self, tmp_path: Path) -> None:
        """Its recorded checksum is compared with its bytes once, not with twice its bytes, and not with none."""
        checkpoint = openai_checkpoint(tmp_path)
        name, tensor = next(
            (n, t) for n, t in checkpoint.source.tensors.items() if isinstance(t, Stored) and t.nbytes
        )
        raw = b"".join((tmp_path / "weights.raw").read_bytes()[s.offset : s.end] for s in tensor.parts)
        known = dataclasses.replace(tensor, crc32c=google_crc32c.value(raw))
        source = dataclasses.replace(checkpoint.source, tensors=TensorSet({name: known}, checkpoint.source.files))
        checkpoint = dataclasses.replace(checkpoint, source=source, dropped={})
        (tmp_path / "out").mkdir()
        file = planned("f", [concatenate([known, known])])
        written = write_and_digest(str(tmp_path / "out"), [file], checkpoint)
        check(tmp_path / "out", file, written.files[0])

    @pytest.mark.parametrize("part", ["read_rest", "digest_files", "progress"])
    def test_one_failure_stops_the_others_and_is_the_one_reported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
    ) -> None:
        """Each part in turn fails while the others work without end until told to stop."""
        checkpoint = openai_checkpoint(tmp_path)

        def act(name: str) -> Any:
            def work(*args: object, **_: object) -> None:
                if name == part:
                    raise InputError("broken")
                event = next((a for a in args if isinstance(a, threading.Event)), None)
                assert event is not None
                assert event.wait(20), "nobody said stop"
                raise StoppedError

            return work

        monkeypatch.setattr(SourceScan, "read_rest", act("read_rest"))
        monkeypatch.setattr(writer, "digest_files", act("digest_files"))
        (tmp_path / "out").mkdir()
        start = time.monotonic()
        with pytest.raises(InputError, match="broken"):
            write_and_digest(
                str(tmp_path / "out"),
                self.plans(checkpoint),
                checkpoint,
                act("progress") if part == "progress" else None,
            )
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize("where", ["hashing", "writing"])
    def test_a_failing_thread_ends_the_filling(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        """Many more blocks than buffers: whoever fills them must not wait for ever."""
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
        (tensor,) = stored(tmp_path / "s", 5000)

        class Broken:
            def update(self, data: object) -> None:
                raise InputError("broken")

        def broken(*_: object) -> None:
            raise InputError("broken")

        if where == "writing":
            monkeypatch.setattr(fileops, "copy", broken)
        else:
            monkeypatch.setattr(sink.hashlib, "sha256", Broken)
        with pytest.raises(InputError, match="broken"):
            write_files(str(tmp_path), [planned("f", [tensor])])

    @pytest.mark.parametrize("error", [OutputError("full"), KeyboardInterrupt()])
    def test_whatever_ends_the_writing_ends_the_reading(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        checkpoint = openai_checkpoint(tmp_path)

        def endless(_: object, stop: threading.Event) -> None:
            assert stop.wait(20), "nobody said stop"
            raise StoppedError

        def fail(_: int) -> None:
            raise error

        monkeypatch.setattr(SourceScan, "read_rest", endless)
        (tmp_path / "out").mkdir()
        start = time.monotonic()
        with pytest.raises(type(error)):
            write_and_digest(str(tmp_path / "out"), self.plans(checkpoint), checkpoint, fail)
        assert time.monotonic() - start < 10

    def test_a_failing_writer_stops_the_readers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = openai_checkpoint(tmp_path)

        def endless(_: object, stop: threading.Event) -> None:
            assert stop.wait(20), "nobody said stop"
            raise StoppedError

        monkeypatch.setattr(SourceScan, "read_rest", endless)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "raw").mkdir()
        with pytest.raises(OutputError, match="raw"):
            write_and_digest(str(tmp_path / "out"), self.plans(checkpoint), checkpoint)

    def test_corrupt_source(self, tmp_path: Path) -> None:
        checkpoint = openai_checkpoint(tmp_path)
        data = bytearray((tmp_path / "weights.raw").read_bytes())
        data[5:9] = np.float32(np.nan).tobytes()
        (tmp_path / "weights.raw").write_bytes(data)
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match="NaN or infinite"):
            write_and_digest(str(tmp_path / "out"), self.plans(checkpoint), checkpoint)
        (tmp_path / "again").mkdir()
        written = write_and_digest(str(tmp_path / "again"), self.plans(checkpoint), checkpoint, allow_nonfinite=True)
        assert "NaN or infinite" in written.notes[0]


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


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """A tensor of 192 MiB, copied and converted, within 96 MiB of private memory, two threads' stacks included."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "f").stat().st_size == 288 << 20
    (tmp_path / "f").unlink()
