"""nanoGPT: ckpt.pt as train.py saves it, in current and older versions."""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import foreign
from gptconvert.errors import InputError, UnsafeInputError, UnsupportedError, UsageError
from gptconvert.inspection import open_checkpoint
from gptconvert.model.options import Options
from gptconvert.sources import nanogpt
from tests.helpers import checkpoint_of, examine
from tests.sources.foreign import ORIGINALS, PLAIN, gap, gpt2_arrays, opened, same_weights

ARGUMENTS: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 24,
    "block_size": 40,
    "bias": True,
    "vocab_size": 97,
    "dropout": 0.2,
}


def save(path: Path, state: dict[str, Any], **changes: Any) -> Path:
    import torch

    arguments = {key: value for key, value in {**ARGUMENTS, **changes}.items() if value is not ...}
    torch.save(foreign.nanogpt_checkpoint(state, arguments), path)
    return path


def test_compiled_run_matches_the_golden_logits() -> None:
    checkpoint = opened(ORIGINALS / "nanogpt")
    assert checkpoint.source.scheme == "nanogpt"
    assert checkpoint.prefix == "_orig_mod.transformer."
    assert (checkpoint.config.activation, checkpoint.config.tied_head) == ("gelu_erf", True)
    assert gap(checkpoint, "nanogpt") < 1e-12
    assert any("--activation tanh" in note for note in checkpoint.notes)


def test_activation_follows_the_option() -> None:
    tanh = opened(ORIGINALS / "nanogpt" / "ckpt.pt", Options(activation="tanh"))
    assert gap(tanh, "nanogpt_tanh") < 1e-12
    assert gap(tanh, "nanogpt") > 1e-6
    assert not any("--activation" in note for note in tanh.notes)
    with pytest.raises(UsageError, match="--activation does not apply to llm"):
        open_checkpoint(ORIGINALS / "llmc" / "gpt2_fp32.bin", Options(activation="erf"))


def test_old_run_without_biases_and_with_an_untied_head() -> None:
    checkpoint = opened(ORIGINALS / "nanogpt-old")
    assert gap(checkpoint, "nanogpt-old") < 1e-12
    assert not checkpoint.config.tied_head
    assert checkpoint.dropped == {"transformer.h.0.attn.bias": "causal mask buffer"}
    assert not checkpoint.weights["h.1.mlp.c_fc.bias"].read().any()
    for words in ("zeros", "untied head"):
        assert any(words in note for note in checkpoint.notes)


def test_arguments_of_forks_without_effect_are_accepted(tmp_path: Path) -> None:
    _, arrays = gpt2_arrays()
    state = foreign.nanogpt_state(arrays)
    more = {"flash": True, "compile": True, "device": "cuda", "init_from": "resume"}
    plain, fork = opened(save(tmp_path / "plain.pt", state)), opened(save(tmp_path / "fork.pt", state, **more))
    assert fork.config == plain.config
    with pytest.raises(UnsupportedError, match="rope = True") as caught:
        opened(save(tmp_path / "rope.pt", state, **more, rope=True))
    assert caught.value.hint == "rope would change the logits"


def test_weights_equal_those_of_hugging_face(tmp_path: Path) -> None:
    raw, arrays = gpt2_arrays()
    path = save(tmp_path / "any.pt", foreign.nanogpt_state(arrays))
    checkpoint = opened(path, Options(activation="tanh"))
    assert checkpoint.source.scheme == "nanogpt"  # recognised by its content
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    assert all(weight.segments() is not None for weight in checkpoint.weights.values())


@pytest.mark.parametrize("missing", ["bias", "vocab_size", "block_size", "n_layer", "n_embd", "dropout"])
def test_older_files_leave_arguments_out(tmp_path: Path, missing: str) -> None:
    path = save(tmp_path / "ckpt.pt", foreign.nanogpt_state(gpt2_arrays()[1]), **{missing: ...})
    config = opened(path).config
    assert (config.vocab_size, config.n_ctx, config.n_embd, config.n_layer) == (97, 40, 24, 2)


def test_number_of_heads_is_required(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", foreign.nanogpt_state(gpt2_arrays()[1]), n_head=...)
    with pytest.raises(UsageError, match="number of heads"):
        opened(path)
    assert opened(path, Options(n_head=3)).config.n_head == 3
    whole = save(tmp_path / "ckpt2.pt", foreign.nanogpt_state(gpt2_arrays()[1]))
    with pytest.raises(UsageError, match="contradicts"):
        opened(whole, Options(n_head=2))


@pytest.mark.parametrize(("says", "has"), [(True, False), (False, True)])
def test_biases_that_contradict_the_arguments(tmp_path: Path, says: bool, has: bool) -> None:
    """A missing bias must not be replaced with zeros if the model had one."""
    state = foreign.nanogpt_state(gpt2_arrays()[1])
    if not has:
        del state["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(InputError, match=r"h\.(1|\{0-1\})\.") as caught:
        opened(save(tmp_path / "ckpt.pt", state, bias=says))
    assert caught.value.item == "bias"


def test_unknown_arguments_are_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", foreign.nanogpt_state(gpt2_arrays()[1]), rotary=True)
    with pytest.raises(UnsupportedError, match="rotary = True"):
        opened(path)


def test_optimizer_is_never_read(tmp_path: Path) -> None:
    """Damage in Adam's moments goes unnoticed; the same damage in a weight is found."""
    state = foreign.nanogpt_state(gpt2_arrays()[1])
    import torch

    saved = foreign.nanogpt_checkpoint(state, ARGUMENTS, ["transformer.wpe.weight"])
    torch.save(saved, tmp_path / "ckpt.pt")
    checkpoint = opened(tmp_path / "ckpt.pt")
    data = (tmp_path / "ckpt.pt").read_bytes()
    moment = saved["optimizer"]["state"][0]["exp_avg"].numpy().tobytes()[:64]
    weight = state["transformer.wpe.weight"].numpy().tobytes()[:64]
    for what, harmful in ((moment, False), (weight, True)):
        at = data.index(what) + 8
        (tmp_path / "ckpt.pt").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        if harmful:
            with pytest.raises(InputError, match="crc32 checksum"):
                examine(checkpoint)
        else:
            examine(checkpoint)


def test_a_head_that_copies_the_embedding_stays_untied(tmp_path: Path) -> None:
    state = foreign.nanogpt_state(gpt2_arrays()[1])
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    checkpoint = opened(save(tmp_path / "ckpt.pt", state))
    assert not checkpoint.config.tied_head
    assert np.array_equal(checkpoint.weights["lm_head.weight"].read(), checkpoint.weights["wte.weight"].read())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/exploded-nanogpt",)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Bomb(), "model_args": {}}, protocol=2))
    with pytest.raises(UnsafeInputError, match=r"posix\.system"):
        opened(tmp_path)
    save(tmp_path / "ckpt.pt", foreign.nanogpt_state(gpt2_arrays()[1]))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Bomb()}))
    assert any("meta.pkl" in note and "not opened" in note for note in opened(tmp_path).notes)
    assert not Path("/tmp/exploded-nanogpt").exists()


def test_gpt2s_tokenizer_is_suggested_and_used(tmp_path: Path) -> None:
    _, arrays = gpt2_arrays(vocab_size=50304, n_embd=3, n_layer=1)
    changes = {"vocab_size": 50304, "n_embd": 3, "n_layer": 1}
    save(tmp_path / "ckpt.pt", foreign.nanogpt_state(arrays), **changes)
    checkpoint = opened(tmp_path)
    assert checkpoint.special_ids.eos == (50256,)
    assert any("GPT-2's tokenizer" in note for note in checkpoint.notes)
    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_text("")
    assert set(opened(tmp_path).source.tokenizer) == {"encoder.json", "vocab.bpe"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {}, "optimizer": {}}, "not a nanoGPT checkpoint"),
        ([1, 2], "found a list"),
        ({"model": {}, "model_args": {}}, "no named tensors"),
    ],
)
def test_other_files_of_that_name(tmp_path: Path, content: object, words: str) -> None:
    import torch

    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=words):
        opened(tmp_path / "ckpt.pt")


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    data = (ORIGINALS / "nanogpt" / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError):
        opened(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        nanogpt.FORMAT.open(str(tmp_path / "ckpt2.pt"), PLAIN)
    with pytest.raises(UsageError, match="--hparams"):
        nanogpt.FORMAT.open(str(tmp_path), Options(hparams="x"))


@dataclasses.dataclass
class GPTConfig:
    """As in build-nanogpt's train_gpt2.py."""

    block_size: int = 40
    vocab_size: int = 97
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 24


class CfgNode:
    """A plain object with attributes, as in minGPT."""

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


FIELDS = dataclasses.asdict(GPTConfig())


@pytest.mark.parametrize(
    "config",
    [GPTConfig(), CfgNode(**FIELDS), types.SimpleNamespace(**FIELDS), dict(FIELDS)],
    ids=["dataclass", "object", "namespace", "dictionary"],
)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_build_nanogpt(config: object, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration's class is read as data; it cannot be imported here."""
    import torch

    raw, arrays = gpt2_arrays()
    state = {prefix + name: tensor for name, tensor in foreign.nanogpt_state(arrays).items()}
    if isinstance(config, (GPTConfig, CfgNode)):
        module = types.ModuleType("train_gpt2_of_somebody")
        vars(module)[type(config).__name__] = type(config)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(type(config), "__module__", module.__name__)
    path = tmp_path / "model_19072.pt"
    torch.save({"model": state, "config": config, "step": 19072, "val_loss": 3.1}, path)
    monkeypatch.delitem(sys.modules, "train_gpt2_of_somebody", raising=False)
    checkpoint = open_checkpoint(path)
    assert checkpoint.source.scheme == "nanogpt:build"
    assert checkpoint.config.activation == "gelu_tanh"
    assert any("build-nanogpt" in note and "--activation erf" in note for note in checkpoint.notes)
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    assert opened(path, Options(activation="erf")).config.activation == "gelu_erf"
    assert "train_gpt2_of_somebody" not in sys.modules


def test_settings_of_a_nanogpt_run_are_not_a_configuration(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", foreign.nanogpt_state(gpt2_arrays()[1]))
    import torch

    content = torch.load(path, weights_only=False)
    torch.save({**content, "config": {**FIELDS, "n_layer": 7}}, path)
    assert opened(path).source.scheme == "nanogpt"


class Module:
    """A pickled object with the attributes of a PyTorch module."""

    def __init__(self) -> None:
        self._parameters: dict[str, object] = {}
        self._modules: dict[str, object] = {}


class Calls:
    """An object that pickles as a call."""

    def __reduce__(self) -> tuple[object, ...]:
        return GPTConfig, (1, 2)


@pytest.mark.parametrize(
    "value",
    [Module(), Calls(), GPTConfig, os.system, [GPTConfig(), os.getcwd]],
    ids=["module", "calls", "class", "function", "list"],
)
@pytest.mark.parametrize("format", ["nanogpt", "hf", None])
def test_unsafe_pickles_are_refused_whatever_the_command(value: object, format: str | None, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.pt"
    torch.save({"model": {"w": torch.ones(2)}, "model_args": {}, "config": value}, path)
    if format == "hf":
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsafeInputError) as caught:
        open_checkpoint(path, format=format)
    assert caught.value.exit_code == 7
    assert "nothing executed" in str(caught.value) or "whole pickled model" in str(caught.value)
