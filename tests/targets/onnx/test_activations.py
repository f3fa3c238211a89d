"""Activation nodes, run alone by onnxruntime, keep float32's accuracy at every opset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptconvert.model.options import OPSETS
from reference_model.config import ACTIVATIONS

#: From deep in both tails to the places where formulas cancel.
GRID = np.concatenate([np.linspace(-30, 30, 4001), [-100, -1e-6, 0, 1e-6, 100]]).astype(np.float32)


def run(formula: str, opset: int) -> Any:
    """The formula's values on :data:`GRID`."""
    import onnx_ir as ir
    import onnxruntime

    from gptconvert.targets.onnx.activations import ACTIVATION
    from gptconvert.targets.onnx.builder import Builder, as_output, graph_input

    b = Builder({}, opset)
    x = graph_input("x", ir.DataType.FLOAT, ["n"])
    y = b.op("Identity", ACTIVATION[formula](b, x, "active"), name="y")
    outputs = [as_output(y, ir.DataType.FLOAT, ["n"])]
    graph = ir.Graph(
        [x], outputs, nodes=b.nodes, initializers=b.initializers(), opset_imports={"": opset}, name="active"
    )
    model = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": GRID})[0]


@pytest.mark.parametrize("opset", [OPSETS[0], OPSETS[-1]])
@pytest.mark.parametrize("formula", ACTIVATIONS)
def test_accuracy(formula: str, opset: int) -> None:
    """A few units in the last place of the result, or of the input if a formula multiplies it by a rounded gate."""
    import torch

    from reference_model.model import ACTIVATION

    truth = ACTIVATION[formula](torch.from_numpy(GRID).double()).numpy()
    scale = np.maximum(np.maximum(np.abs(truth), np.abs(GRID)), 1)
    assert (np.abs(run(formula, opset) - truth) <= 4 * 2.0**-23 * scale).all()
