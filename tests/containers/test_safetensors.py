"""The safetensors reader and writer compared with the official library: same tensors, same verdicts, same bytes."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptconvert.containers.safetensors import DTYPES, UNSUPPORTED_BITS, header_bytes, read_safetensors
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError
from tests.helpers import FIXTURES, computed_tensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TEXT = json.dumps(ENTRY)
ZEROS = bytes(8)


def file_bytes(header: Any, data: bytes = ZEROS) -> bytes:
    """A safetensors file; ``header`` is an object, or raw text or bytes that no encoder would write."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def official_verdict(content: bytes) -> str | None:
    """The official library's error message, or None if it accepts the file."""
    import safetensors

    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        return str(error)
    return None


#: Types that PyTorch does not convert to or from NumPy → an integer type of the same width.
NOT_IN_NUMPY = {"BF16": "int16", "F8_E4M3": "uint8", "F8_E5M2": "uint8"}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path, name: str) -> None:
    import torch
    from safetensors.torch import load_file

    values = np.arange(-3, 9).reshape(3, 4).astype(DTYPES[name])
    header = {"x": {"dtype": name, "shape": [3, 4], "data_offsets": [0, values.nbytes]}, "__metadata__": {"a": "b"}}
    path = write(tmp_path / "x.safetensors", file_bytes(header, values.tobytes()))
    tensor = read_safetensors(path)["x"]
    assert (tensor.dtype, tensor.shape) == (DTYPES[name], (3, 4))
    assert tensor.read().tobytes() == values.tobytes()
    segments = tensor.segments()
    assert segments is not None
    assert [s.offset + s.nbytes for s in segments] == [len(Path(path).read_bytes())]
    if name in NOT_IN_NUMPY:
        expected = load_file(path)["x"].view(getattr(torch, NOT_IN_NUMPY[name])).numpy().view(DTYPES[name])
    else:
        expected = load_file(path)["x"].numpy()
    np.testing.assert_array_equal(tensor.read(), expected)


@pytest.mark.parametrize("name", ["hf-safetensors", "hf-bare", "hf-bf16"])
def test_fixture_equals_library(name: str) -> None:
    from safetensors.torch import load_file

    path = FIXTURES / "tiny-gpt2" / name / "model.safetensors"
    tensors, expected = read_safetensors(path), load_file(path)
    assert set(tensors) == set(expected)
    assert tensors.files == (str(path),)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(tensors[key].read().astype(np.float64), tensor.double().numpy())


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """64 MiB of weights after a 100-byte header are neither read nor held in memory."""
    size = 64 << 20
    path = tmp_path / "big.safetensors"
    path.write_bytes(file_bytes({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    tracemalloc.start()
    tensor = read_safetensors(path)["x"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensor.nbytes == size
    assert peak < 1 << 20


def test_order_is_that_of_the_bytes(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]},
        "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "empty": {"dtype": "F64", "shape": [0, 5], "data_offsets": [0, 0]},
    }
    tensors = read_safetensors(write(tmp_path / "x", file_bytes(header, b"\1\2\3")))
    assert list(tensors) == ["empty", "a", "b"]
    assert tensors["empty"].read().shape == (0, 5)
    assert tensors["b"].read().tolist() == [3]


def with_entry(**changes: object) -> bytes:
    return file_bytes({"a": {**ENTRY, **changes}})


#: name → (file, error class, part of the message). The library rejects each of them too.
BAD: dict[str, tuple[bytes, type[GptConvertError], str]] = {
    "1 git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:248dfc39\nsize 548105171\n",
        InputError,
        "git lfs pull",
    ),
    "2 html": (b"<!DOCTYPE html>\n<html><title>404</title></html>", InputError, "HTML page"),
    "3 empty": (b"", InputError, "empty"),
    "3 seven bytes": (b"\x02\0\0\0\0\0\0", InputError, "truncated"),
    "4 header over 100 MB": (struct.pack("<Q", 100_000_001) + b"\x01{}", InputError, "at most 100000000 bytes"),
    "4 header longer than file": (struct.pack("<Q", 200) + b"\x01{}", InputError, "208 bytes for the header"),
    "5 not UTF-8": (file_bytes(b'{"\xff":1}'), InputError, "not UTF-8 (byte 2)"),
    "5 not JSON": (file_bytes('{"a":}'), InputError, "not JSON"),
    "5 a list": (file_bytes("[]"), InputError, "does not begin with `{`"),
    "5 NaN": (file_bytes('{"a":NaN}'), InputError, "NaN"),
    "5 half a surrogate pair": (file_bytes('{"\\ud800":' + TEXT + "}"), InputError, "surrogate"),
    "5 nested too deep": (file_bytes('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"), InputError, "127 deep"),
    "7 hole": (
        file_bytes({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)),
        InputError,
        "leaves a hole after `a`",
    ),
    "7 overlap": (
        file_bytes({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
        InputError,
        "overlaps `a`",
    ),
    "7 hole at the start": (
        file_bytes({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
        InputError,
        "the header",
    ),
    "8 trailing bytes": (file_bytes({"a": ENTRY}, bytes(11)), InputError, "3 bytes follow the last tensor"),
    "9 truncated": (file_bytes({"a": ENTRY}, bytes(7)), InputError, "expected 77 bytes, found 76 bytes"),
    "10 shape overflow": (with_entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), InputError, "overflows"),
    "10 negative": (with_entry(shape=[-2]), InputError, "wrong shape"),
    "10 fraction": (with_entry(shape=[2.0]), InputError, "wrong shape"),
    "10 true": (with_entry(shape=[True, 2]), InputError, "wrong shape"),
    "10 does not fit": (with_entry(shape=[3]), InputError, "expected 12 bytes, found 8 bytes"),
    "10 backwards": (with_entry(shape=[0], data_offsets=[8, 0]), InputError, "does not fit"),
    "11 unknown dtype": (with_entry(dtype="F33"), InputError, "unknown dtype"),
    "13 metadata value": (file_bytes({"__metadata__": {"n": 1}, "a": ENTRY}), InputError, "must be strings"),
    "13 metadata list": (file_bytes({"__metadata__": [], "a": ENTRY}), InputError, "__metadata__"),
    "missing key": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}), InputError, "lacks data_offsets"),
    "three offsets": (with_entry(data_offsets=[0, 8, 8]), InputError, "data_offsets"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(tmp_path: Path, case: str) -> None:
    content, kind, words = BAD[case]
    assert official_verdict(content) is not None, "the library accepts this file: move it to STRICTER"
    with pytest.raises(kind) as caught:
        read_safetensors(write(tmp_path / "x.safetensors", content))
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("dtype", UNSUPPORTED_BITS)
def test_11_other_dtypes_are_unsupported_once_the_file_is_sound(tmp_path: Path, dtype: str) -> None:
    count = 64 * 24 // UNSUPPORTED_BITS[dtype]
    sound = file_bytes({"odd": {"dtype": dtype, "shape": [count], "data_offsets": [0, 192]}}, bytes(192))
    assert official_verdict(sound) is None
    with pytest.raises(UnsupportedError, match=rf"`odd` \({dtype}\)"):
        read_safetensors(write(tmp_path / "x", sound))
    with pytest.raises(InputError, match="truncated"):
        read_safetensors(write(tmp_path / "x", sound[:-1]))


STRICTER = {
    "6 duplicate key": '{"a":' + TEXT + ',"a":' + TEXT + "}",
    "6 duplicate metadata": '{"__metadata__":{"x":"1","x":"2"},"a":' + TEXT + "}",
    "5 white space before {": ' {"a":' + TEXT + "}",
    "a list for an object": '{"a":["F32",[2],[0,8]]}',
}


@pytest.mark.parametrize("case", STRICTER)
def test_stricter_than_the_library(tmp_path: Path, case: str) -> None:
    content = file_bytes(STRICTER[case])
    assert official_verdict(content) is None, "the library now rejects this file: move it to BAD"
    with pytest.raises(InputError):
        read_safetensors(write(tmp_path / "x", content))


def test_special_files(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeInputError):
        read_safetensors(tmp_path / "pipe")
    with pytest.raises(UnsafeInputError):
        read_safetensors(tmp_path)
    with pytest.raises(InputError, match="missing"):
        read_safetensors(tmp_path / "absent")


def test_54_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    content = file_bytes({"a\n\x1b[31m": {**ENTRY, "dtype": "F33"}})
    with pytest.raises(InputError) as caught:
        read_safetensors(write(tmp_path / "x", content))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


# Differential fuzzing: nearly valid headers, compared with the library's verdict.

SMALL = st.one_of(st.integers(-1, 12), st.sampled_from([2**31, 2**40, 2**62, 2**64 - 1, 2**64, 2.0, -0.0, None, "1"]))
INFO = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from([*DTYPES, *UNSUPPORTED_BITS]), st.sampled_from(["F33", "f32", None, 1])),
        "shape": st.one_of(st.lists(SMALL, max_size=3), st.sampled_from([None, {}, "2"])),
        "data_offsets": st.one_of(st.lists(SMALL, min_size=1, max_size=3), st.none()),
    },
    optional={"extra": st.sampled_from([1, {"a": []}, "x" * 9])},
)


@st.composite
def sound_headers(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A valid header with its keys in any order, and its data."""
    names = draw(st.lists(st.text(max_size=4), unique=True, max_size=4).filter(lambda n: "__metadata__" not in n))
    header, position = {}, 0
    for name in names:
        dtype = draw(st.sampled_from([*DTYPES, *UNSUPPORTED_BITS]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = (DTYPES[dtype].itemsize * 8 if dtype in DTYPES else UNSUPPORTED_BITS[dtype]) * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + bits // 8]}
        position += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2))  # type: ignore[assignment]
    order = draw(st.permutations(list(header)))
    return {name: header[name] for name in order}, bytes(position)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file, or one with a single change."""
    header, data = draw(sound_headers())
    change = draw(st.sampled_from(["none", "entry", "field", "data", "text", "length"]))
    if change == "entry":
        header[draw(st.sampled_from(["", "a", "__metadata__"]))] = draw(st.one_of(INFO, SMALL, st.just({})))
    elif change == "field" and any(name != "__metadata__" for name in header):
        info = header[draw(st.sampled_from(sorted(name for name in header if name != "__metadata__")))]
        key = draw(st.sampled_from(sorted(info)))
        info[key] = draw(st.one_of(SMALL, st.lists(SMALL, max_size=3), st.sampled_from(["F32", "BOOL", "F4"])))
    elif change == "data":
        data = data + b"x" if draw(st.booleans()) else data[:-1]
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if change == "text":
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=2)) + text[at + draw(st.integers(0, 2)) :]
    content = struct.pack("<Q", len(text)) + text + data
    if change == "length":
        content = struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + content[8:]
    return content


def reason_to_be_stricter(content: bytes) -> bool:
    """Whether a file that the library accepts breaks one of the stricter rules of :func:`read_safetensors`."""
    text = content[8 : 8 + struct.unpack("<Q", content[:8])[0]]
    duplicates: list[int] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        duplicates.append(len(items) - len(dict(items)))
        return dict(items)

    header = json.loads(text, object_pairs_hook=pairs)
    return not text.startswith(b"{") or any(duplicates) or any(isinstance(v, list) for v in header.values())


@settings(max_examples=400, deadline=None)
@given(content=files())
@example(content=file_bytes({"a": {**ENTRY, "x": 0}}).replace(b'"x": 0', b'"x":' + b"[" * 125 + b"]" * 125))
@example(content=file_bytes({"a": {**ENTRY, "x": 0}}).replace(b'"x": 0', b'"x":1e999'))
@example(content=file_bytes({"a": {**ENTRY, "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}, b""))
@example(content=file_bytes({"a": {"dtype": "F4", "shape": [15], "data_offsets": [0, 8]}}))
def test_same_verdict_as_the_library(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fuzz.safetensors", content)
    expected = official_verdict(content)
    try:
        read_safetensors(path)
        verdict: GptConvertError | None = None
    except UnsupportedError:
        verdict = None  # sound, but of an unsupported type
    except GptConvertError as error:
        verdict = error
    if expected is not None:
        assert verdict is not None, f"accepted, but the library reports: {expected}"
    else:
        assert verdict is None or reason_to_be_stricter(content), f"the library accepts, but: {verdict}"


@settings(max_examples=150, deadline=None)
@given(header_and_data=sound_headers())
def test_a_sound_file_reads_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, header_and_data: tuple[dict[str, Any], bytes]
) -> None:
    import safetensors

    header, data = header_and_data
    if any(info.get("dtype") in UNSUPPORTED_BITS for name, info in header.items() if name != "__metadata__"):
        return
    data = np.random.default_rng(len(data)).bytes(len(data))
    content = file_bytes(json.dumps(header).encode(), data)
    tensors = read_safetensors(write(tmp_path_factory.getbasetemp() / "sound.safetensors", content))
    expected = dict(safetensors.deserialize(content))
    assert set(tensors) == set(expected)
    for name, info in expected.items():
        assert list(tensors[name].shape) == info["shape"]
        assert tensors[name].read().tobytes() == bytes(info["data"])


# --- writing ------------------------------------------------------------------------------------------------------

ARRAYS = st.builds(
    lambda dtype, shape: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(DTYPES[dtype]),
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)


def written(arrays: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    """A complete file."""
    head, order = header_bytes(computed_tensors(arrays).tensors, metadata)
    return head + b"".join(arrays[name].tobytes() for name in order)


@settings(max_examples=150, deadline=None)
@given(
    arrays=st.dictionaries(st.text(max_size=6).filter("__metadata__".__ne__), ARRAYS, max_size=6),
    metadata=st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=1),
)
def test_read_is_the_inverse_of_write(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    content = written(arrays, metadata)
    assert official_verdict(content) is None
    found = read_safetensors(write(tmp_path_factory.getbasetemp() / "round.safetensors", content))
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].read().tobytes() == array.tobytes()


def test_every_dtype_is_laid_out_as_by_the_library() -> None:
    import torch
    from safetensors.torch import save

    arrays = {f"{dtype} {n}": np.zeros(n, DTYPES[dtype]) for dtype in DTYPES for n in (2, 1)}
    tensors = {
        name: torch.from_numpy(array.view(bits)).view(getattr(torch, array.dtype.name))
        if (bits := NOT_IN_NUMPY.get(name.split()[0]))
        else torch.from_numpy(array)
        for name, array in arrays.items()
    }
    assert written(arrays, {"format": "pt"}) == save(tensors, metadata={"format": "pt"})


def test_types_that_the_format_lacks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no such element type") as caught:
        header_bytes(computed_tensors({"x": np.zeros(2, np.complex128)}).tensors)
    assert (caught.value.item, caught.value.found) == ("x", "complex128")
