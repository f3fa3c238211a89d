"""The commands for other trainers' formats: from the fixture to a verified graph with the golden logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import command
from tests.sources.foreign import ORIGINALS, golden


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("nanogpt", "nanogpt"), "nanogpt"),
        (("nanogpt", "nanogpt", "--activation", "tanh"), "nanogpt_tanh"),
        (("nanogpt", "nanogpt-old/ckpt.pt"), "nanogpt-old"),
        (("llmc", "llmc/gpt2_fp32.bin"), "llmc"),
        (("megatron", "megatron"), "megatron"),
        (("convert", "h5-gpt2"), "h5-gpt2"),
        (("hf", "flax-gpt2"), "flax-gpt2"),
    ],
)
def test_fixture_to_onnx(capsys: Any, tmp_path: Path, arguments: tuple[str, ...], name: str) -> None:
    import onnxruntime

    form, source, *options = arguments
    done = command(capsys, form, ORIGINALS / source, "-o", tmp_path / "out", "--json", *options)
    assert (done.code, done.json["verification"]["passed"]) == (0, True)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    ids = golden("ids")
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    past = {i.name: np.zeros((1, 3, 0, 8), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    (logits, *_) = session.run(["logits"], {**inputs, **past})
    expected = golden(name)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["nanogpt", "llmc", "megatron"])
def test_wrong_command_for_a_file(capsys: Any, tmp_path: Path, form: str) -> None:
    done = command(capsys, form, ORIGINALS / "flax-gpt2" / "config.json", "-o", tmp_path / "out")
    assert done.code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "scheme"),
    [("nanogpt", "nanoGPT"), ("llmc/gpt2_bf16.bin", "llm.c"), ("megatron", "Megatron-LM"), ("h5-gpt2", "Keras HDF5")],
)
def test_inspect(capsys: Any, source: str, scheme: str) -> None:
    found = command(capsys, "inspect", ORIGINALS / source, "--json").json
    assert scheme in found["format"]
    assert found["parameters"] == 17_784


def test_activation_is_only_for_files_that_do_not_record_it(capsys: Any, tmp_path: Path) -> None:
    done = command(capsys, "convert", ORIGINALS / "h5-gpt2", "--activation", "erf", "-o", tmp_path / "out")
    assert done.code == 2
    assert "--activation" in done.err
