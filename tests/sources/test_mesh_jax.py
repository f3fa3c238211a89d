"""GPT-J's shards, written with NumPy from a tree of modules and compared with transformers."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import originals as writers
from fixtures.make_originals import JAX_CONFIG, jax_config, jax_model, write_golden
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError, UsageError
from gptconvert.families.trainers.mesh_jax import MESH_JAX
from gptconvert.model import shards
from gptconvert.model.assembly import in_order
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.schemes import Row, concrete
from gptconvert.model.shards import FIRST, SUM, Copies, Parts, Sum
from gptconvert.model.tensors import Stored, filled, total
from gptconvert.sources import mesh_jax
from tests.helpers import examine
from tests.sources.originals import BUG, NOISE, ORIGINALS, copied, difference, opened, plant, understood

FOLDER = ORIGINALS / "mesh-jax"
STEP = "step_100"
SCOPE = "causal_transformer_shard/~/"
EMBEDDING = f"{SCOPE}embedding_shard/~/linear/w"

pytestmark = pytest.mark.usefixtures("no_hang")


def test_the_logits_match_transformers() -> None:
    checkpoint = understood(FOLDER)
    assert difference(checkpoint, FOLDER) < NOISE
    assert {weight.dtype for weight in checkpoint.weights.values()} == {BFLOAT16}
    assert checkpoint.config.rotary is not None
    assert checkpoint.config.rotary.interleaved
    assert list(checkpoint.dropped) == ["step"]


@pytest.mark.parametrize(
    ("layers", "dtype", "optimizer"),
    [(11, np.float32, False), (1, np.float16, False), (2, np.float32, True)],
    ids=["11 layers", "float16", "optimizer"],
)
def test_other_models(tmp_path: Path, layers: int, dtype: Any, optimizer: bool) -> None:
    """Layer 10 sorts before layer 2; a single layer leaves files empty; full checkpoints begin with Adam's state."""
    trees, whole = jax_model(layers, np.dtype(dtype))
    writers.write_mesh_jax(tmp_path, trees, 7, optimizer=optimizer)
    (tmp_path / "config.json").write_text(json.dumps({**JAX_CONFIG, "layers": layers}))
    write_golden(tmp_path, jax_config(layers), whole)
    checkpoint = understood(tmp_path)
    assert difference(checkpoint, tmp_path) < NOISE
    left_out = [note for note in checkpoint.notes if "optimizer arrays are left out" in note]
    assert len(left_out) == optimizer


def test_the_order_is_that_of_jaxs_tree_flatten() -> None:
    trees, _ = jax_model(11, np.dtype(np.float32))
    assert [name for _, name in in_order(MESH_JAX, 11)] == [
        f"{module}/{leaf}" for module, leaves in sorted(trees[0].items()) for leaf in sorted(leaves)
    ]


def test_layers_are_sorted_as_strings() -> None:
    names = [name.split("/")[2] for _, name in in_order(MESH_JAX, 28)]
    layers = list(dict.fromkeys(name for name in names if name.startswith("layer_")))
    assert layers[:4] == ["layer_0", "layer_1", "layer_10", "layer_11"]
    assert layers[-1] == "layer_9"
    assert len(names) == 286


def test_a_box_equals_a_slice_of_the_whole() -> None:
    for name, tensor in understood(FOLDER).source.tensors.items():
        if not tensor.shape:
            continue
        whole = tensor.read()
        box = tuple(slice(n // 3, n) for n in tensor.shape)
        assert np.array_equal(tensor.read(box), whole[box]), name
        assert b"".join(chunk.tobytes() for chunk in tensor.chunks(200)) == whole.tobytes(), name


def test_memory_is_bounded_by_a_block(tmp_path: Path) -> None:
    """Reading four layers of 1 MiB matrices in blocks never holds a whole matrix, let alone a shard."""
    shards, width, layers, dtype = 2, 512, 4, np.dtype(np.float32)
    sizes = {"V": width, "D": width, "F": 4 * width}

    def part(row: Row, name: str) -> Any:
        if row.added is not None and name.endswith(row.added):
            return np.zeros(width, dtype)
        return np.zeros(row.shards.split(filled(0.0, dtype, concrete(row.shape, sizes)), shards)[0].shape, dtype)

    leaves = [*(part(row, name) for row, name in in_order(MESH_JAX, layers)), np.int32(1)]
    for k in range(shards):
        (tmp_path / f"shard_{k}").mkdir()
        for i, piece in enumerate(np.array_split(np.arange(len(leaves)), 16)):
            np.savez(tmp_path / f"shard_{k}" / f"{i}.npz", *[leaves[j] for j in piece])
    raw = {**JAX_CONFIG, "layers": layers, "d_model": width, "n_heads": 4, "n_vocab": width}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = understood(tmp_path).source.tensors
    tracemalloc.start()
    for tensor in tensors.values():
        for _ in tensor.chunks(1 << 16):
            pass
    assert tracemalloc.get_traced_memory()[1] < 600_000
    tracemalloc.stop()


@pytest.mark.parametrize("inside", ["", STEP])
def test_paths(inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = FOLDER / inside if inside else FOLDER
    assert mesh_jax.recognises(str(folder))
    source = opened(folder)
    assert source.path.endswith(STEP)
    assert str(source.config_path).endswith("6B_roto_tiny.json")
    monkeypatch.chdir(folder)
    assert len(opened(".").tensors) == len(source.tensors)


def test_several_steps(tmp_path: Path) -> None:
    folder = copied(tmp_path, "mesh-jax")
    shutil.copytree(folder / STEP, folder / "step_20")
    source = opened(folder)
    assert source.path.endswith(STEP)
    assert "2 checkpoints in the directory" in source.notes[0]
    assert opened(folder, step=20).path.endswith("step_20")
    with pytest.raises(InputError, match="no checkpoint of step 21"):
        opened(folder, step=21)
    with pytest.raises(UsageError):
        opened(folder / STEP, step=20)


def shard(folder: Path, number: int) -> Path:
    return folder / STEP / f"shard_{number}"


def rewrite(path: Path, *arrays: Any) -> None:
    np.savez(path, *arrays)


def short_shard(folder: Path) -> None:
    for number in range(3):
        rewrite(shard(folder, number) / "15.npz")


def second_layout(folder: Path) -> None:
    (folder / "params").mkdir()
    rewrite(folder / "params" / "shard_0.npz", np.ones(3))


def packed(folder: Path) -> None:
    path = shard(folder, 1) / "3.npz"
    np.savez_compressed(path, *np.load(path).values())


def damaged(folder: Path) -> None:
    path = shard(folder, 1) / "3.npz"
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda f: (shard(f, 1) / "3.npz").unlink(), InputError, r"files are missing: shard_1/3\.npz"),
        (lambda f: shutil.rmtree(shard(f, 1)), InputError, "16 in all"),
        (lambda f: shutil.rmtree(shard(f, 2)), InputError, "some shards are missing"),
        (short_shard, InputError, "not distributed over the files"),
        (lambda f: rewrite(shard(f, 1) / "15.npz", np.ones(1), np.ones(1)), InputError, "not distributed over"),
        (lambda f: rewrite(shard(f, 1) / "15.npz", np.ones(7)), InputError, "differ in shape"),
        (lambda f: rewrite(shard(f, 1) / "15.npz", np.array([None], object)), UnsafeInputError, "nothing executed"),
        (lambda f: np.savez(shard(f, 1) / "15.npz", step=np.int32(1)), InputError, "unexpected array names"),
        (packed, UnsafeInputError, "compressed"),
        (damaged, InputError, "truncated"),
        (second_layout, UnsupportedError, "second layout"),
        (lambda f: shutil.copy(f / "6B_roto_tiny.json", f / "other.json"), InputError, "several configuration files"),
        (lambda f: (f / "6B_roto_tiny.json").unlink(), UsageError, "the sizes are not those of GPT-J 6B"),
        (lambda f: os.mkfifo(f / "x.json"), type(None), ""),
    ],
)
def test_bad_shards(tmp_path: Path, damage: Any, kind: type[GptConvertError], words: str) -> None:
    folder = copied(tmp_path, "mesh-jax")
    damage(folder)
    if kind is type(None):
        understood(folder)
        return
    with pytest.raises(kind, match=words):
        understood(folder)


def test_one_shard_or_one_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one shard of several"):
        opened(FOLDER / STEP / "shard_0")
    with pytest.raises(InputError, match="zip archive"):
        mesh_jax.FORMAT.open(str(FOLDER / STEP / "shard_0" / "0.npz"), mesh_jax.Options())


def test_the_wrong_number_of_arrays(tmp_path: Path) -> None:
    for i in range(16):
        (tmp_path / "shard_0").mkdir(exist_ok=True)
        rewrite(tmp_path / "shard_0" / f"{i}.npz", np.ones(2))
    with pytest.raises(InputError, match="does not match any number of layers") as caught:
        understood(tmp_path)
    assert caught.value.expected == "10 L + 7 for L layers, with optimizer state 30 L + 21"
    assert caught.value.found == "16 arrays in every shard"


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"pe": "fixed"}, UnsupportedError, "pe 'fixed' is not implemented"),
        ({"pe": "t5"}, UnsupportedError, "pe 't5'"),
        ({"norm": "rmsnorm"}, UnsupportedError, "norm 'rmsnorm'"),
        ({"layers": 3}, InputError, "missing"),
        ({"n_heads": 5}, InputError, "does not divide"),
        ({"pe_rotary_dims": 5}, InputError, "must be even"),
        ({"d_head": 8}, UnsupportedError, "d_head"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[GptConvertError], words: str
) -> None:
    folder = copied(tmp_path, "mesh-jax")
    (folder / "6B_roto_tiny.json").write_text(json.dumps({**JAX_CONFIG, **changes}))
    with pytest.raises(kind, match=words):
        understood(folder)


def test_without_a_configuration_the_released_model_is_recognised_by_its_shapes() -> None:
    from gptconvert.families.registry import family_named
    from gptconvert.model.options import Options
    from gptconvert.model.tensors import filled

    table = filled(0.0, np.dtype(np.float32), (50400, 4096))
    layers = {f"{SCOPE}layer_{i}/~/linear_3/w": table for i in range(28)}
    family, tensors = family_named("gptj"), {EMBEDDING: table, **layers}
    config, _, notes = family.read_config("mesh-jax", {}, None, tensors, Options())
    assert (config.n_head, config.n_ctx, config.rotary.dim, config.head_dim) == (16, 2048, 64, 256)  # type: ignore[union-attr]
    assert "GPT-J 6B" in notes[0]


def test_checksums_are_compared(tmp_path: Path) -> None:
    """A flipped bit in a shard's arrays is found when the weights are read."""
    folder = copied(tmp_path, "mesh-jax")
    examine(understood(folder))
    path = shard(folder, 2) / "4.npz"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="crc32 checksum does not match"):
        examine(understood(folder))


@pytest.mark.parametrize(
    "bug", ["k before v", "bias summed twice", "bias of one shard", "norm averaged", "no embedding bias"]
)
def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    class SummedTwice(Sum):
        def merge(self, parts: Any, shape: Any) -> Any:
            return total([*parts, *parts])

    def planted(row: Row) -> Row:
        if bug == "k before v" and len(row.names) == 3:
            return replace(row, stored=(row.names[0], row.names[2], row.names[1]))
        if bug == "bias summed twice" and row.shards == SUM:
            return replace(row, shards=SummedTwice())
        if bug == "bias of one shard" and row.shards == SUM:
            return replace(row, shards=FIRST)
        if bug == "norm averaged" and "layer_norm" in row.names[0]:
            return replace(row, shards=Copies("norms", averaged=True))
        return row

    plant(monkeypatch, "mesh-jax", lambda table: replace(table, rows=tuple(map(planted, table.rows))))
    if bug == "no embedding bias":
        monkeypatch.setattr(shards, "added_to_rows", lambda table, biases: table)
    assert difference(understood(FOLDER), FOLDER) > BUG


def test_the_source_provides_unmerged_parts() -> None:
    """No names, one part per shard, nothing merged."""
    source = opened(FOLDER)
    assert not source.tensors
    assert len(source.unnamed) == len(in_order(MESH_JAX, 2)) + 1
    for parts in source.unnamed:
        assert isinstance(parts, Parts)
        assert len(parts.parts) == len(parts.checksums) == 3


def test_tensors_split_by_rows_can_be_copied_raw() -> None:
    tensors = understood(FOLDER).source.tensors
    merged = tensors[f"{SCOPE}layer_0/~/linear_5/w"]
    assert isinstance(merged, Stored)
    assert len(merged.parts) == 3
    assert tensors[f"{SCOPE}layer_0/~/linear/w"].segments() is None
