"""Sharded checkpoints: which files the index may name, and whether the shards match it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.containers.safetensors import read_safetensors
from gptconvert.containers.torch import read_torch
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError
from gptconvert.sources.hf.shards import read_sharded, read_weight_map
from tests.helpers import FIXTURES, tiny_gpt2

ARRAYS = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abcd")}
MAP = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors", "d": "m-3.safetensors"}
INDEX = "model.safetensors.index.json"
SNAPSHOT = "cache/models--x/snapshots/0123abcd/inside"


def write_index(directory: Path, content: Any) -> str:
    """Write an index file with ``content`` as JSON, or verbatim if it is text."""
    path = directory / INDEX
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def write_shards(directory: Path, shards: Mapping[str, str] = MAP) -> str:
    """Write shards with the official library, and a matching index."""
    from safetensors.numpy import save_file

    for shard in set(shards.values()):
        save_file({n: ARRAYS[n] for n, s in shards.items() if s == shard}, directory / shard)
    return write_index(directory, {"metadata": {"total_size": 96}, "weight_map": shards})


def test_tensors_come_from_their_shards_in_the_order_of_the_index(tmp_path: Path) -> None:
    tensors = read_sharded(write_shards(tmp_path), read_safetensors)
    assert list(tensors) == list(MAP)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name].read(), array)
    assert tensors.files == tuple(str(tmp_path / f"m-{i}.safetensors") for i in (1, 2, 3))


def test_fixtures_equal_the_official_loaders() -> None:
    import torch
    from safetensors.torch import load_file

    root = FIXTURES / "tiny-gpt2"
    found = read_sharded(root / "hf-safetensors-sharded" / INDEX, read_safetensors)
    expected = load_file(root / "hf-safetensors" / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].read(), tensor.numpy())
    found = read_sharded(root / "hf-bin-sharded" / "pytorch_model.bin.index.json", read_torch)
    expected = torch.load(root / "hf-bin" / "pytorch_model.bin", weights_only=True)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].read(), tensor.numpy())
    assert len(found.files) == 2
    assert {c.segment.path for c in found.checksums} == set(found.files)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/abs/x.safetensors",
        "a\\..\\b.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "C:x",
        "a\0b",
    ],
)
def test_16_shard_paths_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    index = write_index(tmp_path, {"weight_map": {"a": "m-1.safetensors", "b": name}})
    with pytest.raises(UnsafeInputError, match="refused shard paths"):
        read_sharded(index, read_safetensors)


def test_16_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    index = write_shards(home)
    (home / "m-2.safetensors").rename(tmp_path / "outside")
    (home / "m-2.safetensors").symlink_to("../outside")
    with pytest.raises(UnsafeInputError, match=r"m-2\.safetensors → \.\./outside"):
        read_sharded(index, read_safetensors)


def test_16_links_inside_the_directory_are_followed(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    (tmp_path / "m-2.safetensors").rename(tmp_path / "real")
    (tmp_path / "m-2.safetensors").symlink_to("real")
    assert len(read_sharded(index, read_safetensors)) == 4


@pytest.mark.parametrize(
    "store", ["cache/models--x/blobs", "cache/blobs", SNAPSHOT, "cache/models--y/blobs", "elsewhere"]
)
def test_16_links_of_a_hub_cache(tmp_path: Path, store: str) -> None:
    snapshot = tmp_path / "cache" / "models--x" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / store).mkdir(parents=True, exist_ok=True)
    index = write_shards(snapshot)
    for shard in set(MAP.values()):
        (snapshot / shard).rename(tmp_path / store / shard)
        (snapshot / shard).symlink_to(os.path.relpath(tmp_path / store / shard, snapshot))
    if store in ("cache/models--x/blobs", "cache/blobs", SNAPSHOT):
        assert len(read_sharded(index, read_safetensors)) == 4
    else:
        with pytest.raises(UnsafeInputError, match="leave the directory"):
            read_sharded(index, read_safetensors)


@pytest.mark.parametrize("missing", [("m-2.safetensors",), ("m-1.safetensors", "m-3.safetensors")])
def test_17_all_missing_shards_are_listed(tmp_path: Path, missing: tuple[str, ...]) -> None:
    index = write_shards(tmp_path)
    for name in missing:
        (tmp_path / name).unlink()
    with pytest.raises(InputError) as caught:
        read_sharded(index, read_safetensors)
    assert f"{len(missing)} of 3 shards are missing: {', '.join(missing)}" in str(caught.value)


def test_18_index_and_shards_disagree(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = write_index(tmp_path, {"weight_map": {**MAP, "a": "m-2.safetensors", "e": "m-3.safetensors"}})
    with pytest.raises(InputError) as caught:
        read_sharded(index, read_safetensors)
    for words in (
        "missing from their shard: `a` in m-2.safetensors, `e` in m-3.safetensors",
        "not listed there in the index: `a` in m-1.safetensors",
    ):
        assert words in str(caught.value)


def test_18_shard_has_an_extra_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = write_index(tmp_path, {"weight_map": {name: shard for name, shard in MAP.items() if name != "b"}})
    with pytest.raises(InputError, match=r"not listed there in the index: `b` in m-1\.safetensors"):
        read_sharded(index, read_safetensors)


def test_buffers_and_tied_heads_may_differ_between_index_and_shards(tmp_path: Path) -> None:
    """transformers loads such files; whatever the model needs and no shard holds is reported as missing later."""
    from safetensors.numpy import save_file

    mask = np.ones((1, 1, 2, 2), np.float32)
    save_file({"a": ARRAYS["a"], "h.1.attn.masked_bias": mask}, tmp_path / "m-1.safetensors")
    weight_map = dict.fromkeys(("a", "lm_head.weight", "h.0.attn.bias"), "m-1.safetensors")
    found = read_sharded(write_index(tmp_path, {"weight_map": weight_map}), read_safetensors)
    assert list(found) == ["a", "h.1.attn.masked_bias"]
    listed = "h.0.attn.bias, h.1.attn.masked_bias, lm_head.weight"
    assert found.notes == (f"{INDEX} and the shards differ in buffers or tied heads: {listed}",)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "link to device", "dangling link"])
def test_19_shard_is_not_a_regular_file(tmp_path: Path, kind: str) -> None:
    index = write_shards(tmp_path)
    path = tmp_path / "m-2.safetensors"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        try:
            os.mknod(path, 0o20644, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("needs root")
    else:
        path.symlink_to("/dev/zero" if kind == "link to device" else "nothing")
    with pytest.raises(UnsafeInputError, match=r"m-2\.safetensors"):
        read_sharded(index, read_safetensors)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {}}, "an empty object"),
        ({"weight_map": ["m-1.safetensors"]}, "found a list"),
        ({"weight_map": {"a": 1}}, "must be file names"),
        ([], "expected a JSON object, found a list"),
        ("", "empty"),
        ("{", "not JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "duplicate key `a`"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ],
)
def test_20_index_without_a_weight_map(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_sharded(write_index(tmp_path, content), read_safetensors)
    assert words in str(caught.value)


def test_50_types_that_differ_are_noted(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from gptconvert.model.options import Options
    from gptconvert.pipeline import convert, open_checkpoint

    raw, arrays = tiny_gpt2()
    half = {name: array.astype(np.float16) for name, array in arrays.items() if ".ln_" not in name}
    norms = {name: array for name, array in arrays.items() if ".ln_" in name}
    weight_map = {}
    for shard, some in (("m-1.safetensors", half), ("m-2.safetensors", norms)):
        save_file(some, tmp_path / shard)
        weight_map |= dict.fromkeys(some, shard)
    write_index(tmp_path, {"weight_map": weight_map})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(str(tmp_path))
    assert [note for note in checkpoint.notes if "float16 and float32" in note]
    report = convert(checkpoint, str(tmp_path.parent / "mixed-out"), Options(targets=("safetensors",))).report
    assert report is not None and report.passed


def test_20_index_of_one_gigabyte(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="too large"):
        read_weight_map(str(tmp_path / INDEX))


@settings(max_examples=60, deadline=None)
@given(
    content=st.recursive(
        st.none() | st.text(max_size=5), lambda c: st.dictionaries(st.text(max_size=5), c, max_size=3)
    )
)
def test_any_index_raises_our_errors_only(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    directory = tmp_path_factory.getbasetemp()
    with pytest.raises(GptConvertError):
        read_sharded(write_index(directory, {"weight_map": content}), read_safetensors)
