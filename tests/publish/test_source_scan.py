"""One reading of the source: checksums, values, digests; and only of what is used."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import zlib
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import Cast, FileChecksum, LazyTensor, Segment, Stored, TensorSet, Transposed
from gptconvert.model.transforms import concatenate, take_rows
from gptconvert.publish import fileops, source_reader
from gptconvert.publish.finite import Values, finite, is_float
from gptconvert.publish.source_reader import FileDigest, SourceReader, StoppedError, digest_files
from gptconvert.publish.source_scan import sha256_of
from tests.helpers import computed_tensors, examine, source_of, stored_tensors
from tests.helpers import openai_checkpoint as tiny


def sha(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def checkpoint(tensors: TensorSet, dropped: tuple[str, ...] = ()) -> Checkpoint:
    """A checkpoint of which only the source's tensors matter."""
    config: Any = None
    return Checkpoint(config, tensors.tensors, source_of({}, tensors), dropped=dict.fromkeys(dropped, "not needed"))


def arrays(**extra: NDArray[Any]) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(3)
    return {"wte": rng.normal(size=(9, 4)).astype("f4"), "h0/w": rng.normal(size=(4, 5)).astype("f4")} | extra


@pytest.fixture(autouse=True, params=[7, 1 << 20], ids=["tiny blocks", "real blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_reader, "BLOCK_BYTES", request.param)


class TestDigests:
    def test_of_stored_sliced_and_stacked_tensors(self, tmp_path: Path) -> None:
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

    def test_are_found_by_place_not_by_object(self, tmp_path: Path) -> None:
        """Other shape, other parts, same bytes."""
        data = arrays()
        tensors = stored_tensors(tmp_path / "s", data)
        (part,) = tensors["wte"].segments() or ()
        halves = (Segment(part.path, part.offset, 16), Segment(part.path, part.offset + 16, part.nbytes - 16))
        digests = examine(checkpoint(tensors), [tensors["wte"]])
        assert digests.of(Stored(halves, np.dtype("f4"), (36,))) == sha(data["wte"])

    def test_computed_tensors_have_none(self, tmp_path: Path) -> None:
        tensors = stored_tensors(tmp_path / "s", arrays())
        turned = Transposed(tensors["wte"])
        assert examine(checkpoint(tensors), [turned]).of(turned) is None

    def test_each_byte_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = arrays()
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data)
        read: list[int] = []
        real = fileops.read
        monkeypatch.setattr(fileops, "read", lambda *args: (read.append(args[1]), real(*args))[1])
        (part,) = tensors["wte"].segments() or ()
        halves = (Segment(part.path, part.offset, 16), Segment(part.path, part.offset + 16, part.nbytes - 16))
        examine(checkpoint(tensors), [*tensors.values(), Stored(halves, np.dtype("f4"), (36,))])
        assert sum(read) == sum(array.nbytes for array in data.values())

    def test_sha256_of_any_tensor(self, tmp_path: Path) -> None:
        data = arrays()
        tensors = stored_tensors(tmp_path / "s", data)
        assert sha256_of("t", tensors["wte"]) == sha(data["wte"])
        assert sha256_of("t", Transposed(tensors["wte"])) == sha(data["wte"].T)
        assert sha256_of("t", Cast(tensors["wte"], BFLOAT16)) == sha(data["wte"].astype(BFLOAT16))


def _with_checksums(tensors: TensorSet, data: dict[str, NDArray[Any]], wrong: str | None = None) -> TensorSet:
    """The tensors with the CRC-32C that a TensorFlow index records for them."""

    def recorded(name: str, tensor: LazyTensor) -> LazyTensor:
        assert isinstance(tensor, Stored)
        crc = google_crc32c.value(data[name].tobytes())
        return dataclasses.replace(tensor, crc32c=crc ^ (name == wrong))

    return TensorSet({name: recorded(name, t) for name, t in tensors.items()}, tensors.files)


class TestChecksums:
    def test_right_ones_pass(self, tmp_path: Path) -> None:
        data = arrays()
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data)
        assert examine(checkpoint(tensors)).notes == ()

    @pytest.mark.parametrize("byte", [1, 100, 1 + 9 * 4 * 4, -1])
    def test_one_flipped_bit_names_tensor_and_file(self, tmp_path: Path, byte: int) -> None:
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

    def test_of_a_tensor_exported_in_slices(self, tmp_path: Path) -> None:
        """The checksum is of the whole, whatever becomes of its parts."""
        data = arrays()
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data, wrong="wte")
        with pytest.raises(InputError, match="checksum"):
            examine(checkpoint(tensors), [take_rows(tensors["wte"], [(0, 1)])])

    def test_all_damaged_tensors_are_listed(self, tmp_path: Path) -> None:
        data = arrays(nan=np.full(3, np.nan, "f4"))
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data, wrong="wte")
        with pytest.raises(InputError, match="2 tensors are damaged") as caught:
            examine(checkpoint(tensors))
        assert "wte: crc32c" in str(caught.value)
        assert "nan: 3 of 3 values" in str(caught.value)

    def test_dropped_tensors_are_not_read(self, tmp_path: Path) -> None:
        data = arrays(adam=np.full(3, np.nan, "f4"))
        tensors = _with_checksums(stored_tensors(tmp_path / "s", data), data, wrong="adam")
        with pytest.raises(InputError, match="adam"):
            examine(checkpoint(tensors))
        assert examine(checkpoint(tensors, dropped=("adam",))).notes == ()

    @pytest.mark.parametrize("algorithm", ["crc32", "crc32c"])
    def test_of_a_run_of_bytes(self, tmp_path: Path, algorithm: str) -> None:
        """As in a zip: the run may hold several tensors and more."""
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

    def test_of_bytes_that_only_dropped_tensors_use_is_passed_over(self, tmp_path: Path) -> None:
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
        assert fails(elsewhere)  # bytes of no known tensor may be what a computed one is made of


class TestValues:
    @pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ">f4", "bfloat16", "float8_e5m2"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, tmp_path: Path, dtype: str, bad: float) -> None:
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

    def test_large_values_whose_sum_overflows_are_fine(self, tmp_path: Path) -> None:
        array = np.full(100, np.finfo(np.float32).max)
        assert examine(checkpoint(stored_tensors(tmp_path / "s", {"w": array}))).notes == ()

    def test_integers_have_no_nan(self, tmp_path: Path) -> None:
        array = np.array([0x7FC00000, -1], np.int32)
        assert examine(checkpoint(stored_tensors(tmp_path / "s", {"w": array}))).notes == ()

    def test_of_tensors_that_lie_in_no_file(self) -> None:
        tensors = computed_tensors({"w": np.array([[1, 2], [np.inf, 4]], np.float32), "step": np.array([7])})
        with pytest.raises(InputError, match=r"w: 1 of 4 values are NaN or infinite, the first at \[1, 0\]"):
            examine(checkpoint(tensors))

    def test_all_zeros_are_noted_except_in_biases(self, tmp_path: Path) -> None:
        zeros = {name: np.zeros((2, 3), "f4") for name in ("h.0.w", "ln/g", "h/b", "h.0.bias", "ln.beta")}
        zeros["almost"] = np.array([0, 0, 0, 1e-45], np.float32)
        zeros["half"] = np.zeros(3, BFLOAT16)
        notes = examine(checkpoint(stored_tensors(tmp_path / "s", zeros))).notes
        assert set(notes) == {"h.0.w is all zeros", "ln/g is all zeros", "half is all zeros"}

    def test_elements_that_straddle_files(self, tmp_path: Path) -> None:
        """GPT-1's shards end where they like."""
        data = np.array([1, np.nan, 3], np.float32).tobytes()
        (tmp_path / "a").write_bytes(data[:6])
        (tmp_path / "b").write_bytes(data[6:])
        parts = (Segment(str(tmp_path / "a"), 0, 6), Segment(str(tmp_path / "b"), 0, 6))
        tensors = TensorSet({"w": Stored(parts, np.dtype("f4"), (3,))}, ())
        with pytest.raises(InputError, match=r"1 of 3 values are NaN or infinite, the first at \[1\]"):
            examine(checkpoint(tensors))


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=0, max_size=64), st.sampled_from(["f2", "f4", "f8", "bfloat16"]), st.integers(1, 9))
def test_finite_agrees_with_numpy_on_any_bits(data: bytes, dtype: str, step: int) -> None:
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    data = data[: len(data) - len(data) % kind.itemsize]
    array = np.frombuffer(data, kind)
    wide = array.astype(np.float64)
    assert (finite(array) == np.isfinite(wide)).all()
    values = Values(kind)
    for start in range(0, len(data), step):
        values.update(data[start : start + step])
    assert values.nonfinite == (~np.isfinite(wide)).sum()
    assert values.nonzero == bool((wide != 0).any())
    if values.nonfinite:
        assert values.first == int(np.flatnonzero(~np.isfinite(wide))[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, BFLOAT16, ml_dtypes.float8_e4m3fn])
def test_is_float(dtype: Any) -> None:
    assert is_float(np.dtype(dtype))
    assert not is_float(np.dtype(np.int32))
    assert not is_float(np.dtype(np.bool_))


class TestReading:
    def test_whole_files(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x" * 1000)
        (tmp_path / "b").write_bytes(b"")
        paths = [str(tmp_path / "a"), str(tmp_path / "b")]
        assert digest_files(paths) == {
            paths[0]: FileDigest(1000, hashlib.sha256(b"x" * 1000).hexdigest()),
            paths[1]: FileDigest(0, hashlib.sha256().hexdigest()),
        }

    def test_large_files_are_summed_where_nothing_is_proven(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source_reader, "SMALL_BYTES", 999)
        small, large = b"s" * 999, b"l" * 1000
        (tmp_path / "small").write_bytes(small)
        (tmp_path / "large").write_bytes(large)
        paths = [str(tmp_path / "small"), str(tmp_path / "large")]
        assert digest_files(paths, thorough=False) == {
            paths[0]: FileDigest(999, hashlib.sha256(small).hexdigest()),
            paths[1]: FileDigest(1000, f"{google_crc32c.value(large):08x}", "crc32c"),
        }
        assert digest_files(paths)[paths[1]] == FileDigest(1000, hashlib.sha256(large).hexdigest())

    def test_missing_and_truncated_files(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            digest_files([str(tmp_path / "nothing")])
        tensors = stored_tensors(tmp_path / "s", arrays())
        (tmp_path / "s").write_bytes(b"short")
        with pytest.raises(InputError, match="truncated; expected 145 bytes, found 5 bytes"):
            examine(checkpoint(tensors))

    def test_stops_when_told(self, tmp_path: Path) -> None:
        stop = threading.Event()
        stop.set()
        tensors = stored_tensors(tmp_path / "s", arrays())
        with pytest.raises(StoppedError):
            examine(checkpoint(tensors), stop=stop)
        with pytest.raises(StoppedError):
            digest_files(tensors.files, stop)
        with pytest.raises(StoppedError):
            examine(checkpoint(computed_tensors(arrays())), stop=stop)

    def test_keeps_one_file_open(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).write_bytes(b"12345")
        with SourceReader() as reader:
            first = reader.open(str(tmp_path / "a"))
            assert reader.open(str(tmp_path / "a")) == first
            segments = [Segment(str(tmp_path / n), 1, 3) for n in "aba"]
            assert b"".join(reader.blocks(segments)) == b"234234234"


def test_a_real_checkpoint_is_clean(tmp_path: Path) -> None:
    case = tiny(tmp_path)
    digests = examine(case, case.weights.values())
    stored = [weight for weight in case.weights.values() if weight.segments() is not None]
    assert len(stored) > 10
    assert all(digests.of(weight) == sha(weight.read()) for weight in stored)
