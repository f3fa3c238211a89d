"""Write and check the source in one pass: correct digests, every byte read once, and one error for all threads."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import time
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from gptconvert.errors import GptConvertError, InputError, OutputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.export import Placed, PlannedFile, place
from gptconvert.model.tensors import Cast, Segment, Stored, TensorSet
from gptconvert.model.transforms import concatenate
from gptconvert.publish.file_system import OS, FileSystem
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.source_reader import FileDigest
from gptconvert.publish.writer import write_and_digest, write_files
from tests.helpers import openai_checkpoint, stored_tensors
from tests.publish.cases import check, planned, sha, stored
from tests.publishing import failing, file_system


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def plans(checkpoint: Checkpoint) -> list[PlannedFile]:
    """A file without tensors, one of copied tensors, one of computed tensors."""
    names = sorted(checkpoint.weights)
    copied, copied_end = place([(n, checkpoint.weights[n], n) for n in names])
    half, half_end = place([(n, Cast(checkpoint.weights[n], BFLOAT16), n) for n in names])
    return [
        PlannedFile.of_bytes("config.json", b"{}"),
        PlannedFile("copied", copied_end, b"", copied),
        PlannedFile("half", half_end, b"", half),
    ]


class CountingFileSystem(FileSystem):
    """Counts the bytes read."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def read(self, descriptor: int, nbytes: int, offset: int) -> bytes:
        data = super().read(descriptor, nbytes, offset)
        self.nbytes += len(data)
        return data


class TestDigests:
    def test_of_everything(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "encoder.json").write_bytes(b"{}")
        checkpoint = openai_checkpoint(tmp_path, tokenizer={"encoder.json": str(tmp_path / "encoder.json")})
        files = plans(checkpoint)
        written = write_and_digest(str(out), files, checkpoint)
        for file, record in zip(files, written.files, strict=True):
            check(out, file, record)
            data = (out / file.path).read_bytes()
            for placed in file.tensors:
                part = data[placed.offset : placed.offset + placed.tensor.nbytes]
                assert written.tensors[file.path, placed.name] == sha(part)
        assert len(written.tensors) == 2 * len(checkpoint.weights)
        assert written.sources == {
            str(path): FileDigest(path.stat().st_size, sha(path.read_bytes()))
            for path in (tmp_path / "weights.raw", tmp_path / "encoder.json")
        }

    def test_a_copied_source_is_hashed_once(self, tmp_path: Path, out: Path) -> None:
        checkpoint = openai_checkpoint(tmp_path)
        checkpoint = dataclasses.replace(checkpoint, dropped=dict.fromkeys(checkpoint.source.tensors, "not needed"))
        source = tmp_path / "weights.raw"
        whole = Stored((Segment(str(source), 0, source.stat().st_size),), np.dtype("u1"), (source.stat().st_size,))
        file = PlannedFile("copy", whole.nbytes, b"", (Placed("all", whole, 0),))
        counting = CountingFileSystem()
        written = write_and_digest(str(out), [file], checkpoint, settings=IoSettings(counting))
        assert counting.nbytes == whole.nbytes
        assert written.sources[str(source)] == FileDigest(whole.nbytes, sha(source.read_bytes()))

    def test_each_byte_is_read_once(self, tmp_path: Path, out: Path) -> None:
        checkpoint = openai_checkpoint(tmp_path)
        counting = CountingFileSystem()
        _, copied, _ = plans(checkpoint)
        write_and_digest(str(out), [copied], checkpoint, settings=IoSettings(counting))
        used = [name for name in checkpoint.source.tensors if name not in checkpoint.dropped]
        tensor_bytes = sum(checkpoint.source.tensors[name].nbytes for name in used)
        whole_files = (tmp_path / "weights.raw").stat().st_size  # for the digests of the inputs
        assert counting.nbytes == tensor_bytes + whole_files

    def test_a_tensor_that_occurs_twice_in_another(self, tmp_path: Path, out: Path) -> None:
        """Its recorded checksum covers its bytes exactly once."""
        checkpoint = openai_checkpoint(tmp_path)
        name, tensor = next(
            (n, t) for n, t in checkpoint.source.tensors.items() if isinstance(t, Stored) and t.nbytes
        )
        raw = b"".join((tmp_path / "weights.raw").read_bytes()[s.offset : s.end] for s in tensor.parts)
        known = dataclasses.replace(tensor, crc32c=google_crc32c.value(raw))
        source = dataclasses.replace(checkpoint.source, tensors=TensorSet({name: known}, checkpoint.source.files))
        checkpoint = dataclasses.replace(checkpoint, source=source, dropped={})
        file = planned("f", [concatenate([known, known])])
        written = write_and_digest(str(out), [file], checkpoint)
        check(out, file, written.files[0])

    def test_corrupt_source(self, tmp_path: Path, out: Path) -> None:
        checkpoint = openai_checkpoint(tmp_path)
        data = bytearray((tmp_path / "weights.raw").read_bytes())
        data[5:9] = np.float32(np.nan).tobytes()
        (tmp_path / "weights.raw").write_bytes(data)
        with pytest.raises(InputError, match="NaN or infinite"):
            write_and_digest(str(out), plans(checkpoint), checkpoint)
        (tmp_path / "again").mkdir()
        written = write_and_digest(str(tmp_path / "again"), plans(checkpoint), checkpoint, allow_nonfinite=True)
        assert "NaN or infinite" in written.notes[0]


class EndlessFileSystem(FileSystem):
    """Read a byte at a time, so slowly that only cancellation can end it.

    Args:
        broken: name of a source file that cannot be opened.
    """

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.broken, self.deadline = broken, time.monotonic() + 20

    def open_source(self, path: str) -> int:
        if os.path.basename(path) == self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().open_source(path)

    def read(self, descriptor: int, nbytes: int, offset: int) -> bytes:
        time.sleep(0.01)
        assert time.monotonic() < self.deadline, "reading was not cancelled"
        return super().read(descriptor, 1, offset)


class TestFailures:
    """A failure cancels everything else, and its error is raised."""

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Checkpoint:
        """The scan alone reads the file ``unexported``; the pass over whole files starts with ``encoder.json``."""
        checkpoint = openai_checkpoint(tmp_path)
        (tmp_path / "encoder.json").write_bytes(b"{}")
        extra = stored_tensors(tmp_path / "unexported", {"extra": np.ones(9, "f4")})["extra"]
        files = (str(tmp_path / "encoder.json"), *checkpoint.source.files)
        tensors = TensorSet({**checkpoint.source.tensors, "extra": extra}, files)
        return dataclasses.replace(checkpoint, source=dataclasses.replace(checkpoint.source, tensors=tensors))

    def cancelled_by(
        self,
        error: type[BaseException],
        match: str,
        checkpoint: Checkpoint,
        out: Path,
        broken: str = "",
        raised: BaseException | None = None,
    ) -> None:
        def progress(nbytes: int) -> None:
            if raised is not None:
                raise raised

        endless = EndlessFileSystem(broken)
        start = time.monotonic()
        with pytest.raises(error, match=match):
            write_and_digest(str(out), plans(checkpoint), checkpoint, progress, settings=IoSettings(endless))
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize("broken", ["unexported", "encoder.json", "weights.raw"])
    def test_an_unreadable_source(self, checkpoint: Checkpoint, out: Path, broken: str) -> None:
        """Found by the scan, by the pass over whole files, or by the writer."""
        self.cancelled_by(InputError, "cannot be read", checkpoint, out, broken)

    @pytest.mark.parametrize("error", [InputError("broken"), OutputError("broken"), KeyboardInterrupt("broken")])
    def test_an_error_in_the_calling_thread(self, checkpoint: Checkpoint, out: Path, error: BaseException) -> None:
        self.cancelled_by(type(error), "broken", checkpoint, out, raised=error)

    def test_an_unwritable_file(self, checkpoint: Checkpoint, out: Path) -> None:
        (out / "copied").mkdir()
        self.cancelled_by(OutputError, "copied", checkpoint, out)

    @pytest.mark.parametrize("where", ["hashing", "writing"])
    def test_failing_thread_stops_the_filling_thread(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        """With many more blocks than buffers, the filling thread must not wait forever for a free buffer."""
        (tensor,) = stored(tmp_path / "s", 5000)

        class Broken:
            def update(self, data: object) -> None:
                raise InputError("Input/output error")

        if where == "hashing":
            monkeypatch.setattr(hashlib, "sha256", Broken)
        broken = file_system(copy=failing(errno.EIO)) if where == "writing" else OS
        with pytest.raises(GptConvertError, match="Input/output error"):
            write_files(str(tmp_path), [planned("f", [tensor])], settings=IoSettings(broken, block_bytes=64))
