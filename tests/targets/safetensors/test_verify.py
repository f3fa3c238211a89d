from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.safetensors.plan import plan
from tests.helpers import checkpoint_of, tiny_gpt2, write_planned
from tests.verify.exports import report_on


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    raw, arrays = tiny_gpt2(1, n_inner=24)
    checkpoint = checkpoint_of(raw, arrays, tmp_path)
    write_planned(tmp_path / "out", plan(checkpoint, Options())[0].files)
    (tmp_path / "out" / "config.json").write_text(json.dumps(raw))
    return checkpoint


def table(checkpoint: Checkpoint, directory: Path) -> tuple[bool, str]:
    report = report_on(checkpoint, directory)
    return report.passed, report.table()


def test_correct_export_passes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    passed, text = table(checkpoint, tmp_path / "out")
    assert passed and "28 of 28 equal" in text, text


def test_shards(checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = write_planned(tmp_path / "sharded", plan(checkpoint, Options(max_shard_size=9_000))[0].files)
    (directory / "config.json").write_bytes((tmp_path / "out" / "config.json").read_bytes())
    assert len(list(directory.glob("*.safetensors"))) > 2
    passed, text = table(checkpoint, directory)
    assert passed, text


def rewrite(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, directory / "model.safetensors")

    return apply


def configure(**fields: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return apply


def change_one(tensors: dict[str, Any]) -> None:
    tensors["transformer.h.1.ln_2.bias"][5] += 1e-3


def transpose_square(tensors: dict[str, Any]) -> None:
    tensors["transformer.h.1.attn.c_proj.weight"] = tensors["transformer.h.1.attn.c_proj.weight"].T


def add_one(tensors: dict[str, Any]) -> None:
    tensors["transformer.h.1.attn.q.weight"] = np.zeros((3, 3), np.float32)


def drop_one(tensors: dict[str, Any]) -> None:
    del tensors["transformer.h.1.ln_2.bias"]


def swap_layers(tensors: dict[str, Any]) -> None:
    a, b = (f"transformer.h.{i}.mlp.c_fc.weight" for i in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]


BUGS: list[tuple[str, Callable[[Path], None], str]] = [
    ("one value", rewrite(change_one), "h.1.ln_2.bias: differs from its source, first at element [5]"),
    ("transposed", rewrite(transpose_square), "h.1.attn.c_proj.weight: differs"),
    ("swapped layers", rewrite(swap_layers), "h.0.mlp.c_fc.weight: differs"),
    ("extra tensor", rewrite(add_one), "unexpected  transformer.h.1.attn.q.weight"),
    ("missing tensor", rewrite(drop_one), "missing     transformer.h.1.ln_2.bias"),
    ("activation", configure(activation_function="gelu"), "config.json: activation is 'gelu_erf'"),
    ("epsilon", configure(layer_norm_epsilon=1e-6), "config.json: norm_eps is 1e-06"),
    ("heads", configure(n_head=2), "config.json: n_head is 2"),
]


@pytest.mark.parametrize(("bug", "words"), [b[1:] for b in BUGS], ids=[b[0] for b in BUGS])
def test_planted_bugs_are_caught(
    checkpoint: Checkpoint, tmp_path: Path, bug: Callable[[Path], None], words: str
) -> None:
    bug(tmp_path / "out")
    passed, text = table(checkpoint, tmp_path / "out")
    assert not passed
    assert words in text


def test_rounded_copy_of_a_wider_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Another exporter's half-precision file passes if it equals the rounded checkpoint."""
    path = tmp_path / "out" / "model.safetensors"
    save_file({n: t.astype(np.float16) for n, t in load_file(path).items()}, path)
    passed, text = table(checkpoint, tmp_path / "out")
    assert passed, text


def test_stored_tied_head_must_equal_the_embedding(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    save_file(tensors, path)
    assert table(checkpoint, tmp_path / "out")[0]
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, path)
    passed, text = table(checkpoint, tmp_path / "out")
    assert not passed and "lm_head.weight" in text
