"""What is planned and refused, and the command line."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert import pipeline
from gptconvert.containers.tflite import MAX_BYTES, read_tflite
from gptconvert.errors import UnsupportedError, UsageError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.model.tensors import Computed
from gptconvert.pipeline import open_checkpoint
from gptconvert.targets.tflite import plan as planning
from gptconvert.targets.tflite.plan import plan
from gptconvert.targets.tflite.process import require_litert
from tests.commands import command
from tests.helpers import FIXTURES, checkpoint_of, tiny_gpt2

pytestmark = pytest.mark.tensorflow

TINY = FIXTURES / "tiny-gpt2" / "openai-tf"


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, ["model.tflite"]),
        ({"dtype": "fp16"}, ["model_fp16.tflite"]),
        ({"dtype": "fp16", "tflite_type": ("f32",)}, ["model.tflite"]),
        ({"tflite_type": ("int8", "f32", "int8")}, ["model_int8.tflite", "model.tflite"]),
    ],
)
def test_files(options: dict[str, Any], files: list[str]) -> None:
    assert [e.path for e in plan(open_checkpoint(str(TINY)), Options(targets=("tflite",), **options))] == files


def test_stored_types() -> None:
    exports = plan(open_checkpoint(str(TINY)), Options(targets=("tflite",), tflite_type=("f16", "int8")))
    half, small = (export.checkpoint.weights for export in exports)
    assert {half[name].dtype.name for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight")} == {"float16"}
    assert {half[name].dtype.name for name in ("ln_f.weight", "h.0.mlp.c_fc.bias")} == {"float32"}
    quantised = {name for name, weight in small.items() if hasattr(weight, "codes")}
    assert {name for name in quantised if not name.startswith("h.")} == {"wte.weight"}
    assert len(quantised) == 1 + 4 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.1}, "--max-kl has no effect"),
        ({"max_kl": 0.1, "tflite_type": ("int8",), "verify": None}, "contradicts --no-verify"),
        ({"allow_nonfinite": True, "tflite_type": ("int8",)}, "--allow-nonfinite"),
    ],
)
def test_options_without_effect(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(open_checkpoint(str(TINY)), Options(targets=("tflite",), **options))
    assert len(pipeline.plan(str(TINY), Options(targets=("tflite",), tflite_type=("int8",), max_kl=1.0)).exports) == 1


def test_bfloat16_is_refused(capsys: Any, tmp_path: Path) -> None:
    words = ("openai-tf", TINY, "--to", "tflite", "--dtype", "bf16", "-o", tmp_path / "out")
    done = command(capsys, *words)
    assert done.code == 4 and "--tflite-type f32" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("activation", ["laplace", "sqrt_softplus"])
def test_activations_that_litert_lacks(activation: str) -> None:
    checkpoint = checkpoint_of(*tiny_gpt2())
    config = dataclasses.replace(checkpoint.config, activation=activation)
    with pytest.raises(UnsupportedError, match=f"LiteRT cannot compute the activation {activation}"):
        plan(dataclasses.replace(checkpoint, config=config), Options(targets=("tflite",)))


def large(nbytes: int) -> Checkpoint:
    """A checkpoint whose embedding has so many bytes, which are never computed."""
    checkpoint = checkpoint_of(*tiny_gpt2())

    def read(box: Any) -> Any:
        raise AssertionError("read")

    table = Computed(read, np.dtype(np.float32), (nbytes // 96, 24))
    return dataclasses.replace(checkpoint, weights={**checkpoint.weights, "wte.weight": table})


def test_models_that_the_format_cannot_hold() -> None:
    """Whatever the type: all are made from a file in float32."""
    with pytest.raises(UnsupportedError, match="too large for LiteRT's file format") as caught:
        plan(large(MAX_BYTES), Options(targets=("tflite",), tflite_type=("int8",)))
    assert str(MAX_BYTES) in str(caught.value.expected)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stated before, and what does not fit is refused."""
    monkeypatch.setattr(planning, "available_memory", lambda: 9 << 30)
    (export,) = plan(large(1 << 30), Options(targets=("tflite",)))
    assert export.notes == ("TensorFlow's converter needs about 8.6 GB of memory",)
    monkeypatch.setattr(planning, "available_memory", lambda: 8 << 30)
    with pytest.raises(UnsupportedError, match="on this machine"):
        plan(large(1 << 30), Options(targets=("tflite",)))


def test_without_litert(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ai_edge_litert" else find(name))
    done = command(capsys, "openai-tf", TINY, "--to", "tflite", "-o", tmp_path / "out")
    assert done.code == 4 and "ai-edge-litert" in done.err
    with pytest.raises(UnsupportedError, match="ai-edge-litert"):
        require_litert()


def test_command_line(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted, verified and described; and altered bytes end in exit code 5, with nothing published."""
    words = ("openai-tf", TINY, "--to", "tflite", "--tflite-type", "int8")
    done = command(capsys, *words, "-o", tmp_path / "out")
    assert done.code == 0 and "quality: mean KL" in done.out, done.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "`model_int8.tflite`" in card and "mean KL divergence at most 0.05" in card and "--tflite-type int8" in card
    )
    (export,) = plan(open_checkpoint(str(TINY)), Options(targets=("tflite",), tflite_type=("int8",)))
    altered = bytearray((tmp_path / "out" / "model_int8.tflite").read_bytes())
    model = read_tflite(str(tmp_path / "out" / "model_int8.tflite"))
    bias = next(t for t in model.graphs[0].tensors if t.name == "h.1.mlp.c_fc.bias")
    altered[bias.stored.parts[0].offset] ^= 1  # type: ignore[union-attr]
    finished = dataclasses.replace(export.files[0], finish=lambda crc32c, stop: bytes(altered))
    broken = dataclasses.replace(export, files=(finished,))
    monkeypatch.setattr(planning, "_export", lambda *_: broken)
    done = command(capsys, *words, "-o", tmp_path / "broken")
    assert done.code == 5 and "differs from its source" in done.err and not (tmp_path / "broken").exists()
    done = command(capsys, "verify", TINY, tmp_path / "out")
    assert done.code == 0, done.err


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits")
def test_a_full_scratch_directory_is_an_output_error(tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    words = [sys.executable, "-m", "gptconvert", "openai-tf", str(TINY), "--to", "tflite"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*words, "-o", str(tmp_path / "out")], preexec_fn=limit, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 6, done.stderr
    assert "cannot be written (File too large)" in done.stderr
