"""The text that ``inspect`` prints: one screen that describes the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gptconvert.cli.config_summary import config_summary
from reference_model.config import GPTConfig, Rotary
from reference_model.rotary import RopeScaling
from tests.commands import ORIGINALS, TINY, TRAINED, command


def config(**changes: Any) -> dict[str, str]:
    """The summary of a tiny GPT-2 with ``changes``."""
    layers = changes.get("n_layer", 2)
    fields: dict[str, Any] = {
        "family": "gpt2",
        "vocab_size": 97,
        "n_ctx": 40,
        "n_embd": 24,
        "n_layer": layers,
        "n_head": 3,
        "n_inner": 56,
        "attn_scale": (8**-0.5,) * layers,
        "attn_window": (None,) * layers,
    }
    ids = {"bos": None, "eos": changes.pop("eos", ()), "pad": None}
    return dict(config_summary(GPTConfig(**fields | changes).as_dict(), ids))


def test_gpt2_fits_a_screen(capsys: Any) -> None:
    lines = command(capsys, "inspect", TRAINED).out.splitlines()
    assert len(lines) <= 35
    assert max(map(len, lines)) <= 80


def test_layers_are_folded_with_their_total_size(capsys: Any) -> None:
    lines = [line.split() for line in command(capsys, "inspect", TRAINED).out.splitlines()]
    assert ["model/h{0..3}/attn/c_attn/w", "float32", "1×144×432", "995.3", "kB"] in lines
    assert ["model/wte", "float32", "2003×144", "1.2", "MB"] in lines
    assert sum(line[:1] != [] and line[0].startswith("model/") for line in lines) == 16


def test_all_tensors_or_none(capsys: Any) -> None:
    found = command(capsys, "inspect", TRAINED, "--json").json["tensors"]
    every = command(capsys, "inspect", TRAINED, "--tensors").out.split()
    assert {tensor["name"] for tensor in found} == {word for word in every if word.startswith("model/")}
    assert len(found) == 52
    assert "model/" not in command(capsys, "inspect", TRAINED, "--no-tensors").out


def test_layers_of_different_types_are_not_folded_together(capsys: Any) -> None:
    from gptconvert.cli.inspect import _tensor_table

    tensors = [{"name": f"h.{i}.w", "dtype": dtype, "shape": [2, 3], "size": 10} for i, dtype in enumerate("aab")]
    lines = [line.split() for line in _tensor_table(tensors, every=False).splitlines()]
    assert lines[1:] == [["h.{0..1}.w", "a", "2×3", "20", "B"], ["h.2.w", "b", "2×3", "10", "B"]]


def test_dropped_tensors_are_folded_under_their_reason(capsys: Any) -> None:
    out = command(capsys, "inspect", TINY / "hf-bin").out
    assert "  2 tensors: causal mask buffer\n    transformer.h.{0..1}.attn.bias\n" in out
    adam = command(capsys, "inspect", TINY / "openai-tf-adam").out
    assert "  8 tensors: optimizer slot\n" in adam
    assert "    … 4 more kinds (--tensors lists all)\n" in adam
    assert "model/wpe/Adam" not in adam
    assert "model/wpe/Adam" in command(capsys, "inspect", TINY / "openai-tf-adam", "--tensors").out


def test_layer_names_of_other_trainers_are_folded(capsys: Any) -> None:
    out = command(capsys, "inspect", ORIGINALS / "mesh-jax").out
    assert "layer_{0..1}/~/linear_1/w" in out


@pytest.mark.parametrize(
    ("changes", "row", "expected"),
    [
        ({}, "layers", "2, each attention then MLP"),
        ({"residual": "parallel"}, "layers", "2, each attention and MLP in parallel"),
        ({}, "width", "24, 3 heads of 8, MLP of 56"),
        ({}, "context", "40 tokens"),
        ({"eos": (96,)}, "vocabulary", "97 tokens, eos 96"),
        ({"eos": (96, 62)}, "vocabulary", "97 tokens, eos 96 or 62"),
        ({}, "activation", "GELU (tanh approximation)"),
        ({"activation": "relu"}, "activation", "relu"),
        ({}, "positions", "learned"),
        ({"rotary": Rotary(4)}, "positions", "rotary on 4 of 8 features, split in halves, base 10000"),
        ({"rotary": Rotary(0)}, "positions", "none (rotary on 0 features)"),
        (
            {"rotary": Rotary(4, scaling=RopeScaling("linear", 2.5))},
            "positions",
            "rotary on 4 of 8 features, split in halves, base 10000, linear scaling by 2.5",
        ),
        ({"rotary": Rotary(8, 1e6, True)}, "positions", "rotary on 8 of 8 features, interleaved pairs, base 1e+06"),
        ({}, "attention", "full; scores divided by √8"),
        ({"attn_scale": (1.0, 1.0)}, "attention", "full; scores not scaled"),
        ({"attn_scale": (8**-0.5, 8**-0.5 / 2)}, "attention", "full; scores divided by √8 and by the layer number"),
        ({"attn_scale": (0.25, 0.25)}, "attention", "full; scores times 0.25"),
        ({"n_layer": 6, "attn_window": (None, 5) * 3}, "attention", "full, last 5 tokens, in turn; "),
        ({"n_layer": 6, "attn_window": (None, 5, 5, 5, 5, 5)}, "attention", "full in 1 layer, last 5 tokens in 5"),
        ({}, "norms", "before attention and MLP, and at the end, epsilon 1e-05"),
        ({"norm_position": "post", "final_norm": False}, "norms", "after attention and MLP, epsilon 1e-05"),
        ({}, "head", "the token embedding (tied)"),
        ({"tied_head": False, "head_bias": True}, "head", "separate weights, with bias"),
        ({"task": "feature-extraction"}, "head", "none"),
        ({"task": "token-classification", "n_labels": 5}, "head", "5 labels"),
        ({"task": "question-answering"}, "head", "question-answering"),
    ],
)
def test_configuration_summary(changes: dict[str, Any], row: str, expected: str) -> None:
    assert config(**changes)[row].startswith(expected)


def test_generation_settings_are_not_called_a_tokenizer(capsys: Any, tmp_path: Path) -> None:
    shutil.copytree(TINY / "hf-safetensors", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    found = command(capsys, "inspect", tmp_path / "model", "--json").json
    assert found["tokenizer"] == []
    assert "generation_config.json" in {entry["name"] for entry in found["inventory"]}
