"""The reader of NumPy's files compared with NumPy, and files that must be refused."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.containers.npy import parse_header, read_npy
from gptconvert.containers.npz import read_npz
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import Stored

pytestmark = pytest.mark.usefixtures("no_hang")


def header(text: str, version: int = 1, length: int | None = None) -> bytes:
    """A header around the text of a dictionary."""
    data = text.encode()
    size = len(data) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", size) + data


def fields(descr: str = "<f4", order: str = "False", shape: str = "(2,)") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n"


def written(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    return str(path)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["<f4", ">f4", "<f8", ">f2", "<i8", ">u2", "|b1", "|i1"]),
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    order=st.sampled_from("CF"),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_reads_what_numpy_writes(
    tmp_path_factory: pytest.TempPathFactory, kind: str, shape: Any, order: Any, version: Any
) -> None:
    array = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape).astype(kind).copy(order)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    path = tmp_path_factory.mktemp("npy") / "x.npy"
    path.write_bytes(buffer.getvalue())
    tensor = read_npy(path)
    assert tensor.shape == array.shape
    assert tensor.read().dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(tensor.read(), array)
    if array.ndim and array.size:
        box = tuple(slice(n // 2, n) for n in array.shape)
        assert np.array_equal(tensor.read(box), array[box])
    if tensor.segments() is not None:
        assert b"".join(c.tobytes() for c in tensor.chunks(8)) == np.ascontiguousarray(array).tobytes()


def test_plain_arrays_can_be_copied_raw(tmp_path: Path) -> None:
    np.save(tmp_path / "little.npy", np.ones((2, 3), "<f4"))
    np.save(tmp_path / "big.npy", np.ones((2, 3), ">f4"))
    little, big = read_npy(tmp_path / "little.npy"), read_npy(tmp_path / "big.npy")
    assert isinstance(little, Stored)
    assert little.segments() is not None
    assert big.segments() is None


def test_python_2_wrote_long_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, header(fields(shape="(2L, 1L)")) + bytes(8))
    assert read_npy(path).shape == (2, 1)


def test_37_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UnsafeInputError, match="pickle, nothing executed"):
        read_npy(tmp_path / "x.npy")


@pytest.mark.parametrize("descr", ["|V2", "<c8", "<U3", "|S4", "<M8[s]", "<V2"])
def test_elements_that_are_not_plain_numbers(tmp_path: Path, descr: str) -> None:
    path = written(tmp_path, header(fields(descr, shape="(1,)")) + bytes(64))
    with pytest.raises(UnsupportedError, match="not plain numbers"):
        read_npy(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\x93NUMPY", "unknown version"),
        (b"\x93NUMPY\x01", "truncated inside its header"),
        (header(fields(), length=60)[:40], "truncated inside its header"),
        (header(fields(), version=4), "unknown version"),
        (header(fields(), length=20_000), "header is too long"),
        (header("{'descr': '<f4'}"), "header is damaged"),
        (header("[1, 2]"), "header is damaged"),
        (header("__import__('os')"), "header is damaged"),
        (header("(" * 3000), "header is damaged"),
        (header(fields(order="0")), "header is damaged"),
        (header(fields(shape="[2]")), "header is damaged"),
        (header(fields(shape="(-2,)")), "header is damaged"),
        (header(fields(shape="(True,)")), "header is damaged"),
        (header(fields(shape="(" + "1," * 70 + ")")), "header is damaged"),
        (header(fields()) + bytes(7), "file is truncated"),
        (header(fields()) + bytes(9), "extra bytes follow the array"),
        (header(fields(shape="(4611686018427387904, 8)")) + bytes(8), "file is truncated"),
        (b"\x80\x04}.", "pickle"),
        (b"PK\x03\x04", "zip"),
    ],
)
def test_37_damaged_files(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_npy(written(tmp_path, data))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 90))
def test_noise_raises_a_gptconvert_error(noise: bytes, at: int) -> None:
    data = bytearray(header(fields()))
    data[at : at + len(noise)] = noise
    try:
        found = parse_header(bytes(data), "x", "x")
    except GptConvertError:
        return
    assert found.nbytes <= len(data)


def test_archives(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype="<f4").reshape(2, 3), np.asfortranarray(np.ones((3, 2), ">f8")), np.int32(7)]
    np.savez(tmp_path / "x.npz", *arrays)
    found = read_npz(tmp_path / "x.npz").arrays
    assert list(found) == ["arr_0", "arr_1", "arr_2"]
    assert all(np.array_equal(tensor.read(), array) for tensor, array in zip(found.values(), arrays, strict=True))


def test_untyped_two_byte_elements(tmp_path: Path) -> None:
    array = np.arange(5, dtype=np.float32).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(UnsupportedError):
        read_npz(tmp_path / "x.npz")
    (tensor,) = read_npz(tmp_path / "x.npz", void2=BFLOAT16).arrays.values()
    assert np.array_equal(tensor.read(), array)


def test_refused_archives(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "packed.npz", np.zeros(999))
    with pytest.raises(UnsafeInputError, match="compressed members"):
        read_npz(tmp_path / "packed.npz")
    np.savez(tmp_path / "objects.npz", np.array([None], object))
    with pytest.raises(UnsafeInputError, match="nothing executed"):
        read_npz(tmp_path / "objects.npz")
    whole = (tmp_path / "packed.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        read_npz(tmp_path / "cut.npz")
    (tmp_path / "page.npz").write_text("<!doctype html>")
    with pytest.raises(InputError, match="HTML page"):
        read_npz(tmp_path / "page.npz")


def test_what_numpy_refuses_is_refused(tmp_path: Path) -> None:
    sound = header(fields()[:-1] + "  \n") + bytes(8)
    read_npy(written(tmp_path, sound))
    for wrong in (sound[:7] + b"\1" + sound[8:], sound.replace(b"  \n", b" \xa0\n")):
        assert wrong != sound
        path = written(tmp_path, wrong)
        with pytest.raises(ValueError, match=r"version|header"):
            np.load(path)
        with pytest.raises(InputError, match=r"version of the array format|header is damaged"):
            read_npy(path)
