"""The bundle reader compared with TensorFlow's, and tested on malformed files."""

from __future__ import annotations

import builtins
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptconvert.containers.tf_bundle import read_bundle, string_scalar
from gptconvert.containers.tf_index import piece_key
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.tensors import Joined, Stored, TensorSet
from tests.containers import bundle_bytes as made
from tests.containers.damage import damaged
from tests.helpers import FIXTURES, NO_RELEASED_FILES, REAL_GPT2

Arrays = Mapping[str, NDArray[Any]]

PREFIXES = sorted(str(path)[: -len(".index")] for path in FIXTURES.glob("*/**/*.index"))
ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b/c": np.arange(5, dtype=np.int64),
    "b/d": np.float16([[1.5]]),
}


def by_tensorflow(tf: Any, prefix: str) -> Arrays:
    reader = tf.train.load_checkpoint(prefix)
    return {name: np.asarray(reader.get_tensor(name)) for name in reader.get_variable_to_shape_map()}


def save(tf: Any, prefix: Path, arrays: Arrays, slices: Mapping[str, str] | None = None) -> Path:
    """Save with TensorFlow's SaveV2; ``slices`` maps a name (``name`` or ``name#i``) to its shape and slice."""
    names = list(arrays)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=[name.partition("#")[0] for name in names],
        shape_and_slices=[(slices or {}).get(name, "") for name in names],
        tensors=[tf.constant(arrays[name]) for name in names],
    )
    return prefix


def assert_same(tensors: TensorSet, expected: Arrays) -> None:
    assert set(tensors) == set(expected)
    for name, array in expected.items():
        tensor = tensors[name]
        assert (tensor.dtype, tensor.shape) == (array.dtype, array.shape), name
        assert tensor.read().tobytes() == array.tobytes(), name
        step = max(64, tensor.nbytes // 7)
        assert b"".join(chunk.tobytes() for chunk in tensor.chunks(step)) == array.tobytes(), name


def segment_bytes(tensor: Stored) -> bytes:
    return b"".join(Path(p.path).read_bytes()[p.offset : p.end] for p in tensor.parts)


# --- compared with TensorFlow -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda p: "/".join(Path(p).parts[-2:]))
def test_reads_every_fixture_as_tensorflow_does(tf: Any, prefix: str) -> None:
    assert_same(read_bundle(prefix), by_tensorflow(tf, prefix))


def test_fixtures_cover_shards_pieces_and_types() -> None:
    names = {Path(prefix).parent.name for prefix in PREFIXES}
    assert names >= {"openai-tf", "openai-tf-sharded", "openai-tf-partitioned", "openai-tf-bf16", "openai-tf-f16"}


@pytest.mark.skipif(not REAL_GPT2.exists(), reason=NO_RELEASED_FILES)
def test_reads_real_data_as_tensorflow_does(tf: Any) -> None:
    prefix = str(REAL_GPT2 / "model.ckpt")
    assert_same(read_bundle(prefix), by_tensorflow(tf, prefix))


def test_every_number_type_scalars_and_empty_tensors(tf: Any, tmp_path: Path) -> None:
    types = "float32 float64 int32 uint8 int16 int8 int64 bool uint16 float16 uint32 uint64 complex64 complex128"
    arrays: dict[str, Any] = {t: np.arange(6).reshape(2, 3).astype(t) for t in types.split()}
    arrays["bfloat16"] = np.arange(3).astype(ml_dtypes.bfloat16)  # odd size: the next tensor is unaligned
    arrays["fp8a"] = np.arange(3).astype(ml_dtypes.float8_e5m2)
    arrays["fp8b"] = np.arange(3).astype(ml_dtypes.float8_e4m3fn)
    arrays |= {"scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 7), np.float32)}
    arrays["deep"] = np.arange(8, dtype=np.int32).reshape(1, 2, 1, 2, 2)
    prefix = str(save(tf, tmp_path / "m", arrays))
    assert_same(read_bundle(prefix), {name: np.asarray(array) for name, array in arrays.items()})
    assert_same(read_bundle(prefix), by_tensorflow(tf, prefix))


def test_many_tensors_fill_several_blocks(tf: Any, tmp_path: Path) -> None:
    arrays = {f"layer/{'x' * 150}/{i:05d}": np.int32([i]) for i in range(9000)}
    prefix = str(save(tf, tmp_path / "m", arrays))
    tensors = read_bundle(prefix)
    assert Path(prefix + ".index").stat().st_size > 262_144  # else one block
    assert list(tensors) == sorted(arrays)
    assert [int(tensors[name].read()[0]) for name in list(tensors)[::977]] == list(range(9000))[::977]


# Lengths on both sides of 64 and 8192, where the encoding of a piece's key grows by a byte.
PIECES = {
    "rows": ((20_000, 2), [(0, 63), (63, 1), (64, 8128), (8192, 11_808)], 0),
    "columns": ((2, 300), [(0, 64), (64, 200), (264, 36)], 1),
    "middle": ((2, 9, 3), [(0, 4), (4, 5)], 1),
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("spelt", [True, False], ids=["lengths spelt out", "whole axes as -"])
def test_partitioned_variables(tf: Any, tmp_path: Path, name: str, spelt: bool) -> None:
    shape, ranges, axis = PIECES[name]
    whole = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    arrays, slices = {}, {}
    for i, (start, length) in enumerate(ranges):
        key = f"p/{name}#{i}"
        others = [f"0,{n}" if spelt else "-" for n in shape]
        others[axis] = f"{start},{length}"
        arrays[key] = np.take(whole, range(start, start + length), axis)
        slices[key] = f"{' '.join(map(str, shape))} {':'.join(others)}"
    arrays["q"] = np.float32([1])
    prefix = str(save(tf, tmp_path / "m", arrays, slices))
    tensors = read_bundle(prefix)
    assert_same(tensors, {f"p/{name}": whole, "q": np.float32([1])})
    assert_same(tensors, by_tensorflow(tf, prefix))
    assert isinstance(tensors[f"p/{name}"], Stored if axis == 0 else Joined)
    assert len(tensors.checksums) == len(ranges)


def test_pieces_carry_checksums(tf: Any) -> None:
    tensors = read_bundle(str(FIXTURES / "tiny-gpt2/openai-tf-partitioned/model.ckpt"))
    assert [c.what for c in tensors.checksums] == [
        "model/h1/mlp/c_fc/w [0:1, 0:24, 0:32]",
        "model/h1/mlp/c_fc/w [0:1, 0:24, 32:64]",
        "model/h1/mlp/c_fc/w [0:1, 0:24, 64:96]",
        "model/wte [0:49, 0:24]",
        "model/wte [49:97, 0:24]",
    ]
    for check in tensors.checksums:
        raw = Path(check.segment.path).read_bytes()[check.segment.offset : check.segment.end]
        assert (check.algorithm, check.value) == ("crc32c", google_crc32c.value(raw))


@pytest.mark.parametrize("folder", ["openai-tf", "openai-tf-sharded", "openai-tf-adam", "openai-tf-bf16"])
def test_recorded_checksum_matches_the_bytes(folder: str) -> None:
    prefix = sorted(str(p)[:-6] for p in (FIXTURES / "tiny-gpt2" / folder).glob("*.index"))[-1]
    for name, tensor in read_bundle(prefix).items():
        assert isinstance(tensor, Stored)
        assert tensor.crc32c == google_crc32c.value(segment_bytes(tensor)), name


def test_flipped_data_byte_fails_the_checksum_here_and_in_tensorflow(tf: Any, tmp_path: Path) -> None:
    prefix = str(made.write_bundle(tmp_path / "m", ARRAYS))
    assert_same(read_bundle(prefix), by_tensorflow(tf, prefix))
    data = bytearray(Path(prefix + ".data-00000-of-00001").read_bytes())
    data[5] ^= 1
    Path(prefix + ".data-00000-of-00001").write_bytes(data)
    with pytest.raises(tf.errors.OpError, match=r"[Cc]hecksum"):
        tf.train.load_checkpoint(prefix).get_tensor("a")
    tensors = read_bundle(prefix)
    wrong = [n for n, t in tensors.items() if t.crc32c != google_crc32c.value(segment_bytes(t))]  # type: ignore[attr-defined]
    assert wrong == ["a"]


def test_every_flipped_index_byte_that_tensorflow_refuses_is_refused(tf: Any, tmp_path: Path) -> None:
    prefix = str(made.write_bundle(tmp_path / "m", ARRAYS))
    good = Path(prefix + ".index").read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 0x10
        Path(prefix + ".index").write_bytes(bad)
        try:
            by_tensorflow(tf, prefix)
        except Exception:  # TensorFlow raises several kinds
            with pytest.raises(InputError):
                read_bundle(prefix)
        else:  # TensorFlow does not read the metaindex block, nor the footer's padding
            assert at > len(good) - 48 - 45


def test_the_unused_metaindex_block_is_verified_too(tmp_path: Path) -> None:
    prefix = str(made.write_bundle(tmp_path / "m", ARRAYS))
    index = bytearray(Path(prefix + ".index").read_bytes())
    meta = bytes(4) + b"\1\0\0\0"  # no entry, one restart point
    index[index.rindex(made.trailed(meta)) + 5] ^= 1
    Path(prefix + ".index").write_bytes(index)
    with pytest.raises(InputError, match="checksum mismatch in the block of 8 bytes"):
        read_bundle(prefix)


def test_snappy_blocks(tf: Any, tmp_path: Path) -> None:
    arrays = {f"layer_{i:03d}/weights": np.float32([i, i]) for i in range(200)}
    prefix = str(made.write_bundle(tmp_path / "m", arrays, kind=1, encode=made.snappy))
    assert_same(read_bundle(prefix), arrays)
    assert_same(read_bundle(prefix), by_tensorflow(tf, prefix))


def test_big_endian_bundles_are_swapped(tf: Any, tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 3e8], ">f4")
    raw = values.tobytes()
    rows = [(b"", made.header(endianness=1)), (b"x", made.entry(1, (3,), size=len(raw), crc=made.masked(raw)))]
    prefix = str(made.write_rows(tmp_path / "m", rows, raw))
    tensor = read_bundle(prefix)["x"]
    assert tensor.segments() is None
    np.testing.assert_array_equal(tensor.read(), values)
    np.testing.assert_array_equal(by_tensorflow(tf, prefix)["x"], values)


def test_strings_are_skipped_and_noted(tf: Any, tmp_path: Path) -> None:
    arrays = {"s": np.array([b"text", b"more"]), "x": np.float32([1, 2])}
    tensors = read_bundle(str(save(tf, tmp_path / "m", arrays)))
    assert_same(tensors, {"x": arrays["x"]})
    assert tensors.notes == ("s holds strings, not numbers: skipped",)


def test_a_string_as_tensorflow_stores_it() -> None:
    """Bytes and checksum of ``tf.constant("TensorFlow" * 20)``, as TensorFlow 2.21 wrote them in a checkpoint."""
    stored, checksum = string_scalar(b"TensorFlow" * 20)
    assert stored == b"\xc8\x01#yu " + b"TensorFlow" * 20
    assert checksum == 1026572104


# --- only necessary reads -----------------------------------------------------------------------------------------


def test_opening_reads_only_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    for module, name in ((os, "open"), (builtins, "open")):
        real = getattr(module, name)

        def spy(path: Any, *args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            opened.append(os.fspath(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    prefix = str(FIXTURES / "tiny-gpt2/openai-tf-sharded/model.ckpt")
    tensors = read_bundle(prefix)
    assert opened == [prefix + ".index"]
    tensors["model/wte"].read()
    assert len(opened) == 2  # reading a tensor is recorded, so the spy works
    assert tensors.files == (prefix + ".index", *(f"{prefix}.data-0000{i}-of-00002" for i in (0, 1)))


def test_index_of_the_largest_gpt2_opens_in_20_ms(tmp_path: Path) -> None:
    rows, offset = [(b"", made.header())], 0
    parts = "attn/c_attn/b attn/c_attn/w attn/c_proj/b attn/c_proj/w ln_1/b ln_1/g ln_2/b ln_2/g mlp/c_fc/b"
    names = [f"model/h{i}/{p}" for i in range(48) for p in (*parts.split(), *(f"mlp/{x}" for x in "cde"))]
    for name in sorted([*names, "model/wte", "model/wpe", "model/ln_f/b", "model/ln_f/g"]):
        rows.append((name.encode(), made.entry(1, (1, 1600, 1600), offset=offset, size=10_240_000, crc=7)))
        offset += 10_240_000
    prefix = made.write_rows(tmp_path / "m", rows)
    os.truncate(f"{prefix}.data-00000-of-00001", offset)
    times = []  # processor time: a busy machine must not fail the test
    for _ in range(10):
        start = time.process_time()
        assert len(read_bundle(str(prefix))) == 580
        times.append(time.process_time() - start)
    assert min(times) < 0.020


# --- bad input ----------------------------------------------------------------------------------------------------


FLOATS = {"size": 16, "crc": 0}
BAD_ENTRIES: dict[str, tuple[bytes, str]] = {
    "size other than the shape's": (made.entry(1, (3,), size=16), "expected 12 bytes, found 16 bytes"),
    "size missing": (made.entry(1, (4,)), "expected 16 bytes, found 0 bytes"),
    "shape overflowing": (made.entry(1, (1 << 40, 1 << 40), size=16), "impossible shape"),
    "shape overflowing beside a zero": (made.entry(1, (0, 1 << 60)), "impossible shape"),
    "negative size in the shape": (made.entry(1, (-4, -1), size=16), "impossible shape"),
    "unknown rank": (made.number(1, 1) + made.text(2, made.number(3, 1)), "impossible shape"),
    "rank 100": (made.entry(1, (1,) * 100, size=4), "impossible shape"),
    "negative offset": (made.entry(1, (4,), size=16, offset=-1), "offset -1"),
    "shard that does not exist": (made.entry(1, (4,), size=16, shard=1), "data file 1 of 1"),
    "negative shard": (made.entry(1, (4,), size=16, shard=-1), "data file -1 of 1"),
    "beyond the data file": (made.entry(1, (4,), size=16, offset=49), "expected 65 bytes, found 64 bytes"),
    "offset of 2^62": (made.entry(1, (4,), size=16, offset=1 << 62), "truncated"),
    "cut off": (made.entry(1, (4,), size=16)[:-3], "damaged entry for x"),
    "group": (b"\x0b\x0c", "wire type 3"),
    "field 0": (b"\x00\x01", "numbered 0"),
    "field twice": (made.number(1, 1) + made.number(1, 1), "2 times"),
    "number for shape": (made.number(2, 5), "field 2 should be a message"),
    "bytes for offset": (made.text(4, b"x"), "field 4 should be a number"),
    "a message of 2^40 bytes": (b"\x12" + made.varint(1 << 40), "ends inside"),
    "piece of another rank": (made.entry(1, (4,), slices=[made.slice_proto([(0, 2), (0, 2)])]), "rank 2"),
    "piece that is missing": (made.entry(1, (4,), slices=[made.slice_proto([(0, 4)])]), "is missing"),
    "piece before the start": (made.entry(1, (4,), slices=[made.slice_proto([(-1, 4)])]), "a piece"),
    "piece of no rows": (made.entry(1, (4,), slices=[made.slice_proto([(0, 0)])]), "a piece"),
    "scalar in pieces": (made.entry(1, (), slices=[b""]), "scalar"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_bad_entry(tmp_path: Path, name: str) -> None:
    value, message = BAD_ENTRIES[name]
    with pytest.raises(InputError, match=message):
        read_bundle(made.write_entries(tmp_path, (b"x", value)))


@pytest.mark.parametrize("dtype", [29, 11, 99, 0])  # int4, qint8, unknown, unset
def test_unsupported_data_type_is_named(tmp_path: Path, dtype: int) -> None:
    with pytest.raises(UnsupportedError, match=f"data type {dtype}") as caught:
        read_bundle(made.write_entries(tmp_path, (b"h/x", made.entry(dtype, (2,), size=4))))
    assert caught.value.item == "h/x"


def pieces(*ranges: tuple[int, int], rows: int = 4, axis_two: int = 2) -> list[tuple[bytes, bytes]]:
    """Index rows of a variable x [rows, 2] stored as the given row ranges."""
    protos = [made.slice_proto([(start, length), (0, axis_two)]) for start, length in ranges]
    rows_ = [(b"x", made.entry(1, (rows, 2), slices=protos))]
    for start, length in {*ranges}:
        key = piece_key("x", ((start, length), (0, axis_two)))
        rows_.append((key, made.entry(1, (length, axis_two), size=4 * length * axis_two)))
    return sorted(rows_)


@pytest.mark.parametrize(
    ("ranges", "options", "error", "message"),
    [
        ([(0, 2), (3, 1)], {}, InputError, "gap or overlap at 2"),
        ([(0, 3), (2, 2)], {}, InputError, "gap or overlap at 3"),
        ([(0, 2), (0, 2), (2, 2)], {}, InputError, "gap or overlap at 2"),
        ([(0, 2)], {}, InputError, "end at 2 of 4"),
        ([(0, 2), (2, 3)], {}, InputError, "end at 5 of 4"),
        ([(0, 4), (0, 4)], {}, InputError, "gap or overlap at 4"),
        ([(0, 2), (2, 2)], {"axis_two": 1}, UnsupportedError, r"several axes \(0, 1\)"),
    ],
    ids=str,
)
def test_pieces_that_do_not_tile(
    tmp_path: Path, ranges: list[tuple[int, int]], options: dict[str, int], error: type[GptConvertError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_bundle(made.write_entries(tmp_path, *pieces(*ranges, **options)))


def test_pieces_that_tile_are_joined_in_order(tmp_path: Path) -> None:
    data = np.arange(16, dtype=np.float32)
    rows = dict(pieces((2, 2), (0, 2)))
    for offset, start in ((0, 2), (16, 0)):  # the later rows are stored first
        key = piece_key("x", ((start, 2), (0, 2)))
        rows[key] = made.entry(1, (2, 2), size=16, offset=offset)
    tensors = read_bundle(made.write_entries(tmp_path, *sorted(rows.items()), data=data.tobytes()))
    np.testing.assert_array_equal(tensors["x"].read(), np.float32([[4, 5], [6, 7], [0, 1], [2, 3]]))


@pytest.mark.parametrize("shape", [(2, 3), (1, 2)], ids=["other shape", "fewer rows"])
def test_piece_that_contradicts_its_variable(tmp_path: Path, shape: tuple[int, int]) -> None:
    rows = dict(pieces((0, 4)))
    (key,) = [key for key in rows if key.startswith(b"\0")]
    rows[key] = made.entry(1, shape, size=4 * shape[0] * shape[1])
    with pytest.raises(InputError, match="shape or type does not match"):
        read_bundle(made.write_entries(tmp_path, *sorted(rows.items())))


def test_stray_piece(tmp_path: Path) -> None:
    rows = [row for row in pieces((0, 4)) if row[0] != b"x"]
    with pytest.raises(InputError, match="belong to no variable"):
        read_bundle(made.write_entries(tmp_path, *rows))


def test_control_characters_in_a_name_are_escaped_in_messages(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_bundle(made.write_entries(tmp_path, (b"a\n\x1b[31mb", made.entry(1, (3,), size=16))))
    assert "\x1b" not in str(caught.value)
    assert r"a\n\x1b[31mb" in str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> str:
    folder = tmp_path / "sharded"
    shutil.copytree(FIXTURES / "tiny-gpt2/openai-tf-sharded", folder)
    return str(folder / "model.ckpt")


def test_missing_data_files_are_all_named(sharded: str) -> None:
    for number in (0, 1):
        os.rename(f"{sharded}.data-0000{number}-of-00002", f"{sharded}.data-0000{number}-of-00003")
    with pytest.raises(InputError) as caught:
        read_bundle(sharded)
    assert "2 of 2 data files are missing" in str(caught.value)
    assert "model.ckpt.data-00000-of-00002, model.ckpt.data-00001-of-00002" in str(caught.value)
    assert caught.value.found == "model.ckpt.data-00000-of-00003, model.ckpt.data-00001-of-00003"


def test_truncated_data_file(sharded: str) -> None:
    path = f"{sharded}.data-00001-of-00002"
    os.truncate(path, os.path.getsize(path) - 1)
    with pytest.raises(InputError, match="truncated") as caught:
        read_bundle(sharded)
    assert (caught.value.path, caught.value.expected, caught.value.found) == (path, "20064 bytes", "20063 bytes")


def test_the_tensor_that_ends_last_is_named(tmp_path: Path) -> None:
    rows = [(b"a", made.entry(1, (4,), size=16, offset=49)), (b"b", made.entry(1, (4,), size=16))]
    with pytest.raises(InputError, match="a extends past its end; expected 65 bytes, found 64 bytes"):
        read_bundle(made.write_entries(tmp_path, *rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"), (b"<html>", "HTML")],
    ids=["empty", "lfs", "html"],
)
def test_something_else_in_place_of_a_data_file(sharded: str, content: bytes, message: str) -> None:
    Path(f"{sharded}.data-00000-of-00002").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_bundle(sharded)


def _fifo(path: str) -> None:
    os.mkfifo(path)


def _device(path: str) -> None:
    os.symlink("/dev/zero", path)


@pytest.mark.parametrize("make", [_fifo, _device, os.mkdir], ids=["fifo", "device", "directory"])
@pytest.mark.parametrize("suffix", [".index", ".data-00001-of-00002"])
@pytest.mark.usefixtures("no_hang")
def test_special_files_are_refused_unopened(sharded: str, make: Callable[[str], None], suffix: str) -> None:
    os.remove(sharded + suffix)
    make(sharded + suffix)
    with pytest.raises(UnsafeInputError, match="not a regular file") as caught:
        read_bundle(sharded)
    assert caught.value.exit_code == 7


# --- arbitrary bytes ----------------------------------------------------------------------------------------------


GOOD = made.entry(1, (2, 2), size=16, crc=5, slices=[])
PIECED = made.entry(1, (4,), slices=[made.slice_proto([(0, 2)]), made.slice_proto([(2, None)])])


ROWS = st.lists(
    st.tuples(st.one_of(st.binary(min_size=1, max_size=12), damaged(b"x", b"\0x\0\1\1\1\x80\x82")),
              st.one_of(damaged(GOOD, PIECED), st.binary(max_size=40))),
    max_size=5, unique_by=lambda row: row[0],
)  # fmt: skip


@given(ROWS, st.one_of(st.just(made.header()), damaged(made.header())))
@settings(max_examples=300, deadline=None)
def test_damaged_entries_with_valid_checksums(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[bytes, bytes]], head: bytes
) -> None:
    prefix = tmp_path_factory.getbasetemp() / "fuzz"
    made.write_rows(prefix, sorted([(b"", head), *(row for row in rows if row[0])]), bytes(64))
    only_known_errors(str(prefix))


GOOD_TABLE = made.table([(b"", made.header()), (b"model/wte", GOOD), (b"model/wtf", GOOD)], per_block=2)


@given(st.one_of(damaged(GOOD_TABLE), st.binary(max_size=100), st.binary(max_size=100).map(lambda b: b + made.MAGIC)))
@settings(max_examples=300, deadline=None)
def test_damaged_tables(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    prefix = tmp_path_factory.getbasetemp() / "fuzz-table"
    Path(f"{prefix}.index").write_bytes(content)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(bytes(64))
    only_known_errors(str(prefix))


def only_known_errors(prefix: str) -> None:
    try:
        tensors = read_bundle(prefix)
        for tensor in tensors.values():
            assert tensor.read().shape == tensor.shape
    except GptConvertError as error:
        assert str(error)
