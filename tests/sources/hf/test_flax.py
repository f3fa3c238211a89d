"""flax_model.msgpack: read without Flax and without copying, and treated as untrusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import foreign
from gptconvert.errors import GptConvertError, InputError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import Stored, Transposed
from gptconvert.sources.hf.flax import read_flax
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import checkpoint_of
from tests.sources.foreign import ORIGINALS, gap, golden, logits, opened, same_weights


def test_gpt2_matches_the_golden_logits() -> None:
    checkpoint = opened(ORIGINALS / "flax-gpt2")
    assert checkpoint.source.format == "Hugging Face, Flax (msgpack)"
    assert gap(checkpoint, "flax-gpt2") < 1e-12


def test_gpt_neo_in_bfloat16_matches_the_golden_logits() -> None:
    checkpoint = opened(ORIGINALS / "flax-gpt-neo")
    assert {weight.dtype for weight in checkpoint.weights.values()} == {BFLOAT16}
    expected = golden("flax-gpt-neo")  # transformers computed it in float32
    assert np.abs(logits(checkpoint) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj"])
@pytest.mark.parametrize("chunk", [1 << 30, 1000])
def test_weights_equal_those_of_pytorch(tmp_path: Path, family: str, chunk: int) -> None:
    raw, arrays = witness.saved(Case(family), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "flax_model.msgpack").write_bytes(foreign.flax_bytes(foreign.flax_tree(arrays), chunk))
    checkpoint = opened(tmp_path)
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    assert checkpoint.weights["wte.weight"].segments() is not None


def test_a_kernel_left_untransposed_would_be_noticed(tmp_path: Path) -> None:
    """GPT-2's square projection has the same shape either way: only the logits differ."""
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


def test_training_state_and_entries_that_are_not_arrays(tmp_path: Path) -> None:
    tree = {"params": {"a": {"bias": np.ones(2, np.float32)}, "n": None}, "step": 7, "opt_state": {"0": {}}}
    found = read_flax(write(tmp_path, foreign.flax_bytes(tree)))
    assert list(found) == ["a.bias"]
    assert found.notes and all(word in found.notes[0] for word in ("step", "opt_state", "n"))


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
    "no arrays": (msgpack.packb({"a": 1}), InputError, "no named arrays"),
    "not a map": (msgpack.packb([1]), InputError, "expected a map of parameters, found list"),
    "chunk missing": (msgpack.packb({"a": chunked(chunks={"0": array(), "2": array()})}), InputError, "misnumbered"),
    "chunk too few": (msgpack.packb({"a": chunked(chunks={"0": array()})}), InputError, "do not match its shape"),
    "chunks of two types": (
        msgpack.packb({"a": chunked(chunks={"0": array(), "1": array((2,), "int32")})}),
        InputError,
        "do not match its shape",
    ),
    "chunks of numbers": (msgpack.packb({"a": chunked(chunks={"0": 1, "1": 2})}), InputError, "misnumbered"),
    "chunks without shape": (msgpack.packb({"a": chunked(shape=None)}), InputError, "misnumbered"),
}


@pytest.mark.parametrize("name", BAD)
def test_41_bad_files(tmp_path: Path, name: str) -> None:
    content, error, message = BAD[name]
    with pytest.raises(error, match=message):
        read_flax(write(tmp_path, content))


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), cut=st.integers(0, 4))
def test_any_damage_raises_our_errors_only(
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
