"""OpenVINO, a second witness: it reads our graphs as they are and computes in float32 what onnxruntime computes.

By default it rounds activations to 8 bits, otherwise than onnxruntime does at accuracy level 4; both are turned off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.model.options import Options
from gptconvert.model.tensors import Array
from gptconvert.pipeline import open_checkpoint
from gptconvert.targets.onnx.plan import plan
from tests.families.witness import Case, checkpoint
from tests.helpers import FIXTURES, write_planned

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
GRAPHS = ("model", "model_quantized", "model_q4")
OPTIONS = Options(quantize=("q8", "q4"), last_token=True, in_place=True, accuracy_level=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("openvino")
    for export in plan(open_checkpoint(str(FIXTURES / "gpt2-stdlib")), OPTIONS):
        write_planned(directory, export.files)
    return directory / "onnx"


def feeds_for(inputs: Any, past: int, batch: int, vocabulary: int) -> dict[str, Array]:
    """Seven new tokens after a random past; the second row is padded on the left."""
    random = np.random.default_rng(0)
    mask = np.ones((batch, past + 7), np.int64)
    mask[1:, : past + 2] = 0
    feeds: dict[str, Array] = {
        "input_ids": random.integers(0, vocabulary, (batch, 7)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:],
    }
    for value in inputs:
        if value.name not in feeds:
            shape = (batch, value.shape[1], past, value.shape[3])
            feeds[value.name] = random.standard_normal(shape).astype(np.float32)
    return feeds


def compare(path: Path, past: int, batch: int, vocabulary: int = 2003) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    feeds = feeds_for(session.get_inputs(), past, batch, vocabulary)
    names = [output.name for output in session.get_outputs()]
    expected = dict(zip(names, session.run(None, feeds), strict=True))
    core = openvino.Core()
    found = core.compile_model(core.read_model(path), "CPU", EXACT)(feeds)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("kind", ["", "_last_token", "_in_place"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_outputs_and_cache(graph: str, kind: str, past: int, exported: Path) -> None:
    """Its GroupQueryAttention refuses batches."""
    compare(exported / f"{graph}{kind}.onnx", past, 1 if kind == "_in_place" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "gpt_neox"])
def test_families(family: str, tmp_path: Path) -> None:
    """Windows and unscaled scores; rotary positions of both pairings."""
    for export in plan(
        checkpoint(Case(family), tmp_path), Options(quantize=("q4",), in_place=True, accuracy_level=0)
    ):
        write_planned(tmp_path, export.files)
    for graph, batch in (("model", 2), ("model_q4_in_place", 1)):
        compare(tmp_path / f"onnx/{graph}.onnx", 5, batch, 97)
