"""nanoGPT: ckpt.pt as train.py saves it, in current and older versions."""

from __future__ import annotations

import os
import pickle
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
