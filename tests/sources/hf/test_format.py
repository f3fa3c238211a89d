"""Hugging Face checkpoints on disk: which files are read, and the errors and notes for the rest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.options import Options
from gptconvert.pipeline import open_checkpoint
from gptconvert.sources.hf.files import KINDS, choose_weights
from gptconvert.sources.hf.format import FORMAT, open_hf
from gptconvert.sources.tokenizer_files import HUGGING_FACE
from tests.helpers import FIXTURES, tiny_gpt2
from tests.sources.detection import claims

PLAIN = Options()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with config.json and model.safetensors, as transformers would save them."""
    from safetensors.numpy import save_file

    raw, arrays = tiny_gpt2()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(arrays, tmp_path / "model.safetensors")
    return tmp_path


def save_bin(directory: Path, name: str = "pytorch_model.bin", scale: float = 1.0) -> None:
    import torch

    arrays = tiny_gpt2()[1]
    torch.save({key: torch.from_numpy(array * np.float32(scale)) for key, array in arrays.items()}, directory / name)


def first(path: str | Path, options: Options = PLAIN) -> float:
    """One element, to identify which weights were read."""
    return float(open_hf(str(path), options).tensors["transformer.wpe.weight"].read()[0, 0])


def test_directory(checkpoint: Path) -> None:
    for name in HUGGING_FACE:
        (checkpoint / name).write_text("{}")
    (checkpoint / "README.md").write_text("# model")
    source = open_hf(str(checkpoint), PLAIN)
    raw, arrays = tiny_gpt2()
    assert (source.scheme, source.format) == ("hf", "Hugging Face, safetensors")
    assert source.config == raw
    assert source.config_path == str(checkpoint / "config.json")
    assert source.tokenizer == {name: str(checkpoint / name) for name in HUGGING_FACE}
    assert set(source.tensors) == set(arrays)
    assert (source.notes, source.repo, source.revision) == ((), None, None)
    assert set(source.files) == {str(checkpoint / n) for n in ("config.json", "model.safetensors", *HUGGING_FACE)}


@pytest.mark.parametrize(
    "name",
    ["hf-bare", "hf-bf16", "hf-bin", "hf-bin-legacy", "hf-bin-sharded", "hf-safetensors", "hf-safetensors-sharded"],
)
def test_fixtures_are_the_same_model(name: str) -> None:
    root = FIXTURES / "tiny-gpt2"
    reference = open_hf(str(root / "hf-safetensors"), PLAIN).tensors
    tensors = open_hf(str(root / name), PLAIN).tensors
    bare = {key.removeprefix("transformer."): tensor.read() for key, tensor in tensors.items()}
    for key, tensor in reference.items():
        expected = tensor.read()
        found = bare[key.removeprefix("transformer.")]
        if name == "hf-bf16":
            np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-8)
        else:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
def test_file_inside_the_directory(checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    assert claims(FORMAT, name)
    assert len(open_hf(name, PLAIN).tensors) == len(tiny_gpt2()[1])


def test_index_file(tmp_path: Path) -> None:
    path = FIXTURES / "tiny-gpt2" / "hf-safetensors-sharded" / "model.safetensors.index.json"
    source = open_hf(str(path), PLAIN)
    assert source.format == "Hugging Face, safetensors, sharded"
    assert len(source.tensors.files) == 4


def test_49_both_kinds_present(checkpoint: Path) -> None:
    save_bin(checkpoint, scale=2.0)
    source = open_hf(str(checkpoint), PLAIN)
    assert source.format == "Hugging Face, safetensors"
    assert any("model.safetensors was read" in n and "pytorch_model.bin" in n for n in source.notes)
    expected = tiny_gpt2()[1]["transformer.wpe.weight"][0, 0]
    assert first(checkpoint) == expected
    for path, options in [
        (checkpoint, Options(weights_file="pytorch_model.bin")),
        (checkpoint / "pytorch_model.bin", PLAIN),
    ]:
        assert open_hf(str(path), options).format == "Hugging Face, PyTorch"
        assert first(path, options) == 2 * expected


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors"),
        (["model.safetensors.index.json", "pytorch_model.bin"], "model.safetensors.index.json"),
        (["pytorch_model.bin", "pytorch_model.bin.index.json"], "pytorch_model.bin"),
        (["pytorch_model.bin.index.json", "tf_model.h5"], "pytorch_model.bin.index.json"),
        (["tf_model.h5.index.json", "flax_model.msgpack"], "tf_model.h5.index.json"),
    ],
)
def test_preference(names: list[str], chosen: str) -> None:
    assert choose_weights(names, None, "dir")[0].name == chosen


def test_missing_weights_file(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"expected pytorch_model\.bin, found model\.safetensors"):
        open_hf(str(checkpoint), Options(weights_file="pytorch_model.bin"))
    with pytest.raises(InputError, match="name different weights files"):
        open_hf(str(checkpoint / "model.safetensors"), Options(weights_file="pytorch_model.bin"))


def test_weights_under_another_name(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model.fp16.safetensors")
    with pytest.raises(InputError) as caught:
        open_hf(str(checkpoint), PLAIN)
    assert "--weights-file model.fp16.safetensors" in str(caught.value.hint)
    first(checkpoint, Options(weights_file="model.fp16.safetensors"))


@pytest.mark.parametrize("name", ["rust_model.ot", "model-q4.gguf", "decoder.onnx"])
def test_only_weights_of_another_kind(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    assert claims(FORMAT, checkpoint)
    with pytest.raises(UnsupportedError, match=name):
        open_hf(str(checkpoint), PLAIN)


@pytest.mark.parametrize("stem", ["model", "my-model"])
def test_shards_without_index(checkpoint: Path, stem: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / f"{stem}-00001-of-00002.safetensors")
    with pytest.raises(InputError) as caught:
        open_hf(str(checkpoint), PLAIN)
    assert caught.value.hint == f"fetch {stem}.safetensors.index.json as well"


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights; expected model\.safetensors or .*, found config\.json"):
        open_hf(str(checkpoint), PLAIN)


def test_lora_adapter(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        open_hf(str(checkpoint), PLAIN)
    assert "LoRA" in str(caught.value.hint)


def test_42_config_missing(checkpoint: Path) -> None:
    config = (checkpoint / "config.json").rename(checkpoint.parent / "elsewhere.json")
    with pytest.raises(InputError, match=r"config\.json is missing"):
        open_hf(str(checkpoint), PLAIN)
    assert open_hf(str(checkpoint), Options(hparams=str(config))).config_path == str(config)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"{n_embd: 3}", "not JSON"),
        (b'{"n_embd": 768,}', "not JSON"),
        (b'{"eps": NaN}', "NaN"),
        (b'{"eps": -Infinity}', "Infinity"),
        (b'{"eps": 1e999}', "out of range"),
        (b'{"n_embd": 1, "n_layer": 2, "n_embd": 3}', "duplicate key `n_embd`"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"null", "found null"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 7)"),
        (b'{"a":' * 100_000, "127 deep"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ],
)
def test_42_bad_config(checkpoint: Path, content: bytes, words: str) -> None:
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_hf(str(checkpoint), PLAIN)
    assert words in str(caught.value)
    assert str(checkpoint / "config.json") in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_named_pipes_do_not_hang(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    with pytest.raises(UnsafeInputError, match="named pipe"):
        open_hf(str(checkpoint), PLAIN)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "."])
def test_54_unreadable(checkpoint: Path, name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
        Path(directory).chmod(0o755)
        Path(directory, name).chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root reads everything
        try:
            with pytest.raises(InputError, match="Permission denied"):
                open_hf(directory, PLAIN)
        finally:
            os.seteuid(user)
            Path(directory).chmod(0o755)


def test_54_strange_directory_names(checkpoint: Path) -> None:
    for name in ("with\nnewline", os.fsdecode(b"not-utf8-\xff"), "x" * 250, "ünï cödé"):
        target = checkpoint.parent / name
        checkpoint.rename(target)
        assert len(open_hf(str(target), PLAIN).tensors) > 0
        target.rename(checkpoint)


def test_54_newline_in_a_tensor_name(checkpoint: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a\nb": np.ones(2, np.float32)}, checkpoint / "model.safetensors")
    assert list(open_hf(str(checkpoint), PLAIN).tensors) == ["a\nb"]


@pytest.mark.parametrize("kind", [kind.title for kind in KINDS])
def test_damaged_weights_name_the_file(checkpoint: Path, kind: str) -> None:
    default = next(k.default for k in KINDS if k.title == kind)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / default).write_bytes(b"<html>")
    with pytest.raises(InputError, match=rf"{default}: this file is an HTML page"):
        open_hf(str(checkpoint), PLAIN)


def test_unknown_path(tmp_path: Path) -> None:
    (tmp_path / "gpt2-small").mkdir()
    with pytest.raises(InputError, match="no such file or directory") as caught:
        open_hf(str(tmp_path / "gpt2-smal"), PLAIN)
    assert "gpt2-small" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": '{"model_type": "gpt2"}'}, True),
        ({"config.json": '{"n_embd": 3}'}, False),
        ({"model.safetensors": ""}, True),
        ({"pytorch_model.bin.index.json": ""}, True),
        ({"hparams.json": "{}", "checkpoint": ""}, False),
        ({"config.json": "{}", "tf_model.h5": ""}, True),
        ({"tf_model.h5": ""}, True),
        ({"rust_model.ot": ""}, False),
        ({}, False),
    ],
)
def test_recognises_directories(tmp_path: Path, files: dict[str, str], expected: bool) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert claims(FORMAT, tmp_path) is expected


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("anything.safetensors", False, True),
        ("pytorch_model.bin", True, True),
        ("pytorch_model.bin", False, False),
        ("ckpt.pt", False, False),
        ("notes.txt", True, False),
    ],
)
def test_recognises_files(tmp_path: Path, name: str, config: bool, expected: bool) -> None:
    (tmp_path / name).write_bytes(b"x")
    if config:
        (tmp_path / "config.json").write_text("{}")
    assert claims(FORMAT, tmp_path / name) is expected


def test_opening_reads_headers_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gptconvert.model.tensors

    def forbidden(segment: Any) -> Any:
        raise AssertionError(f"weights were read: {segment}")

    monkeypatch.setattr(gptconvert.model.tensors, "map_segment", forbidden)
    open_hf(str(checkpoint), PLAIN)


def test_a_gguf_file_beside_a_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "m-F16.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError) as error:
        open_checkpoint(str(tmp_path))
    assert error.value.hint == f"pass the file: {tmp_path / 'm-F16.gguf'}"
