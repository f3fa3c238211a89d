"""flax_model.msgpack: read without Flax, located without a copy, and nothing in it trusted."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import foreign
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import Stored, Transposed
from gptconvert.sources.hf.flax import read_flax
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import checkpoint_of
from tests.sources.foreign import ORIGINALS, gap, golden, logits, opened, same_weights


def test_gpt2_is_the_witness() -> None:
    checkpoint = opened(ORIGINALS / "flax-gpt2")
    assert checkpoint.source.format == "Hugging Face, Flax (msgpack)"
    assert gap(checkpoint, "flax-gpt2") < 1e-12


def test_gpt_neo_in_bfloat16_is_the_witness() -> None:
    checkpoint = opened(ORIGINALS / "flax-gpt-neo")
    assert {weight.dtype for weight in checkpoint.weights.values()} == {BFLOAT16}
    expected = golden("flax-gpt-neo")  # transformers computed it in float32
    assert np.abs(logits(checkpoint) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj"])
@pytest.mark.parametrize("chunk", [1 << 30, 1000])
def test_weights_are_those_of_hugging_faces_layout(tmp_path: Path, family: str, chunk: int) -> None:
    raw, arrays = witness.saved(Case(family), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "flax_model.msgpack").write_bytes(foreign.flax_bytes(foreign.flax_tree(arrays), chunk))
    checkpoint = opened(tmp_path)
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    assert checkpoint.weights["wte.weight"].segments() is not None


def test_a_kernel_not_transposed_would_be_noticed(tmp_path: Path) -> None:
    """GPT-2's square projection has the same shape either way: only the logits tell."""
    tensors = read_flax(str(ORIGINALS / "flax-gpt2" / "flax_model.msgpack"))
    kernel = tensors["transformer.h.0.attn.c_proj.weight"]
    assert isinstance(kernel, Transposed)
    raw = json.loads((ORIGINALS / "flax-gpt2" / "config.json").read_text())
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    assert gap(checkpoint_of(raw, arrays), "flax-gpt2") < 1e-12
    arrays["transformer.h.0.attn.c_proj.weight"] = kernel.base.read()
    assert gap(checkpoint_of(raw, arrays), "flax-gpt2") > 1e-3


def test_sharded(tmp_path: Path) -> None:
    raw, arrays = witness.saved(Case("gptj"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    names, weight_map = sorted(arrays), {}
    for number, some in enumerate((names[::2], names[1::2])):
        tree = foreign.flax_tree({name: arrays[name] for name in some})
        shard = f"flax_model-0000{number + 1}-of-00002.msgpack"
        (tmp_path / shard).write_bytes(foreign.flax_bytes(tree))
        weight_map |= dict.fromkeys(flat(tree), shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    checkpoint = opened(tmp_path)
    assert "sharded" in checkpoint.source.format
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))


def flat(tree: dict[str, Any], before: str = "") -> list[str]:
    names = []
    for key, value in tree.items():
        names += flat(value, f"{before}{key}/") if isinstance(value, dict) else [f"{before}{key}"]
    return names


def write(path: Path, content: bytes) -> str:
    (path / "flax_model.msgpack").write_bytes(content)
    return str(path / "flax_model.msgpack")


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "int8", "bool"]
)
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    array = (np.arange(6).reshape(2, 3) % 2).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    found = read_flax(write(tmp_path, foreign.flax_bytes({"a": {"bias": array}})))["a.bias"]
    assert found.dtype == array.dtype
    assert np.array_equal(found.read(), array)


def test_training_state_and_entries_that_are_no_arrays(tmp_path: Path) -> None:
    tree = {"params": {"a": {"bias": np.ones(2, np.float32)}, "n": None}, "step": 7, "opt_state": {"0": {}}}
    found = read_flax(write(tmp_path, foreign.flax_bytes(tree)))
    assert list(found) == ["a.bias"]
    assert found.notes and all(word in found.notes[0] for word in ("step", "opt_state", "n"))


def test_scalars_and_names_in_bytes(tmp_path: Path) -> None:
    """A numpy scalar is extension 3; older versions wrote the dtype's name as bytes."""
    triple = msgpack.packb(([], b"float32", struct.pack("<f", 2.5)), use_bin_type=True)
    content = msgpack.packb({"a": {"bias": msgpack.ExtType(3, triple)}})
    found = read_flax(write(tmp_path, content))["a.bias"]
    assert (found.shape, float(found.read())) == ((), 2.5)


def array(shape: Any = (2,), dtype: Any = "float32", data: bytes = bytes(8), code: int = 1) -> Any:
    return msgpack.ExtType(code, msgpack.packb((list(shape), dtype, data), use_bin_type=True))


def chunked(**changes: Any) -> dict[str, Any]:
    whole = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 4},
        "chunks": {"0": array(), "1": array()},
    }
    return {**whole, **changes}


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
    "strange type": (msgpack.packb({"a": array(dtype="float8_e4m3fn")}), UnsupportedError, "float8_e4m3fn"),
    "shape lies": (msgpack.packb({"a": array(shape=(3,))}), InputError, "8 bytes, not 12"),
    "shape of 2**80": (msgpack.packb({"a": array(shape=(1 << 40, 1 << 40))}), InputError, "not"),
    "negative shape": (msgpack.packb({"a": array(shape=(-2,))}), InputError, "shape"),
    "shape of words": (msgpack.packb({"a": array(shape=("x",))}), InputError, "shape"),
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
    "key twice": (b"\x82\xa1a\xc0\xa1a\xc0", InputError, "twice"),
    "key that is a number": (b"\x81\x01\xc0", InputError, "no text"),
    "no arrays": (msgpack.packb({"a": 1}), InputError, "no arrays"),
    "not a map": (msgpack.packb([1]), InputError, "not a map"),
    "reserved byte": (b"\x81\xa1a\xc1", InputError, "0xc1"),
    "chunk missing": (msgpack.packb({"a": chunked(chunks={"0": array(), "2": array()})}), InputError, "misnumbered"),
    "chunk too few": (msgpack.packb({"a": chunked(chunks={"0": array()})}), InputError, "do not make it up"),
    "chunks of two types": (
        msgpack.packb({"a": chunked(chunks={"0": array(), "1": array((2,), "int32")})}),
        InputError,
        "do not make it up",
    ),
    "chunks of numbers": (msgpack.packb({"a": chunked(chunks={"0": 1, "1": 2})}), InputError, "misnumbered"),
    "chunks without shape": (msgpack.packb({"a": chunked(shape=None)}), InputError, "misnumbered"),
}


@pytest.mark.parametrize("name", BAD)
def test_41_bad_files(tmp_path: Path, name: str) -> None:
    content, error, message = BAD[name]
    with pytest.raises(error, match=message):
        read_flax(write(tmp_path, content))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=40), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(extra=st.dictionaries(st.text(max_size=20), VALUES, max_size=3))
def test_whatever_msgpack_writes_is_walked_over(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, Any]
) -> None:
    """Every kind of value beside the arrays; the arrays come back."""
    path = tmp_path_factory.mktemp("walk")
    found = read_flax(write(path, foreign.flax_bytes({"z": extra, "a": {"bias": np.arange(5, dtype=np.float16)}})))
    assert np.array_equal(found["a.bias"].read(), np.arange(5))


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), cut=st.integers(0, 4))
def test_any_damage_is_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("damage")
    content = GOOD[:at] + bytes([byte]) + GOOD[at + 1 : len(GOOD) - cut]
    try:
        found = read_flax(write(path, content))
    except GptConvertError:
        return
    for tensor in found.values():
        assert isinstance(tensor, (Stored, Transposed))
        tensor.read()
