"""MessagePack as Flax writes it: every value is decoded, arrays are located, and hostile files are refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import foreign
from gptconvert.containers.msgpack import read_msgpack
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import LazyTensor


def write(path: Path, content: bytes) -> str:
    (path / "a.msgpack").write_bytes(content)
    return str(path / "a.msgpack")


def arrays_in(path: Path, content: bytes) -> dict[str, LazyTensor]:
    """The map ``a`` of a file."""
    tree: Any = read_msgpack(write(path, content))
    found: dict[str, LazyTensor] = tree["a"]
    return found


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "int8", "bool", "uint16"]
)
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    array = (np.arange(6).reshape(2, 3) % 2).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    found = arrays_in(tmp_path, foreign.flax_bytes({"a": {"bias": array}}))["bias"]
    assert found.dtype == array.dtype
    assert np.array_equal(found.read(), array)


def test_scalars_and_names_in_bytes(tmp_path: Path) -> None:
    """A numpy scalar is extension 3; older versions wrote the dtype's name as bytes."""
    triple = msgpack.packb(([], b"float32", struct.pack("<f", 2.5)), use_bin_type=True)
    content = msgpack.packb({"a": {"bias": msgpack.ExtType(3, triple)}})
    found = arrays_in(tmp_path, content)["bias"]
    assert (found.shape, float(found.read())) == ((), 2.5)


def array(shape: Any = (2,), dtype: Any = "float32", data: bytes = bytes(8), code: int = 1) -> Any:
    return msgpack.ExtType(code, msgpack.packb((list(shape), dtype, data), use_bin_type=True))


GOOD = foreign.flax_bytes({"a": {"bias": np.ones(2, np.float32)}})
BAD: dict[str, tuple[bytes, type[GptConvertError], str]] = {
    "empty": (b"", InputError, "empty"),
    "html": (b"<html><body>404</body></html>", InputError, "HTML"),
    "truncated in the data": (GOOD[:-3], InputError, "truncated"),
    "truncated in a name": (GOOD[:2], InputError, "truncated"),
    "trailing bytes": (GOOD + b"\x00", InputError, "follow the end"),
    "nested 10k deep": (b"\x81\xa1a" * 10_000 + b"\xc0", UnsafeInputError, "nested too deep"),
    "lists nested 10k deep": (b"\x91" * 10_000 + b"\xc0", UnsafeInputError, "nested too deep"),
    "ext code 9": (msgpack.packb({"a": array(code=9)}), InputError, "extension type 9"),
    "complex": (msgpack.packb({"a": array(code=2)}), UnsupportedError, "complex"),
    "objects": (msgpack.packb({"a": array(dtype="O")}), UnsafeInputError, "Python objects"),
    "strange type": (msgpack.packb({"a": array(dtype="float8_e8m0fnu")}), UnsupportedError, "float8_e8m0fnu"),
    "shape lies": (msgpack.packb({"a": array(shape=(3,))}), InputError, "8 bytes, not 12"),
    "shape of 2**80": (msgpack.packb({"a": array(shape=(1 << 40, 1 << 40))}), InputError, "not"),
    "negative shape": (msgpack.packb({"a": array(shape=(-2,))}), InputError, "shape"),
    "shape of words": (msgpack.packb({"a": array(shape=("x",))}), InputError, "shape"),
    "shape that is an array, 10k deep": (
        b"\x81\xa1a" + b"\xc9\x00\x00\x01\x00\x01\x93" * 10_000 + bytes(300),
        UnsafeInputError,
        "nested too deep",
    ),
    "shape of arrays, 10k deep": (
        b"\x81\xa1a" + b"\xc9\x00\x00\x01\x00\x01\x93\x91" * 10_000 + bytes(300),
        UnsafeInputError,
        "nested too deep",
    ),
    "payload too long": (
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([2], "float32", bytes(8))) + b"\0")}),
        InputError,
        "does not match its content",
    ),
    "payload too short": (
        b"\x81\xa1a\xc7\x05\x01" + msgpack.packb(([2], "float32", bytes(8))),
        InputError,
        "bytes, not|follow",
    ),
    "huge map": (b"\xdf\xff\xff\xff\xff", InputError, "truncated"),
    "million entries": (b"\xdd\x00\x20\x00\x00" + b"\xc0" * 1_200_000, UnsafeInputError, "too many entries"),
    "key twice": (b"\x82\xa1a\xc0\xa1a\xc0", InputError, "duplicate key 'a'"),
    "key that is a number": (b"\x81\x01\xc0", InputError, "not text"),
    "reserved byte": (b"\x81\xa1a\xc1", InputError, "0xc1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, error, message = BAD[name]
    with pytest.raises(error, match=message):
        read_msgpack(write(tmp_path, content))


@pytest.mark.usefixtures("no_hang")
def test_special_files_are_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        read_msgpack(str(tmp_path / "pipe"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=40), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(extra=st.dictionaries(st.text(max_size=20), VALUES, max_size=3))
def test_reads_every_value_that_msgpack_writes(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, Any]
) -> None:
    """Every kind of value is decoded, and the arrays beside it are found."""
    path = tmp_path_factory.mktemp("walk")
    content = foreign.flax_bytes({"z": extra, "a": {"bias": np.arange(5, dtype=np.float16)}})
    tree: Any = read_msgpack(write(path, content))
    assert tree["z"] == extra
    assert np.array_equal(tree["a"]["bias"].read(), np.arange(5))
