"""OpenAI's own code as the witness: checkpoints it wrote, outputs it computed, in every clone.

``fixtures/openai`` holds a GPT-1 and a GPT-2 of odd sizes with random weights. ``oracle.npz`` is what OpenAI's code
computes from them in float32, so two float32 runs differ from it by rounding, and float64 by less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import gptconvert
from gptconvert.model.checkpoint import Checkpoint
from tests.families import witness
from tests.helpers import FIXTURES

Outputs = dict[str, np.ndarray]

#: Largest error allowed, in units of the largest value of the output: the oracle's own rounding, and both runs'.
FLOAT64, FLOAT32 = 1e-6, 2e-6


@dataclass(frozen=True)
class Model:
    """One of the two fixtures, and the options that its format does not record."""

    folder: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.folder

    @property
    def path(self) -> Path:
        return FIXTURES / "openai" / self.folder

    def opened(self, **options: Any) -> Checkpoint:
        return gptconvert.open_checkpoint(self.path, gptconvert.Options(**self.options, **options))


GPT1, GPT2 = Model("gpt1-small", {"n_head": 3}), Model("gpt2-small")


@dataclass(frozen=True)
class Expected:
    """One run of OpenAI's code: token ids [B, S], and what came out, under this project's names."""

    model: Model
    name: str
    ids: np.ndarray = field(hash=False)
    outputs: Outputs = field(hash=False)
    task: str = "text-generation"

    def __str__(self) -> str:
        return f"{self.model}-{self.name}"

    @property
    def inputs(self) -> Outputs:
        mask = np.ones_like(self.ids)
        return {"input_ids": self.ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}


def _presents(stacked: np.ndarray) -> Outputs:
    """OpenAI's presents [B, L, 2, H, S, D] by this project's names, [B, H, S, D] each."""
    parts = ("key", "value")
    return {f"present.{i}.{part}": stacked[:, i, p] for i in range(stacked.shape[1]) for p, part in enumerate(parts)}


def _runs() -> list[Expected]:
    gpt1, gpt2 = (np.load(model.path / "oracle.npz") for model in (GPT1, GPT2))
    ids1, ids2, long = (array.astype(np.int64) for array in (gpt1["ids"], gpt2["ids"], gpt2["long_ids"]))
    return [
        Expected(GPT1, "logits", ids1, {"logits": gpt1["logits"]}),
        Expected(GPT1, "hidden", ids1, {"last_hidden_state": gpt1["hidden"]}, "feature-extraction"),
        Expected(GPT2, "batch", ids2, {"logits": gpt2["logits_last"], **_presents(gpt2["present"])}),
        Expected(GPT2, "whole-context", long, {"logits": gpt2["long_logits_last"]}),
    ]


RUNS = _runs()


def relative_error(found: Mapping[str, np.ndarray], expected: Outputs) -> float:
    """The largest difference over all outputs, each in units of its largest value; NaN counts as infinite."""
    worst = 0.0
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        difference = np.abs(found[name] - value).max() / np.abs(value).max()
        worst = max(worst, np.inf if np.isnan(difference) else float(difference))
    return worst


def reference_outputs(run: Expected, checkpoint: Checkpoint, dtype: torch.dtype) -> Outputs:
    outputs: Outputs = witness.our_outputs(witness.reference(checkpoint, dtype), run.inputs)
    return outputs


def session(directory: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(directory / "onnx/model.onnx", providers=["CPUExecutionProvider"])


def run_onnx(
    graph: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray], past: Mapping[str, np.ndarray]
) -> Outputs:
    """Every output by name; ``past`` by the names of presents, empty for the first chunk."""
    feed = {item.name: inputs[item.name] for item in graph.get_inputs() if item.name in inputs}
    for item in graph.get_inputs():
        if item.name.startswith("past_key_values."):
            empty = np.zeros((len(inputs["input_ids"]), item.shape[1], 0, item.shape[3]), np.float32)
            feed[item.name] = past.get(item.name.replace("past_key_values", "present"), empty)
    names = [output.name for output in graph.get_outputs()]
    return dict(zip(names, graph.run(names, feed), strict=True))


def test_every_output_is_compared() -> None:
    """Guards the comparison itself: GPT-2's presents of all layers, both models, all positions."""
    assert [(str(run), len(run.outputs), run.ids.shape) for run in RUNS] == [
        ("gpt1-small-logits", 1, (3, 40)),
        ("gpt1-small-hidden", 1, (3, 40)),
        ("gpt2-small-batch", 1 + 2 * 3, (3, 40)),
        ("gpt2-small-whole-context", 1, (1, 64)),
    ]


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)], ids=str)
def test_reference_model_computes_what_openais_code_computes(run: Expected, dtype: torch.dtype, limit: float) -> None:
    found = reference_outputs(run, run.model.opened(task=run.task), dtype)
    assert relative_error(found, run.outputs) < limit


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_onnx_export_computes_what_openais_code_computes(run: Expected, tmp_path: Path) -> None:
    gptconvert.convert(run.model.opened(task=run.task), tmp_path / "out")
    found = run_onnx(session(tmp_path / "out"), run.inputs, {})
    assert relative_error(found, run.outputs) < FLOAT32


@pytest.mark.parametrize("lengths", [(1, 39), (17, 23), (13, 1, 26)], ids=str)
def test_onnx_export_continues_from_its_own_presents(lengths: tuple[int, ...], tmp_path: Path) -> None:
    """A prompt fed in chunks gives the same logits and, at the end, the same presents."""
    run = RUNS[2]
    gptconvert.convert(run.model.opened(), tmp_path / "out")
    graph, logits, found, start = session(tmp_path / "out"), [], {}, 0
    for length in lengths:
        stop = start + length
        chunk = {name: value[:, start:stop] for name, value in run.inputs.items()}
        chunk["attention_mask"] = run.inputs["attention_mask"][:, :stop]
        found = run_onnx(graph, chunk, found)
        logits.append(found["logits"])
        start = stop
    found["logits"] = np.concatenate(logits, axis=1)
    assert relative_error(found, run.outputs) < FLOAT32


@pytest.mark.parametrize(
    ("run", "changes"),
    [
        (RUNS[0], {"n_head": 2}),
        (RUNS[0], {"activation": "gelu_erf"}),
        (RUNS[2], {"norm_eps": 1e-6}),
        (RUNS[2], {"activation": "gelu_erf"}),
    ],
    ids=str,
)
def test_the_limits_see_a_model_that_is_almost_right(run: Expected, changes: Mapping[str, Any]) -> None:
    checkpoint = run.model.opened(task=run.task)
    wrong = reference_outputs(run, replaced(checkpoint, **changes), torch.float64)
    compared = {name: value for name, value in run.outputs.items() if wrong[name].shape == value.shape}
    assert relative_error(wrong, compared) > 10 * FLOAT32


def replaced(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """The checkpoint with another configuration."""
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **changes))


@pytest.mark.parametrize("model", [GPT1, GPT2], ids=str)
def test_the_way_back_gives_openais_own_files(model: Model, tmp_path: Path) -> None:
    options = gptconvert.Options(targets=("openai-tf",), **model.options)
    gptconvert.convert(model.path, tmp_path / "out", options)
    for path in (*model.path.glob("params_*.npy"), *model.path.glob("model.ckpt.[di]*")):
        assert (tmp_path / "out/openai-tf" / path.name).read_bytes() == path.read_bytes(), path.name
