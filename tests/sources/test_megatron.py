"""Megatron-LM's GPT-2: locating the file, interpreting its arguments, and the three orders of q, k and v."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from fixtures import foreign
from gptconvert.errors import InputError, UnsafeInputError, UnsupportedError, UsageError
from gptconvert.model.options import Options
from gptconvert.sources import megatron
from tests.helpers import checkpoint_of
from tests.sources.foreign import ORIGINALS, PLAIN, gap, gpt2_arrays, opened, same_weights

RUN = ORIGINALS / "megatron"
ARGUMENTS: dict[str, Any] = {
    "padded_vocab_size": 97,
    "max_position_embeddings": 40,
    "hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 3,
    "ffn_hidden_size": 96,
    "layernorm_epsilon": 1e-5,
    "bias_gelu_fusion": True,
    "openai_gelu": False,
    "onnx_safe": None,
    "position_embedding_type": "learned_absolute",
}


def save(path: Path, version: int = 3, given: bool = True, change: Any = None, **arguments: Any) -> Path:
    import torch

    _, arrays = gpt2_arrays()
    saved = foreign.megatron_checkpoint(arrays, 3, version, 2, **({**ARGUMENTS, **arguments} if given else {}))
    if change is not None:
        change(saved)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path)
    return path


@pytest.mark.parametrize(
    "where", ["", "iter_0500000", "iter_0500000/mp_rank_00", "iter_0500000/mp_rank_00/model_optim_rng.pt"]
)
def test_fixture_matches_the_golden_logits(where: str) -> None:
    checkpoint = opened(RUN / where)
    assert checkpoint.source.scheme == "megatron:2"
    assert gap(checkpoint, "megatron") < 1e-12


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_every_order_of_q_k_and_v(tmp_path: Path, version: int) -> None:
    raw, arrays = gpt2_arrays()
    checkpoint = opened(save(tmp_path / "model_optim_rng.pt", version))
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    assert all(weight.segments() is not None for weight in checkpoint.weights.values())


@pytest.mark.parametrize(("written", "read"), [(0, 1), (1, 2), (2, 0), (1, 0), (2, 1), (0, 2)])
def test_a_wrong_order_would_be_noticed(tmp_path: Path, written: int, read: int) -> None:
    """The orders have equal shapes: only the recorded version distinguishes them."""

    def relabel(saved: dict[str, Any]) -> None:
        saved["checkpoint_version"] = float(read)

    raw, arrays = gpt2_arrays()
    assert not same_weights(
        opened(save(tmp_path / "model_optim_rng.pt", written, change=relabel)), checkpoint_of(raw, arrays)
    )


def test_released_model_has_no_arguments(tmp_path: Path) -> None:
    raw, arrays = gpt2_arrays()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    save(tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt", 0, given=False)
    with pytest.raises(UsageError, match="number of heads"):
        opened(tmp_path)
    checkpoint = opened(tmp_path, Options(n_head=3))
    assert checkpoint.source.scheme == "megatron:0"
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    assert checkpoint.config.activation == "gelu_tanh"
    assert any("--activation erf" in note for note in checkpoint.notes)
    assert opened(tmp_path, Options(n_head=3, activation="erf")).config.activation == "gelu_erf"


@pytest.mark.parametrize(
    ("arguments", "activation"),
    [
        ({"bias_gelu_fusion": True}, "gelu_tanh"),
        ({"bias_gelu_fusion": False}, "gelu_erf"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_tanh"),
        ({"bias_gelu_fusion": False, "onnx_safe": True}, "gelu_erf"),
    ],
)
def test_activation(tmp_path: Path, arguments: dict[str, Any], activation: str) -> None:
    path = save(tmp_path / "model_optim_rng.pt", **arguments)
    assert opened(path).config.activation == activation
    if activation == "gelu_tanh":
        with pytest.raises(UsageError, match="contradicts"):
            opened(path, Options(activation="erf"))
    else:  # the checkpoint converter turns fusion off, so that the option decides
        assert opened(path, Options(activation="tanh")).config.activation == "gelu_tanh"


#: What Megatron-LM's tools/checkpoint writes into ``args``, whatever the model was trained with.
CONVERTED = {
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "use_cpu_initialization": True,
}


def test_the_checkpoint_converter_does_not_decide_the_activation(tmp_path: Path) -> None:
    path = save(tmp_path / "model_optim_rng.pt", **CONVERTED)
    checkpoint = opened(path)
    assert checkpoint.config.activation == "gelu_tanh"
    assert any("converter" in note and "--activation erf" in note for note in checkpoint.notes)
    for name in ("tanh", "erf"):
        chosen = opened(path, Options(activation=name))
        assert chosen.config.activation == f"gelu_{name}"
        assert not any("converter" in note for note in chosen.notes)
    for name in [*CONVERTED][1:]:
        trained = save(tmp_path / "other.pt", **{**CONVERTED, name: not CONVERTED[name]})
        assert opened(trained).config.activation == "gelu_erf"


def test_norms_of_newer_versions(tmp_path: Path) -> None:
    raw, arrays = gpt2_arrays()

    def rename(saved: dict[str, Any]) -> None:
        model = saved["model"]["language_model"]
        body = next(key for key in ("encoder", "transformer") if key in model)
        model[body] = {name.replace("layernorm", "norm"): tensor for name, tensor in model[body].items()}
        assert {"final_norm.weight", "layers.0.input_norm.bias", "layers.1.post_attention_norm.weight"} <= set(
            model[body]
        )

    checkpoint = opened(save(tmp_path / "model_optim_rng.pt", change=rename))
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))


@pytest.mark.parametrize(
    "argument",
    [
        {"swiglu": True},
        {"position_embedding_type": "rope"},
        {"normalization": "RMSNorm"},
        {"untie_embeddings_and_output_weights": True},
        {"apply_residual_connection_post_layernorm": True},
        {"add_bias_linear": False},
        {"num_experts": 8},
        {"kv_channels": 16},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 4},
        {"model_parallel_size": 8},
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path: Path, argument: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        opened(save(tmp_path / "model_optim_rng.pt", **argument))
    assert next(iter(argument)) in f"{caught.value} {caught.value.item}"


def test_split_models_are_refused(tmp_path: Path) -> None:
    for rank in ("mp_rank_00", "mp_rank_01"):
        save(tmp_path / rank / "model_optim_rng.pt")
    with pytest.raises(UnsupportedError, match="split over several devices"):
        opened(tmp_path)
    pipeline = tmp_path / "pipeline" / "mp_rank_00_001" / "model_optim_rng.pt"
    save(pipeline)
    with pytest.raises(UnsupportedError, match="split over several devices"):
        opened(tmp_path / "pipeline")

    def virtual(saved: dict[str, Any]) -> None:
        saved["model0"] = saved.pop("model")

    with pytest.raises(UnsupportedError, match="virtual pipeline"):
        opened(save(tmp_path / "v" / "model_optim_rng.pt", change=virtual))


def test_megatron_core_is_refused(tmp_path: Path) -> None:
    def core(saved: dict[str, Any]) -> None:
        stack = saved["model"]["language_model"].pop("encoder")
        saved["model"] = {f"decoder.{name}": tensor for name, tensor in stack.items()}

    with pytest.raises(UnsupportedError, match="Megatron-Core"):
        opened(save(tmp_path / "model_optim_rng.pt", change=core))


@pytest.mark.parametrize("version", [4.0, -1, "3", None])
def test_unknown_versions(tmp_path: Path, version: object) -> None:
    def change(saved: dict[str, Any]) -> None:
        saved["checkpoint_version"] = version

    with pytest.raises(UnsupportedError, match="version"):
        opened(save(tmp_path / "model_optim_rng.pt", change=change))


def test_steps(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path / f"iter_{step:07d}" / "mp_rank_00" / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    assert "iter_0000020" in opened(tmp_path).source.path
    assert "iter_0000010" in opened(tmp_path, step=10).source.path
    with pytest.raises(InputError, match="iter_0000030"):
        opened(tmp_path, step=30)
    with pytest.raises(UsageError, match="--step"):
        opened(tmp_path / "iter_0000010", step=10)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(InputError, match="invalid iteration"):
        opened(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert "iter_0000020" in opened(tmp_path).source.path
    with pytest.raises(UsageError, match="--hparams"):
        megatron.FORMAT.open(str(tmp_path), Options(hparams="x"))


def test_directories_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(InputError, match=r"model_optim_rng\.pt"):
        opened(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        megatron.FORMAT.open(str(tmp_path / "x"), PLAIN)


def test_arguments_are_read_as_plain_data(tmp_path: Path) -> None:
    """A namespace is read; code and cyclic dictionaries are refused."""
    import torch

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return eval, ("print('executed')",)

    saved = {"model": {"language_model": {}}, "args": argparse.Namespace(hidden_size=Evil())}
    torch.save(saved, tmp_path / "model_optim_rng.pt")
    with pytest.raises(UnsafeInputError, match="eval"):
        opened(tmp_path)
    loop: dict[str, Any] = {}
    loop["language_model"] = loop
    torch.save({"model": loop}, tmp_path / "model_optim_rng.pt")
    with pytest.raises(UnsafeInputError, match="it contains itself"):
        opened(tmp_path)
    torch.save({"optimizer": 1}, tmp_path / "model_optim_rng.pt")
    with pytest.raises(InputError, match="not a Megatron-LM checkpoint"):
        opened(tmp_path)
