"""OpenAI's GPT-2 variables: weights, training leftovers, and sizes without hparams.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import GptConvertError, InputError, UsageError
from gptconvert.families.registry import understand
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources.openai_tf import FORMAT
from tests.helpers import FIXTURES, Arrays, computed_tensors, openai_hparams, openai_layout, source_of, tiny_gpt2

TINY = FIXTURES / "tiny-gpt2"
FOLDERS = ["openai-tf", "openai-tf-adam", "openai-tf-sharded", "openai-tf-partitioned"]


def opened(folder: Path, **options: Any) -> Source:
    return FORMAT.open(str(folder), Options(**options))


def variables(**config: Any) -> Arrays:
    return openai_layout(tiny_gpt2(n_inner=None, **config)[1])


def understood(arrays: Arrays, request: Options | None = None, **config: Any) -> Checkpoint:
    """The checkpoint of ``arrays``; ``hparams=False``: without hparams.json."""
    raw = openai_hparams(tiny_gpt2(n_inner=None, **config)[0]) if config.pop("hparams", True) else {}
    return understand(source_of(raw, computed_tensors(arrays), scheme="openai-tf"), request or Options())


def with_names(names: Iterable[str], prefix: str = "") -> Arrays:
    extra = {name: np.zeros(3, np.float32) for name in names}
    return {**{prefix + name: array for name, array in variables().items()}, **extra}


# --- fixtures written by TensorFlow --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_layouts_hold_the_same_weights(folder: str) -> None:
    """Sharded, partitioned or with optimizer slots, it is the same model."""
    weights = understand(opened(TINY / folder), Options()).weights
    first = understand(opened(TINY / "openai-tf"), Options()).weights
    assert list(weights) == list(first)
    assert all(weights[name].read().tobytes() == first[name].read().tobytes() for name in first)


def test_adam_state_is_dropped_by_name() -> None:
    checkpoint = understand(opened(TINY / "openai-tf-adam"), Options())
    counters = dict.fromkeys(("beta1_power", "beta2_power", "global_step"), "training counter")
    slots = {name for name in checkpoint.source.tensors if name.endswith(("/Adam", "/Adam_1"))}
    assert len(slots) == 8
    assert checkpoint.dropped == dict.fromkeys(slots, "optimizer slot") | counters
    assert len(checkpoint.weights) == 28


def test_step_10_and_20_differ() -> None:
    early, late = (understand(opened(TINY / "openai-tf-adam", step=step), Options()).weights for step in (10, 20))
    assert any(early[name].read().tobytes() != late[name].read().tobytes() for name in early)


# --- other training variables --------------------------------------------------------------------------------------

LEFTOVERS = [
    "global_step",
    "Variable",
    "Variable_1",
    "beta1_power",
    "training/beta2_power",
    "model/beta1_power",
    "model/wte/Adam",
    "model/wte/Adam_1",
    "model/h1/attn/c_attn/w/AdamW_1",
    "model/h0/ln_1/g/Momentum",
    "model/h0/mlp/c_fc/b/RMSProp_1",
    "model/h0/attn/c_proj/w/Adafactor",
    "model/h0/attn/c_proj/w/Adafactor_1",
    "model/wpe/adam_m",
    "model/wpe/adam_v",
    "model/ln_f/b/vr",
    "model/ln_f/b/vc",
    "model/ln_f/b/ExponentialMovingAverage",
    "OptimizeLoss/model/h0/ln_2/b/Adam",
    "model/model/wte/Adam",
    "DistributedAdamOptimizer_Allreduce/x",
    "total_loss",
]


@pytest.mark.parametrize("prefix", ["", "worker_0/"])
def test_training_leftovers_are_dropped(prefix: str) -> None:
    names = [prefix + name if name.startswith("model/") else name for name in LEFTOVERS]
    checkpoint = understood(with_names(names, prefix))
    assert set(checkpoint.dropped) == set(names)
    assert checkpoint.prefix == prefix


UNKNOWN = [
    "model/adapter/w",
    "model/lm_head",
    "model/wte_extra",
    "model/wte/lora_a",
    "model/wte/part_0",
    "model/wte/Adam/more",
    "model/h0/attn/c_attn/w/lora_b",
    "model/h0/attn/c_attn/scale",
    "model/h0/attn/q_norm/g",
    "model/h0/ln_3/g",
    "model/h0/mlp/c_gate/w",
    "model/h0/mlp/c_gate/w/Adam",
    "model/h2/ln_1/g",
    "model/h00/ln_1/g",
    "model/ln_f/g\nextra",
    "other/model/wte2",
]


@pytest.mark.parametrize("name", UNKNOWN, ids=repr)
def test_unknown_model_variables_are_rejected(name: str) -> None:
    with pytest.raises(InputError, match="unexpected"):
        understood(with_names([name]))


def test_all_unknown_variables_are_listed() -> None:
    with pytest.raises(InputError) as caught:
        understood(with_names(["model/adapter/w", "model/h0/ln_3/g", "global_step"]))
    assert "model/adapter/w" in str(caught.value)
    assert "model/h0/ln_3/g" in str(caught.value)
    assert "global_step" not in str(caught.value)


def test_missing_and_extra_layers() -> None:
    arrays = variables()
    without = {name: array for name, array in arrays.items() if not name.startswith("model/h1/")}
    with pytest.raises(InputError, match=r"missing .*model/h1/"):
        understood(without)
    with pytest.raises(InputError, match=r"unexpected .*model/h2/"):
        understood(variables(n_layer=3))


# --- no hparams.json ----------------------------------------------------------------------------------------------


def test_sizes_from_the_shapes_and_heads_of_64() -> None:
    checkpoint = understood(variables(n_embd=128, vocab_size=31, n_positions=9, n_layer=3), hparams=False)
    config = checkpoint.config
    assert (config.vocab_size, config.n_ctx, config.n_embd, config.n_layer) == (31, 9, 128, 3)
    assert (config.n_head, config.n_inner) == (2, 512)
    assert "n_head = 2 (128 / 64" in checkpoint.notes[0]


def test_n_head_option() -> None:
    checkpoint = understood(variables(), Options(n_head=3), hparams=False)
    assert checkpoint.config.n_head == 3
    assert "n_head = 3 (--n-head)" in checkpoint.notes[0]


def test_n_head_is_required_if_64_does_not_divide_the_width() -> None:
    with pytest.raises(UsageError, match="24 is not a multiple of 64") as caught:
        understood(variables(), hparams=False)
    assert "--n-head" in (caught.value.hint or "")


@pytest.mark.parametrize("heads", [5, 7, 16, 48])
def test_n_head_must_divide_the_width(heads: int) -> None:
    with pytest.raises(UsageError, match=f"--n-head {heads} does not divide"):
        understood(variables(), Options(n_head=heads), hparams=False)


def test_run_directory_without_hparams(tmp_path: Path) -> None:
    """nshepperd's tool keeps hparams.json only with the base model."""
    for path in (TINY / "openai-tf-adam").iterdir():
        if path.name != "hparams.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = understand(opened(tmp_path), Options(n_head=3)).config
    assert config == understand(opened(TINY / "openai-tf-adam"), Options()).config
    given = understand(opened(tmp_path, hparams=str(TINY / "openai-tf/hparams.json")), Options()).config
    assert given == config


@pytest.mark.parametrize(
    "change",
    [
        {"model/wte": np.zeros((0, 0), np.float32)},
        {"model/wte": np.zeros(5, np.float32)},
        {"model/wpe": np.zeros((2, 3, 4), np.float32)},
        {"model/h99999/ln_1/g": np.zeros(24, np.float32)},
        {"model/h٣/ln_1/g": np.zeros(24, np.float32)},
        {"model/h" + "9" * 5000 + "/ln_1/g": np.zeros(24, np.float32)},
    ],
    ids=lambda change: repr(*change)[:30],
)
def test_impossible_shapes_are_rejected(change: Arrays) -> None:
    with pytest.raises(GptConvertError):
        understood({**variables(), **change}, Options(n_head=3), hparams=False)


def test_no_wpe() -> None:
    arrays = variables()
    del arrays["model/wpe"]
    with pytest.raises(InputError, match=r"no hparams\.json"):
        understood(arrays, Options(n_head=3), hparams=False)


# --- hparams.json against the weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, "missing .*model/h2/"),
        ({"n_layer": 1}, "unexpected .*model/h1/"),
        ({"n_vocab": 98}, r"model/wte: expected \[98, 24\], found \[97, 24\]"),
        ({"n_ctx": 20}, r"model/wpe: expected \[20, 24\], found \[40, 24\]"),
        ({"n_embd": 48}, "wrong shape"),
        ({"n_head": 5}, "n_head"),
        ({"n_head": "3"}, "n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": 1 << 40}, "n_layer"),
        ({"n_vocab": None}, "n_vocab"),
        ({"rotary": True}, "rotary"),
    ],
    ids=str,
)
def test_hparams_that_contradict_the_weights(tmp_path: Path, change: dict[str, object], message: str) -> None:
    for path in (TINY / "openai-tf").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    hparams = json.loads((tmp_path / "hparams.json").read_text()) | change
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    with pytest.raises(GptConvertError, match=message):
        understand(opened(tmp_path), Options())


def test_n_head_must_not_contradict_hparams() -> None:
    with pytest.raises(UsageError, match="contradicts"):
        understand(opened(TINY / "openai-tf"), Options(n_head=4))
