"""The trainers' own checkpoints end to end: detected, converted, loaded and run in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gptconvert.model.options import Options
from gptconvert.pipeline import open_checkpoint
from tests.commands import command
from tests.sources.detection import claimants
from tests.sources.foreign import same_weights
from tests.sources.originals import ORIGINALS

#: Fixture → its command.
COMMANDS = {
    "gpt1": ("openai-tf", "--n-head", "3"),
    "mesh-tf": ("mesh-tf",),
    "mesh-tf-bf16": ("mesh-tf",),
    "mesh-jax": ("mesh-jax",),
    "neox-pipeline": ("neox",),
    "neox-sequential": ("neox",),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_formats_are_distinguished(name: str) -> None:
    first = claimants(ORIGINALS / name)[0]
    assert first == {"gpt1": "openai-gpt1"}.get(name, COMMANDS[name][0])


@pytest.mark.parametrize("name", COMMANDS)
def test_transformers_computes_the_golden_logits_from_the_export(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    first, *options = COMMANDS[name]
    arguments = (ORIGINALS / name, *options, "--to", "safetensors", "--to", "onnx", "-o", tmp_path / "out", "-q")
    done = command(capsys, first, *arguments)
    assert done.code == 0, done.err
    assert "verified" in done.out
    request = Options(n_head=3) if name == "gpt1" else Options()
    assert same_weights(open_checkpoint(ORIGINALS / name, request), open_checkpoint(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    golden = np.load(ORIGINALS / name / "golden.npz", allow_pickle=False)
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["ids"])).logits[:, -golden["logits"].shape[1] :].numpy()
    assert np.abs(logits - golden["logits"]).max() < 2e-6 * np.abs(golden["logits"]).max()


@pytest.mark.parametrize("name", COMMANDS)
def test_inspect(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, *options = COMMANDS[name]
    found = command(capsys, "inspect", ORIGINALS / name, *options, "--json").json
    assert found["parameters"] > 10_000
    assert len(found["tensors"]) > 20
    assert found["config"]["n_head"] == 3


def test_trim_vocab(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = (ORIGINALS / "neox-sequential", "--trim-vocab", "90", "--to", "onnx", "-o", out)
    done = command(capsys, "neox", *arguments)
    assert done.code == 0, done.err
    assert "cut from 99 ids to 90" in done.err
    assert command(capsys, "verify", ORIGINALS / "neox-sequential", out, "--trim-vocab", "90", "-q").code == 0
    assert command(capsys, "neox", ORIGINALS / "neox-sequential", "--trim-vocab", "100", "-o", out).code == 2
