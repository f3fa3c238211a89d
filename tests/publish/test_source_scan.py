"""The checksum pass over the source: checksums, values and digests, only of tensors in use."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import Cast, FileChecksum, LazyTensor, Segment, Stored, TensorSet, Transposed
from gptconvert.model.transforms import concatenate, take_rows
from gptconvert.publish.file_system import OS
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.source_reader import StoppedError
from gptconvert.publish.source_scan import SourceScan, sha256_of
from tests import helpers
from tests.helpers import Examined, computed_tensors, openai_checkpoint, source_of, stored_tensors
from tests.publishing import file_system


def sha(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def checkpoint(tensors: TensorSet, dropped: tuple[str, ...] = ()) -> Checkpoint:
    """A checkpoint of which only the source tensors matter."""
    config: Any = None
    return Checkpoint(config, tensors.tensors, source_of({}, tensors), dropped=dict.fromkeys(dropped, "not needed"))


def arrays(**extra: NDArray[Any]) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(3)
    return {"wte": rng.normal(size=(9, 4)).astype("f4"), "h0/w": rng.normal(size=(4, 5)).astype("f4")} | extra


Examine = Callable[..., Examined]


@pytest.fixture(params=[7, 1 << 20], ids=["tiny blocks", "real blocks"])
def examine(request: pytest.FixtureRequest) -> Examine:
    """Run a whole scan, with small reads or the default size."""
    return partial(helpers.examine, settings=IoSettings(read_bytes=request.param))


class TestDigests:
    def test_of_stored_sliced_and_stacked_tensors(self, tmp_path: Path, examine: Examine) -> None:
        data = arrays(empty=np.zeros((0, 3), "f4"))
        tensors = stored_tensors(tmp_path / "s", data)
        wte, w = tensors["wte"], tensors["h0/w"]
        rows = take_rows(wte, [(6, 9), (0, 2)])
        stacked = concatenate([rows, wte])
        digests = examine(checkpoint(tensors), [wte, w, rows, stacked, tensors["empty"]])
        picked = np.concatenate([data["wte"][6:9], data["wte"][:2]])
        assert digests.of(wte) == sha(data["wte"])
        assert digests.of(w) == sha(data["h0/w"])
        assert digests.of(rows) == sha(picked)
        assert digests.of(stacked) == sha(np.concatenate([picked, data["wte"]]))
        assert digests.of(tensors["empty"]) == sha(data["empty"])

    def test_are_found_by_location_not_by_object(self, tmp_path: Path, examine: Examine) -> None:
        """Another shape and other parts, but the same bytes."""
        data = arrays()
        tensors = stored_tensors(tmp_path / "s", data)
        (part,) = tensors["wte"].segments() or ()
        halves = (Segment(part.path, part.offset, 16), Segment(part.path, part.offset + 16, part.nbytes - 16))
        digests = examine(checkpoint(tensors), [tensors["wte"]])
        assert digests.of(Stored(halves, np.dtype("f4"), (36,))) == sha(data["wte"])

    def test_computed_tensors_have_no_digest(self, tmp_path: Path, examine: Examine) -> None:
        tensors = stored_tensors(tmp_path / "s", arrays())
        turned = Transposed(tensors["wte"])
        assert examine(checkpoint(tensors), [turned]).of(turned) is None

    @pytest.mark.parametrize("read_bytes", [7, 1 << 20])
    def test_each_byte_is_read_once(self, tmp_path: Path, read_bytes: int) -> None:
        data = arrays()
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data)
        read: list[int] = []

        def counting(descriptor: int, nbytes: int, offset: int) -> bytes:
            data = OS.read(descriptor, nbytes, offset)
            read.append(len(data))
            return data

        (part,) = tensors["wte"].segments() or ()
        halves = (Segment(part.path, part.offset, 16), Segment(part.path, part.offset + 16, part.nbytes - 16))
        io = IoSettings(file_system(read=counting), read_bytes=read_bytes)
        helpers.examine(checkpoint(tensors), [*tensors.values(), Stored(halves, np.dtype("f4"), (36,))], settings=io)
        assert sum(read) == sum(array.nbytes for array in data.values())

    @pytest.mark.parametrize("read_bytes", [7, 1 << 20])
    def test_sha256_of_any_tensor(self, tmp_path: Path, read_bytes: int) -> None:
        data, io = arrays(), IoSettings(read_bytes=read_bytes)
        tensors = stored_tensors(tmp_path / "s", data)
        assert sha256_of("t", tensors["wte"], io) == sha(data["wte"])
        assert sha256_of("t", Transposed(tensors["wte"]), io) == sha(data["wte"].T)
        assert sha256_of("t", Cast(tensors["wte"], BFLOAT16), io) == sha(data["wte"].astype(BFLOAT16))


def _with_checksums(tensors: TensorSet, data: dict[str, NDArray[Any]], wrong: str | None = None) -> TensorSet:
    """The tensors with the CRC-32C that a TensorFlow index records for them."""

    def recorded(name: str, tensor: LazyTensor) -> LazyTensor:
        assert isinstance(tensor, Stored)
        crc = google_crc32c.value(data[name].tobytes())
        return dataclasses.replace(tensor, crc32c=crc ^ (name == wrong))

    return TensorSet({name: recorded(name, t) for name, t in tensors.items()}, tensors.files)


class TestChecksums:
    def test_correct_checksums_pass(self, tmp_path: Path, examine: Examine) -> None:
        data = arrays()
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data)
        assert examine(checkpoint(tensors)).notes == ()

    @pytest.mark.parametrize("byte", [1, 100, 1 + 9 * 4 * 4, -1])
    def test_one_flipped_bit_names_tensor_and_file(self, tmp_path: Path, byte: int, examine: Examine) -> None:
        data = arrays()
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data)
        content = bytearray((tmp_path / "s").read_bytes())
        content[byte] ^= 1
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(InputError, match="crc32c checksum does not match; expected 0x") as caught:
            examine(checkpoint(tensors))
        assert caught.value.item == ("wte" if 0 < byte <= 9 * 4 * 4 else "h0/w")
        assert caught.value.path == str(tmp_path / "s")
        assert "mixed" in str(caught.value.hint)
        assert caught.value.exit_code == 3

    def test_of_a_tensor_exported_in_slices(self, tmp_path: Path, examine: Examine) -> None:
        """The checksum covers the whole tensor, even if only a slice is exported."""
        data = arrays()
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data, wrong="wte")
        with pytest.raises(InputError, match="checksum"):
            examine(checkpoint(tensors), [take_rows(tensors["wte"], [(0, 1)])])

    def test_all_damaged_tensors_are_listed(self, tmp_path: Path, examine: Examine) -> None:
        data = arrays(nan=np.full(3, np.nan, "f4"))
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data, wrong="wte")
        with pytest.raises(InputError, match="2 tensors are damaged") as caught:
            examine(checkpoint(tensors))
        assert "wte: crc32c" in str(caught.value)
        assert "nan: 3 of 3 values" in str(caught.value)

    def test_dropped_tensors_are_not_read(self, tmp_path: Path, examine: Examine) -> None:
        data = arrays(adam=np.full(3, np.nan, "f4"))
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data, wrong="adam")
        with pytest.raises(InputError, match="adam"):
            examine(checkpoint(tensors))
        assert examine(checkpoint(tensors, dropped=("adam",))).notes == ()

    @pytest.mark.parametrize("algorithm", ["crc32", "crc32c"])
    def test_of_a_run_of_bytes(self, tmp_path: Path, algorithm: str, examine: Examine) -> None:
        """As in a zip: the run may contain several tensors and more."""
        data = arrays()
        tensors = stored_tensors(tmp_path / "s", data)
        content = (tmp_path / "s").read_bytes()
        value = zlib.crc32(content) if algorithm == "crc32" else google_crc32c.value(content)
        whole = Segment(str(tmp_path / "s"), 0, len(content))
        for right in (True, False):
            recorded = FileChecksum(whole, algorithm, value if right else value ^ 1, "archive/data/0")
            case = checkpoint(dataclasses.replace(tensors, checksums=(recorded,)))
            if right:
                assert examine(case, [tensors["wte"]]).of(tensors["wte"]) == sha(data["wte"])
                continue
            with pytest.raises(InputError, match=f"archive/data/0: {algorithm} checksum does not match"):
                examine(case)

    def test_of_bytes_that_only_dropped_tensors_use_is_skipped(self, tmp_path: Path, examine: Examine) -> None:
        tensors = stored_tensors(tmp_path / "s", arrays())
        (used,), (unused,) = tensors["wte"].segments() or (), tensors["h0/w"].segments() or ()
        elsewhere = Segment(str(tmp_path / "s"), 0, 1)

        def fails(segment: Segment) -> bool:
            wrong = FileChecksum(segment, "crc32", 0xBAD, "member")
            try:
                examine(checkpoint(dataclasses.replace(tensors, checksums=(wrong,)), dropped=("h0/w",)))
            except InputError:
                return True
            return False

        assert fails(used)
        assert fails(Segment(used.path, used.end - 1, 2))
        assert fails(Segment(used.path, used.offset, used.nbytes + unused.nbytes))
        assert not fails(unused)
        assert fails(elsewhere)  # a computed tensor may use bytes outside all stored tensors


class TestValues:
    @pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ">f4", "bfloat16", "float8_e5m2"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, tmp_path: Path, dtype: str, bad: float, examine: Examine) -> None:
        kind = np.dtype(getattr(ml_dtypes, dtype)) if dtype[0] in "bf" and len(dtype) > 3 else np.dtype(dtype)
        array = np.ones((3, 5), kind)
        array[1, 2] = array[2, 4] = bad
        tensors = stored_tensors(tmp_path / "s", {"good": np.ones(4, "f4"), "w": array})
        with pytest.raises(
            InputError, match=r"w: 2 of 15 values are NaN or infinite, the first at \[1, 2\]"
        ) as caught:
            examine(checkpoint(tensors))
        assert "--allow-nonfinite" in str(caught.value.hint)
        notes = examine(checkpoint(tensors), allow_nonfinite=True).notes
        assert notes == ("w: 2 of 15 values are NaN or infinite, the first at [1, 2]",)

    def test_large_values_whose_sum_overflows_pass(self, tmp_path: Path, examine: Examine) -> None:
        array = np.full(100, np.finfo(np.float32).max)
        assert examine(checkpoint(stored_tensors(tmp_path / "s", {"w": array}))).notes == ()

    def test_integers_have_no_nan(self, tmp_path: Path, examine: Examine) -> None:
        array = np.array([0x7FC00000, -1], np.int32)
        assert examine(checkpoint(stored_tensors(tmp_path / "s", {"w": array}))).notes == ()

    def test_of_computed_tensors(self, examine: Examine) -> None:
        tensors = computed_tensors({"w": np.array([[1, 2], [np.inf, 4]], np.float32), "step": np.array([7])})
        with pytest.raises(InputError, match=r"w: 1 of 4 values are NaN or infinite, the first at \[1, 0\]"):
            examine(checkpoint(tensors))

    def test_all_zeros_are_noted_except_in_biases(self, tmp_path: Path, examine: Examine) -> None:
        zeros = {name: np.zeros((2, 3), "f4") for name in ("h.0.w", "ln/g", "h/b", "h.0.bias", "ln.beta")}
        zeros["almost"] = np.array([0, 0, 0, 1e-45], np.float32)
        zeros["half"] = np.zeros(3, BFLOAT16)
        notes = examine(checkpoint(stored_tensors(tmp_path / "s", zeros))).notes
        assert set(notes) == {"h.0.w is all zeros", "ln/g is all zeros", "half is all zeros"}

    def test_elements_that_straddle_files(self, tmp_path: Path, examine: Examine) -> None:
        """GPT-1's shards end at arbitrary bytes."""
        data = np.array([1, np.nan, 3], np.float32).tobytes()
        (tmp_path / "a").write_bytes(data[:6])
        (tmp_path / "b").write_bytes(data[6:])
        parts = (Segment(str(tmp_path / "a"), 0, 6), Segment(str(tmp_path / "b"), 0, 6))
        tensors = TensorSet({"w": Stored(parts, np.dtype("f4"), (3,))}, ())
        with pytest.raises(InputError, match=r"1 of 3 values are NaN or infinite, the first at \[1\]"):
            examine(checkpoint(tensors))


def test_real_checkpoint_passes(tmp_path: Path, examine: Examine) -> None:
    case = openai_checkpoint(tmp_path)
    digests = examine(case, case.weights.values())
    stored = [weight for weight in case.weights.values() if weight.segments() is not None]
    assert len(stored) > 10
    assert all(digests.of(weight) == sha(weight.read()) for weight in stored)


def test_stops_when_cancelled(tmp_path: Path, examine: Examine) -> None:
    stop = threading.Event()
    stop.set()
    for tensors in (stored_tensors(tmp_path / "s", arrays()), computed_tensors(arrays())):
        with pytest.raises(StoppedError):
            examine(checkpoint(tensors), stop=stop)


def test_truncated_files(tmp_path: Path, examine: Examine) -> None:
    tensors = stored_tensors(tmp_path / "s", arrays())
    (tmp_path / "s").write_bytes(b"short")
    with pytest.raises(InputError, match="truncated; expected 145 bytes, found 5 bytes"):
        examine(checkpoint(tensors))


class TestClaims:
    """Code that reads bytes for another purpose can feed their checks."""

    def test_claimed_bytes_are_not_read_again(self, tmp_path: Path) -> None:
        data = arrays()
        tensors = stored_tensors(tmp_path / "s", data)
        scan = SourceScan(checkpoint(tensors), [tensors["wte"]])
        segments = tensors["wte"].segments() or ()
        task = scan.claim(segments)
        assert task is not None
        assert scan.claim(segments) is None
        (tmp_path / "s").write_bytes(b"?" * segments[0].end + data["h0/w"].tobytes())
        raw = data["wte"].tobytes()
        task.update(raw[:5])
        task.update(raw[5:])
        scan.run_unclaimed()
        assert scan.digests().of(tensors["wte"]) == sha(data["wte"])
        assert scan.check_results() == ()

    def test_other_bytes_have_no_task_to_claim(self, tmp_path: Path) -> None:
        tensors = stored_tensors(tmp_path / "s", arrays())
        (segment,) = tensors["wte"].segments() or ()
        scan = SourceScan(checkpoint(tensors))
        assert scan.claim((Segment(segment.path, segment.offset, segment.nbytes - 1),)) is None
