"""The command in the model card reproduces the output byte for byte, with every option that affects it."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptconvert.model.options import INFO
from tests.commands import ORIGINALS, TINY, command, tree

Words = tuple[object, ...]


@dataclass(frozen=True)
class Case:
    """One conversion.

    Attributes:
        source: a checkpoint, or a function that creates one in an empty directory.
        words: arguments other than the source and the output.
        verified: whether to verify it, which is slow.
    """

    source: Path | Callable[[Path], Path]
    words: Words
    verified: bool = False


def without_hparams(directory: Path) -> Path:
    """An OpenAI checkpoint that does not record its number of heads."""
    shutil.copytree(TINY / "openai-tf", directory / "bare")
    (directory / "bare" / "hparams.json").unlink()
    return directory / "bare"


def with_a_nan(directory: Path) -> Path:
    """Weights that contain one NaN."""
    shutil.copytree(TINY / "hf-safetensors", directory / "nan")
    path = directory / "nan" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(content)
    return directory / "nan"


def with_a_value_head(directory: Path) -> Path:
    """Weights with a head that no model has, and a space in its name."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(TINY / "hf-safetensors", directory / "valued")
    path = directory / "valued" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "v head.weight": weights["transformer.ln_f.weight"]}, path, {"format": "pt"})
    return directory / "valued"


def with_a_space(directory: Path) -> Path:
    """A directory with two model files, one with a space in its name."""
    (directory / "models").mkdir()
    for name in ("fp32", "bf16"):
        shutil.copy(ORIGINALS / "llmc" / f"gpt2_{name}.bin", directory / "models" / f"gpt2 {name}.bin")
    return directory / "models"


def with_two_models(directory: Path) -> Path:
    """One file with two models, as actor-critic training saves them."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(TINY / "hf-safetensors", directory / "two")
    path = directory / "two" / "model.safetensors"
    tensors = load_file(path)
    save_file({f"{scope}.{name}": t for scope in ("actor", "critic") for name, t in tensors.items()}, path)
    return directory / "two"


def with_an_adapter(directory: Path) -> Path:
    """A model with a LoRA adapter for its first MLP in the same directory."""
    shutil.copytree(TINY / "hf-safetensors", directory / "adapted")
    inner, width = load_file(directory / "adapted" / "model.safetensors")["transformer.h.0.mlp.c_proj.weight"].shape
    module = "base_model.model.transformer.h.0.mlp.c_fc"
    factors = {"lora_A": np.full((2, width), 0.1, np.float32), "lora_B": np.full((inner, 2), 0.1, np.float32)}
    named = {f"{module}.{name}.weight": factor for name, factor in factors.items()}
    save_file(named, directory / "adapted" / "adapter_model.safetensors")
    (directory / "adapted" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 3}')
    return directory / "adapted"


#: An argument that stands for the source.
SOURCE = "SOURCE"
NANOGPT, OPENAI, HF = ORIGINALS / "nanogpt", TINY / "openai-tf", TINY / "hf-safetensors"
HPARAMS = OPENAI / "hparams.json"
#: Field of ``Options`` → a conversion with a value other than the default.
CASES: dict[str, Case] = {
    "step": Case(TINY / "openai-tf-adam", ("--step", 10)),
    "hparams": Case(without_hparams, ("--hparams", HPARAMS)),
    "weights_file": Case(with_a_space, ("--weights-file", "gpt2 bf16.bin")),
    "adapter": Case(with_an_adapter, ("--adapter", SOURCE, "--to", "safetensors")),
    "task": Case(HF, ("--task", "feature-extraction")),
    "scope": Case(with_two_models, ("--scope", "critic", "--to", "safetensors")),
    "n_head": Case(without_hparams, ("--n-head", 3)),
    "pad_token_id": Case(HF, ("--pad-token-id", 5, "--to", "safetensors")),
    "activation": Case(NANOGPT, ("--activation", "tanh")),
    "ignore_key": Case(HF, ("--ignore-key", "initializer_range", "--ignore-key", "use_cache", "--to", "safetensors")),
    "ignore_tensor": Case(with_a_value_head, ("--ignore-tensor", "v head.*", "--to", "safetensors")),
    "set_key": Case(HF, ("--set", "layer_norm_epsilon=0.5", "--set", "bos_token_id=7", "--to", "safetensors")),
    "trim_vocab": Case(NANOGPT, ("--trim-vocab", 90)),
    "targets": Case(OPENAI, ("--to", "safetensors", "--to", "openai-tf")),
    "dtype": Case(OPENAI, ("--dtype", "fp16", "--to", "onnx", "--to", "safetensors")),
    "opset": Case(OPENAI, ("--opset", 17)),
    "kv_cache": Case(OPENAI, ("--no-kv-cache",)),
    "position_ids": Case(HF, ("--task", "feature-extraction", "--position-ids")),
    "single_file": Case(OPENAI, ("--single-file",)),
    "quantize": Case(OPENAI, ("--quantize", "q8", "--quantize", "q4")),
    "no_base": Case(OPENAI, ("--quantize", "q8", "--no-base")),
    "block_size": Case(OPENAI, ("--quantize", "q8", "--block-size", 16)),
    "accuracy_level": Case(OPENAI, ("--quantize", "q8", "--accuracy-level", 0)),
    "calibrate": Case(OPENAI, ("--quantize", "q4:plain", "--calibrate", "self")),
    "last_token": Case(OPENAI, ("--last-token",)),
    "in_place": Case(OPENAI, ("--in-place",)),
    "max_shard_size": Case(OPENAI, ("--max-shard-size", "30KB", "--to", "safetensors")),
    "gguf_type": Case(OPENAI, ("--gguf-type", "q8_0", "--gguf-type", "f32", "--to", "gguf")),
    "tflite_type": Case(OPENAI, ("--tflite-type", "int8", "--tflite-type", "f16", "--to", "tflite")),
    "xla": Case(OPENAI, ("--xla", "--to", "tf")),
    "verify": Case(OPENAI, ("--verify", "full"), verified=True),
    "allow_nonfinite": Case(with_a_nan, ("--allow-nonfinite", "--to", "safetensors")),
}


def printed_command(output: Path) -> list[str]:
    """The command in a model card, as a list of arguments."""
    found = re.search(r"^```sh\n(gptconvert .*)\n```$", (output / "README.md").read_text(), re.MULTILINE)
    assert found is not None
    return shlex.split(found[1])[1:]


def run_twice(capsys: Any, directory: Path, form: str, source: Path, words: Words) -> list[str]:
    """Convert, run the card's command and compare every file; returns the command's arguments."""
    first, second = directory / "first", directory / "second"
    done = command(capsys, form, source, *words, "-o", first)
    assert done.code == 0, done.err
    places = {"CHECKPOINT": source, "OUTPUT": second, "HPARAMS": HPARAMS, "ADAPTER": source}
    printed = printed_command(first)
    again = command(capsys, *(places.get(word, word) for word in printed))
    assert again.code == 0, again.err
    assert tree(second) == tree(first)
    return printed


def test_every_option_that_affects_the_output_has_a_case() -> None:
    assert set(CASES) == {name for name, info in INFO.items() if info.shapes}


@pytest.mark.parametrize("name", CASES)
def test_card_command(capsys: Any, tmp_path: Path, name: str) -> None:
    case, flag = CASES[name], INFO[name].flag
    source = case.source(tmp_path) if callable(case.source) else case.source
    words = tuple(source if word == SOURCE else word for word in case.words)
    words = words if case.verified else (*words, "--no-verify")
    printed = run_twice(capsys, tmp_path, "convert", source, words)
    assert flag in printed or flag.replace("--", "--no-") in printed


def test_several_options_at_once(capsys: Any, tmp_path: Path) -> None:
    words = ("--activation", "tanh", "--trim-vocab", 90, "--to", "onnx")
    printed = run_twice(capsys, tmp_path, "nanogpt", NANOGPT, words)
    expected = "convert CHECKPOINT --to onnx --activation tanh --trim-vocab 90 -o OUTPUT"
    assert printed == expected.split()
