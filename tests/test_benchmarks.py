"""The benchmarks of scale and of variants make the checkpoints and exports that they measure, and delete them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import batch, llama, scale, variants
from benchmarks.checkpoints import SIZES, Large
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.pipeline import open_checkpoint

SMALL: dict[str, dict[str, object]] = {
    "gptj": {"vocab_size": 96, "n_positions": 40, "n_embd": 64, "n_head": 4, "rotary_dim": 8},
    "gpt_neox": {
        "vocab_size": 96,
        "max_position_embeddings": 40,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 4,
    },
}


def small(family: str, source: str, layers: int) -> Large:
    """A model of a family at sizes that take no time."""
    return Large(family, source, layers, SMALL[family], shard_bytes=30_000)


@pytest.mark.parametrize(("family", "source"), [("gptj", "hf"), ("gptj", "mesh-jax"), ("gpt_neox", "hf")])
def test_checkpoints_are_whole(family: str, source: str, tmp_path: Path) -> None:
    model = small(family, source, 3)
    model.write(tmp_path / "made")
    checkpoint = open_checkpoint(str(tmp_path / "made"), format=source)
    assert (checkpoint.config.family, checkpoint.config.n_layer) == (family, 3)
    assert checkpoint.nbytes == model.nbytes
    assert {weight.dtype for weight in checkpoint.weights.values()} == {BFLOAT16}
    assert len(list(tmp_path.glob("made/*.safetensors"))) > 2 or source == "mesh-jax"
    spread = {name: w.read().astype(np.float32).std() for name, w in checkpoint.weights.items() if len(w.shape) == 2}
    assert all(0.015 < value < 0.025 for name, value in spread.items() if source == "hf"), spread


def test_a_row_for_each_conversion_and_nothing_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(["--layers", "2", "1", "--mode", "unverified", "--to", "safetensors", "--data", str(tmp_path)], small)
    title, _, first, second = capsys.readouterr().out.splitlines()
    assert "gptj, hf → safetensors" in title
    assert first.startswith("| 1 × unverified |") and first.endswith("| – |")
    assert second.startswith("| 2 × unverified |") and not second.endswith("| – |")
    assert list(tmp_path.iterdir()) == []


def test_only_gptj_has_a_trainer_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        scale.main(["--family", "gpt_neox", "--source", "mesh-jax", "--data", str(tmp_path)], small)


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not enough disk space"):
        scale.main(["--data", str(tmp_path)], small, spare_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", [(), ("--dask",)])
def test_a_row_for_each_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: tuple[str, ...]
) -> None:
    monkeypatch.setitem(SIZES, "small", {"n_vocab": 97, "n_ctx": 32, "n_embd": 48, "n_head": 3, "n_layer": 2})
    words = ("--size", "small", "--count", "2", "--workers", "1", "2", "--data", str(tmp_path))
    batch.main([*words, *engine])
    title, _, first, second = capsys.readouterr().out.splitlines()
    assert title.startswith("| 2 × small → safetensors, not verified")
    assert first.startswith("| 1 at a time |") and "| 1.00 |" in first
    assert second.startswith("| 2 at a time |")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.slow
def test_a_row_for_each_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"n_vocab": 97, "n_ctx": 32, "n_embd": 48, "n_head": 3, "n_layer": 2}
    monkeypatch.setitem(SIZES, "small", small)
    variants.main(["--size", "small", "--quick", "--no-conversion", "--processor-time", "--data", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in printed[2:]}
    assert set(variants.GRAPHS) <= set(rows)
    assert rows["fp32"][1].endswith("(×1.00)")
    assert rows["fp32, last token"][1] == "–"
    assert 0 < float(rows["q4"][0]) < float(rows["fp32"][0])
    assert not (tmp_path / "small-variants").exists()


@pytest.mark.parametrize(
    ("canonical", "expected"),
    [
        ("wte.weight", "token_embd.weight"),
        ("h.3.attn.c_attn.bias", "blk.3.attn_qkv.bias"),
        ("ln_f.bias", "output_norm.bias"),
    ],
)
def test_names_in_gguf(canonical: str, expected: str) -> None:
    assert llama._name(canonical) == expected
