"""Rotary angles from tables: as accurate as float32 allows at every position, without float64 at run time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptconvert.targets.rotary import BASE, POSITIONS, rotary_tables
from reference_model.config import Rotary

ROTARIES = [
    Rotary(4, interleaved=True),
    Rotary(24, base=1000.0),
    Rotary(64, interleaved=True),  # GPT-J 6B
    Rotary(128),
]
FLOAT32_ROUNDING = 1.6e-8  # root mean square error of a cosine rounded to float32


def positions(first: int) -> Any:
    return np.arange(first, min(first + 2048, POSITIONS))[np.newaxis]  # (1, S)


def exact(rotary: Rotary, position_ids: Any) -> Any:
    """(cos, sin) in float64, [2, 1, S, 1, dim]."""
    frequency = rotary.base ** -(np.arange(0, rotary.dim, 2) / rotary.dim)
    frequency = np.repeat(frequency, 2) if rotary.interleaved else np.tile(frequency, 2)
    angle = position_ids[:, :, np.newaxis, np.newaxis] * frequency
    return np.stack((np.cos(angle), np.sin(angle)))


def onnx_angles(rotary: Rotary) -> Any:
    """A function that runs the ONNX graph's angles alone."""
    import onnx_ir as ir
    import onnxruntime

    from gptconvert.targets.onnx.builder import Builder, as_output, graph_input
    from gptconvert.targets.onnx.graph import rotary_angles

    b = Builder({}, 17)
    position_ids = graph_input("position_ids", ir.DataType.INT64, ("b", "s"))
    outputs = [
        as_output(value, ir.DataType.FLOAT, ("b", "s", 1, rotary.dim))
        for value in rotary_angles(b, rotary, position_ids)
    ]
    graph = ir.Graph([position_ids], outputs, nodes=b.nodes, initializers=b.initializers(), opset_imports={"": 17})
    content = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda ids: np.stack(session.run(None, {"position_ids": ids}))


@pytest.mark.parametrize("rotary", ROTARIES, ids=str)
@pytest.mark.parametrize("first", [0, 100_000, POSITIONS - 2048])
def test_angles_are_accurate_at_every_position(rotary: Rotary, first: int) -> None:
    ids = positions(first)
    error = onnx_angles(rotary)(ids) - exact(rotary, ids)
    assert np.sqrt(np.mean(error**2)) < 4 * FLOAT32_ROUNDING
    assert np.abs(error).max() < 2.5e-7


def test_float32_angles_would_not_be() -> None:
    """The form that most exporters write."""
    ids = positions(0)
    frequency = (10000.0 ** -(np.arange(0, 64, 2) / 64)).astype(np.float32)
    error = np.cos(ids[0, :, np.newaxis].astype(np.float32) * frequency) - exact(Rotary(64), ids)[0, 0, :, 0, :32]
    assert np.abs(error).max() > 2e-5


def test_positions_with_too_many_digits_fail() -> None:
    run = onnx_angles(Rotary(4))
    assert np.isfinite(run(np.array([[0, POSITIONS - 1]]))).all()
    with pytest.raises(Exception, match=r"(?i)out of.*bound"):
        run(np.array([[0, POSITIONS]]))


def test_tables_are_small() -> None:
    tables = [table for pair in rotary_tables(Rotary(64)) for table in pair]
    assert {table.shape for table in tables} == {(BASE, 1, 64)}
    assert sum(table.nbytes for table in tables) < 100_000
