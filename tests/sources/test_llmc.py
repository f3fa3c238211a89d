"""llm.c's model files: every version, and everything that can be wrong with a file that has no checksums."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from fixtures import foreign
from gptconvert.errors import InputError, UnsafeInputError, UnsupportedError, UsageError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.sources import llmc
from gptconvert.sources.detect import open_source
from tests.helpers import checkpoint_of
from tests.sources.foreign import ORIGINALS, PLAIN, gap, gpt2_arrays, opened, same_weights

FP32, BF16 = (ORIGINALS / "llmc" / name for name in ("gpt2_fp32.bin", "gpt2_bf16.bin"))


@pytest.mark.parametrize(("path", "name"), [(FP32, "llmc"), (BF16, "llmc_bf16")])
def test_logits_are_the_witness(path: Path, name: str) -> None:
    checkpoint = opened(path)
    assert checkpoint.source.scheme == "llmc"
    assert gap(checkpoint, name) < 1e-12
    assert checkpoint.config.activation == "gelu_tanh"
    assert any("97–127 are left out" in note for note in checkpoint.notes)


def test_padding_rows_are_gone_and_nothing_is_copied() -> None:
    checkpoint = opened(BF16)
    wte = checkpoint.weights["wte.weight"]
    assert (wte.shape, wte.dtype) == ((97, 24), BFLOAT16)
    assert not (wte.read() == 777).any()
    assert all(weight.segments() is not None for weight in checkpoint.weights.values())


@pytest.mark.parametrize("version", [1, 3])
def test_weights_are_those_of_hugging_faces_layout(tmp_path: Path, version: int) -> None:
    raw, arrays = gpt2_arrays(n_layer=3)
    data = foreign.llmc_file(arrays, 3, version, 97 if version == 1 else 256, 3)
    (tmp_path / "model.bin").write_bytes(data)
    checkpoint = opened(tmp_path / "model.bin")
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))


def header(path: Path, **words: int) -> bytes:
    """The file's bytes with some words of the header changed: ``w3=5`` sets word 3."""
    data = bytearray(path.read_bytes())
    for name, value in words.items():
        struct.pack_into("<i", data, 4 * int(name[1:]), value)
    return bytes(data)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"w1": 2}, UnsupportedError, "layer norms apart"),
        ({"w1": 7}, UnsupportedError, "unknown version"),
        ({"w3": 0}, InputError, "vocab_size = 0"),
        ({"w4": -1}, InputError, "num_layers = -1"),
        ({"w4": 2_000_000_000}, InputError, "num_layers = 2000000000"),
        ({"w5": 5}, InputError, "does not divide"),
        ({"w7": 96}, InputError, "padded_vocab_size = 96"),
        ({"w2": 41}, InputError, "truncated"),
        ({"w2": 39}, InputError, "longer than its header declares"),
        ({"w0": 20240327}, UnsupportedError, "debug state"),
        ({"w0": 20240328}, UnsupportedError, "tokenizer"),
        ({"w0": 20240520}, UnsupportedError, "training data"),
        ({"w0": 1}, InputError, "not a model file of llm.c"),
    ],
)
def test_headers(tmp_path: Path, words: dict[str, int], error: type[Exception], message: str) -> None:
    (tmp_path / "m.bin").write_bytes(header(FP32, **words))
    from gptconvert.families.registry import understand
    from gptconvert.model.options import Options

    with pytest.raises(error, match=message):
        understand(llmc.FORMAT.open(str(tmp_path / "m.bin"), PLAIN), Options())


@pytest.mark.parametrize("length", [0, 3, 4, 100, 1023, 1024, 5000, -1])
def test_truncated(tmp_path: Path, length: int) -> None:
    (tmp_path / "m.bin").write_bytes(FP32.read_bytes()[:length])
    with pytest.raises(InputError):
        opened(tmp_path / "m.bin")


@pytest.mark.parametrize(("length", "word"), [(-1, "truncated"), (None, "longer than its header declares")])
def test_a_size_that_is_off_by_a_byte(tmp_path: Path, length: int | None, word: str) -> None:
    (tmp_path / "m.bin").write_bytes((FP32.read_bytes() + b"\0" * (length is None))[:length])
    size = FP32.stat().st_size
    with pytest.raises(InputError, match=f"{word}; expected {size} bytes, found {size + (length or 1)} bytes"):
        opened(tmp_path / "m.bin")


def test_the_source_hands_on_one_run() -> None:
    source = llmc.FORMAT.open(str(BF16), PLAIN)
    assert not source.tensors
    assert source.run is not None
    assert (source.run.dtype, source.run.sizes) == (BFLOAT16, {"P": 128})
    assert (source.run.segment.offset, source.run.segment.end) == (1024, BF16.stat().st_size)


def test_what_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"<!doctype html><html></html>")
    with pytest.raises(InputError, match="HTML"):
        llmc.FORMAT.open(str(tmp_path / "m.bin"), PLAIN)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeInputError):
        llmc.FORMAT.open(str(tmp_path / "pipe"), PLAIN)
    with pytest.raises(InputError, match="no such file"):
        llmc.FORMAT.open(str(tmp_path / "n.bin"), PLAIN)
    with pytest.raises(UsageError, match="--step"):
        llmc.FORMAT.open(str(FP32), Options(step=3))


def test_a_directory_with_one_model(tmp_path: Path) -> None:
    """Beside it lie what llm.c writes there too, and things that only look like a model from outside."""
    shutil.copy(FP32, tmp_path / "gpt2_124M.bin")
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(header(FP32, w0=20240328))
    (tmp_path / "gpt2_124M_debug_state.bin").write_bytes(header(FP32, w0=20240327))
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "folder.bin").mkdir()
    assert llmc.recognises(str(tmp_path))
    for source in (open_source(tmp_path, PLAIN), llmc.FORMAT.open(str(tmp_path), PLAIN)):
        assert source.scheme == "llmc"
        assert source.path.endswith("gpt2_124M.bin")
    assert gap(opened(tmp_path), "llmc") < 1e-12


def test_a_directory_with_several_models_or_none(tmp_path: Path) -> None:
    for open_it in (open_source, llmc.FORMAT.open):
        with pytest.raises(InputError, match="several model files") as caught:
            open_it(str(FP32.parent), PLAIN)
        assert "gpt2_bf16.bin, gpt2_fp32.bin" in str(caught.value)
    for source in (FP32.parent, FP32.parent / "."):
        assert open_source(source, Options(weights_file=FP32.name)).path.endswith(FP32.name)
    with pytest.raises(InputError, match="no such file"):
        llmc.FORMAT.open(str(FP32.parent), Options(weights_file="x.bin"))
    with pytest.raises(UsageError, match="--weights-file"):
        llmc.FORMAT.open(str(FP32), Options(weights_file="x.bin"))
    assert not llmc.recognises(str(tmp_path))
    with pytest.raises(InputError, match="no model file"):
        llmc.FORMAT.open(str(tmp_path), PLAIN)


def test_order_of_the_tensors_matters(tmp_path: Path) -> None:
    """Two stacked tensors of one size in the wrong order change the logits: the witness would notice."""
    data = np.frombuffer(FP32.read_bytes()[1024:], "<f4").copy()
    start, n = (128 + 40) * 24, 2 * 24
    data[start : start + 2 * n] = np.concatenate([data[start + n : start + 2 * n], data[start : start + n]])
    (tmp_path / "m.bin").write_bytes(FP32.read_bytes()[:1024] + data.tobytes())
    assert gap(opened(tmp_path / "m.bin"), "llmc") > 1e-3
