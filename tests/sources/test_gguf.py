"""GGUF as a source: files of the gguf package and our own, with their tokenizer; quantised ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fixtures.foreign import gguf_tensors
from gptconvert import pipeline
from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.pipeline import open_checkpoint
from gptconvert.targets.gguf.plan import plan
from tests.commands import command
from tests.families import witness
from tests.helpers import FIXTURES, checkpoint_of, tiny_gpt2, write_planned
from tests.sources.foreign import ORIGINALS, gap, opened, same_weights

TRAINED = FIXTURES / "gpt2-stdlib"
KEYS = {"block_count": 2, "context_length": 40, "embedding_length": 24, "feed_forward_length": 56}


def ours(checkpoint: Checkpoint, directory: Path, kind: str = "f32", **options: Any) -> Path:
    """The first file of our own export."""
    export = plan(checkpoint, Options(targets=("gguf",), gguf_type=(kind,), **options))[0]
    write_planned(directory, export.files)
    return directory / export.path


def library(path: Path, architecture: str, tensors: dict[str, Any], extra: dict[str, Any] | None = None) -> Path:
    """A file of the gguf package with the sizes of the tiny models."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**KEYS, "attention.head_count": 3}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_epsilon", 1e-5)
    for key, value in (extra or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_logits_match_the_golden_ones() -> None:
    """Of a file as llama.cpp's converter writes it."""
    checkpoint = opened(ORIGINALS / "gguf")
    assert gap(checkpoint, "gguf") < 1e-12
    assert checkpoint.config.tied_head and checkpoint.special_ids.eos == (96,)


def test_gpt2_of_the_library(tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2()
    path = library(
        tmp_path / "m.gguf", "gpt2", gguf_tensors(arrays), {"general.name": "x", "gpt2.attention.head_count_kv": 3}
    )
    found, expected = open_checkpoint(str(path)), checkpoint_of(raw, arrays)
    assert found.config == expected.config and same_weights(found, expected)
    assert found.config.norm_eps == 1e-5  # not what float32 makes of it


@pytest.mark.parametrize("repeated", [True, False])
def test_a_stored_head(repeated: bool, tmp_path: Path) -> None:
    """llama.cpp's converter stores a tied head twice."""
    _, arrays = tiny_gpt2(tie_word_embeddings=False)
    if repeated:
        arrays["lm_head.weight"] = arrays["transformer.wte.weight"]
    path = library(tmp_path / "m.gguf", "gpt2", gguf_tensors(arrays))
    found = open_checkpoint(str(path))
    assert found.config.tied_head is repeated and ("lm_head.weight" in found.weights) is not repeated


def test_a_head_that_differs_in_a_few_rows_is_never_lost(tmp_path: Path) -> None:
    _, arrays = tiny_gpt2(tie_word_embeddings=False)
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"].copy()
    arrays["lm_head.weight"][5] += 1
    path = library(tmp_path / "m.gguf", "gpt2", gguf_tensors(arrays))
    with pytest.raises(InputError, match=r"output\.weight.*differ"):
        pipeline.convert(str(path), tmp_path / "out", Options(targets=("safetensors",), verify=None))


@pytest.mark.parametrize("name", ["", "serial", "tied", "no-bias", "linear-scaling", "whole-head"])
def test_neox_round_trip(name: str, tmp_path: Path) -> None:
    case = next(c for c in witness.CASES if str(c) == "-".join(filter(None, ("gpt_neox-text-generation", name))))
    checkpoint = witness.checkpoint(case, tmp_path)
    found = open_checkpoint(str(ours(checkpoint, tmp_path)))
    if name == "no-bias":  # GGUF needs them, so they are zeros
        assert found.config.qkv_bias and not found.weights["h.0.attn.c_attn.bias"].read().any()
        return
    assert found.config == checkpoint.config and same_weights(found, checkpoint)
    assert any("erf is assumed" in note for note in found.notes)
    tanh = open_checkpoint(str(ours(checkpoint, tmp_path)), Options(activation="tanh"))
    assert tanh.config.activation == "gelu_tanh" and not tanh.notes[1:]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision_and_split_files(kind: str, tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2()
    path = ours(checkpoint_of(raw, arrays), tmp_path, kind, max_shard_size=9_000)
    assert "-00001-of-" in path.name
    found = open_checkpoint(str(path))
    dtype = np.dtype(np.float16) if kind == "f16" else BFLOAT16
    weight = arrays["transformer.h.1.mlp.c_fc.weight"].T.astype(dtype)
    assert found.weights["h.1.mlp.c_fc.weight"].read().tobytes() == weight.tobytes()
    assert found.weights["wpe.weight"].dtype == np.float32
    assert same_weights(open_checkpoint(str(tmp_path)), found)  # a directory with one model


def test_the_tokenizer_comes_back(tmp_path: Path, capsys: Any) -> None:
    """Vocabulary, merges and special tokens equal the original's; the text and its ids too."""
    from tokenizers import Tokenizer

    first, back = tmp_path / "first", tmp_path / "back"
    words = ("--no-verify", "--to", "safetensors", "-o")
    done = command(capsys, "convert", TRAINED, "--no-verify", "--to", "gguf", "--to", "safetensors", "-o", first)
    assert done.code == 0, done.err
    done = command(capsys, "convert", first / "gpt2-F16.gguf", *words, back)
    assert done.code == 0 and "tokenizer" not in done.err, done.err
    for name in ("vocab.json", "merges.txt"):
        assert (back / name).read_text().split() == (first / name).read_text().split()
    own, found = (Tokenizer.from_file(str(where / "tokenizer.json")) for where in (first, back))
    for text in ("Objects are  never\n\texplicitly destroyed <|endoftext|> naïve 日本", "I'll"):
        assert own.encode(text).ids == found.encode(text).ids
        assert found.decode(own.encode(text).ids) == own.decode(own.encode(text).ids)
    settings = [json.loads((where / "tokenizer_config.json").read_text()) for where in (first, back)]
    assert settings[0] == settings[1]
    ids = [json.loads((where / "generation_config.json").read_text()) for where in (first, back)]
    assert ids[0] == ids[1]


def test_added_tokens_come_back(tmp_path: Path) -> None:
    """Of the kind of GPT-NeoX's runs of spaces; they are found in text, and are not special."""
    from tokenizers import Tokenizer

    from gptconvert.targets.package.tokenizer import tokenizer_files
    from tests.targets.gguf.test_plan import bpe, with_tokenizer

    found = open_checkpoint(str(ours(with_tokenizer(tmp_path, bpe()), tmp_path)))
    files, _ = tokenizer_files(found)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    original = Tokenizer.from_str(json.dumps(bpe()))
    assert original.encode("AB  A<|end|>").ids == tokenizer.encode("AB  A<|end|>").ids == [60, 61, 32, 62]
    assert tokenizer.decode([60, 61, 62]) == "AB  "


def test_quantised_files_are_refused(tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2(n_embd=64, n_head=2)
    with pytest.raises(UnsupportedError, match="quantised GGUF file") as caught:
        open_checkpoint(str(ours(checkpoint_of(raw, arrays), tmp_path, "q4_0")))
    assert "Q4_0, Q8_0" in str(caught.value) and "F16" in str(caught.value.hint)


@pytest.mark.parametrize("architecture", ["llama", "phi2", "gptj"])
def test_other_architectures_are_refused(architecture: str, tmp_path: Path) -> None:
    path = library(tmp_path / "m.gguf", architecture, {"token_embd.weight": np.zeros((4, 2), np.float32)})
    with pytest.raises(UnsupportedError, match=architecture):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"gpt2.attention.clamp_kqv": 1.0}, "attention_clamp_kqv"),
        ({"gpt2.attention.causal": False}, "attention_causal"),
        ({"gpt2.attention.head_count_kv": 1}, "head_count_kv"),
        ({"gpt2.rope.freq_base": 10000.0}, "rope_freq_base"),
        ({"unknown.key": 1}, r"unknown\.key"),
    ],
)
def test_keys_that_change_the_output_are_refused(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = library(tmp_path / "m.gguf", "gpt2", gguf_tensors(tiny_gpt2()[1]), extra)
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(str(path))


def test_missing_and_unknown_tensors(tmp_path: Path) -> None:
    tensors = gguf_tensors(tiny_gpt2()[1])
    del tensors["blk.1.ffn_up.bias"]
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.bias"):
        open_checkpoint(str(library(tmp_path / "m.gguf", "gpt2", tensors)))


def test_several_files_in_a_directory(tmp_path: Path, capsys: Any) -> None:
    path = ours(checkpoint_of(*tiny_gpt2()), tmp_path)
    shutil.copy(path, tmp_path / "other.gguf")
    with pytest.raises(InputError, match="several GGUF files"):
        open_checkpoint(str(tmp_path))
    assert open_checkpoint(str(tmp_path), Options(weights_file="other.gguf")).config.n_layer == 2
    with pytest.raises(UsageError, match="needs a directory"):
        open_checkpoint(str(path), Options(weights_file="other.gguf"))
    done = command(capsys, "gguf", path, "--to", "safetensors", "--no-verify", "-o", tmp_path / "out")
    assert done.code == 0, done.err


def test_a_vocabulary_of_placeholders_is_not_a_tokenizer(tmp_path: Path) -> None:
    found = open_checkpoint(str(ours(checkpoint_of(*tiny_gpt2()), tmp_path)))
    assert found.source.stored_tokenizer is None and any("placeholders" in note for note in found.notes)
