"""Weights inside a large graph file stay there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from gptconvert.containers.protobuf import MalformedError
from gptconvert.errors import InputError
from gptconvert.targets.onnx.file import LARGE_BYTES, open_onnx
from gptconvert.targets.onnx.session import Settings, open_session
from gptconvert.targets.onnx.skeleton import LEAST_BYTES, without_weights

LARGE, SMALL = LEAST_BYTES // 4 + 3, LEAST_BYTES // 4 - 1


def model(rows: int = 1, external: bool = False) -> ModelProto:
    """``y = x + large`` with another, small initializer, and one in a typed field."""
    random = np.random.default_rng(0)
    large = numpy_helper.from_array(random.standard_normal((rows, LARGE), dtype=np.float32), "large")
    small = numpy_helper.from_array(random.standard_normal(SMALL, dtype=np.float32), "small")
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [LARGE], np.full(LARGE, 1.5, np.float32))
    if external:
        large.data_location = TensorProto.EXTERNAL
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, LARGE])
    nodes = [helper.make_node("Add", ["x", "large"], ["sum"]), helper.make_node("Add", ["sum", "typed"], ["y"])]
    graph = helper.make_graph(nodes, "g", [value], [out], [large, small, typed])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_large_weights_are_left_out(tmp_path: Path) -> None:
    whole = model()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole.SerializeToString())
    found = ModelProto.FromString(without_weights(str(path)))
    large, small, typed = found.graph.initializer
    entries = {entry.key: entry.value for entry in large.external_data}
    assert entries["location"] == "m.onnx" and large.dims == whole.graph.initializer[0].dims
    start, length = int(entries["offset"]), int(entries["length"])
    assert path.read_bytes()[start : start + length] == whole.graph.initializer[0].raw_data
    assert (small, typed) == tuple(whole.graph.initializer)[1:]
    for each in (found, whole):  # all else is equal
        del each.graph.initializer[:]
    assert found == whole


def test_onnxruntime_reads_them_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model().SerializeToString())
    feed = {"x": np.ones(1, np.float32)}
    expected = open_session(str(path), None, Settings(), {}).run(None, feed)[0]
    session = open_session(str(path), without_weights(str(path)), Settings(), {})
    assert np.array_equal(session.run(None, feed)[0], expected)


def test_large_files_are_opened_so(tmp_path: Path) -> None:
    rows = LARGE_BYTES // LEAST_BYTES
    path = tmp_path / "m.onnx"
    path.write_bytes(model(rows).SerializeToString())
    file = open_onnx(str(path))
    assert file.inside and file.model.ByteSize() < LARGE_BYTES / 10
    assert file.size == pytest.approx(path.stat().st_size, rel=0.01)
    large = numpy_helper.to_array(model(rows).graph.initializer[0])
    assert np.array_equal(file.initializers["large"].read(), large)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="is not an ONNX model"):
        open_onnx(str(path))


def test_what_is_external_already_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model(external=True).SerializeToString())
    assert ModelProto.FromString(without_weights(str(path))) == model(external=True)


@pytest.mark.parametrize("graphs", [0, 2])
def test_one_graph(tmp_path: Path, graphs: int) -> None:
    """A reader would merge two, and this one would see only their bytes."""
    small = model()
    graph = ModelProto(graph=small.graph).SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(ModelProto(ir_version=10).SerializeToString() + graph * graphs)
    with pytest.raises(MalformedError, match=f"{graphs} graphs"):
        without_weights(str(path))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    content = bytearray(_CONTENT)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 200))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "m.onnx"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with suppress(MalformedError):
        without_weights(str(path))


_CONTENT = model().SerializeToString()
