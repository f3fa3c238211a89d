"""The LiteRT container: what is read, and that a damaged file ends in an error of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from gptconvert.containers.tflite import read_tflite
from gptconvert.errors import GptConvertError, InputError, UnsupportedError

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
CODES = np.array([[1, -2, 3], [4, 5, -6]], np.int8)


def tensor(name: str, kind: int, shape: Any, buffer: int, signature: Any = None) -> Any:
    made = schema.TensorT()
    made.name, made.type, made.buffer = name, kind, buffer
    made.shape, made.shapeSignature = np.array(shape, np.int32), signature
    return made


def model() -> Any:
    """Two graphs that share a constant, one of them with a quantised one, and a signature."""
    made = schema.ModelT()
    made.version, made.description, made.buffers = 3, "small", []
    for data in (None, VALUES, CODES):
        buffer = schema.BufferT()
        buffer.data = None if data is None else data.reshape(-1).view(np.uint8)
        made.buffers.append(buffer)
    codes = [schema.OperatorCodeT(), schema.OperatorCodeT()]
    codes[0].deprecatedBuiltinCode = codes[0].builtinCode = schema.BuiltinOperator.ADD
    codes[1].deprecatedBuiltinCode, codes[1].builtinCode = 127, schema.BuiltinOperator.GELU
    made.operatorCodes = codes
    graph, other = schema.SubGraphT(), schema.SubGraphT()
    graph.tensors = [
        tensor("x", schema.TensorType.INT64, (1, 1), 0, np.array((-1, -1), np.int32)),
        tensor("a;b", schema.TensorType.FLOAT32, (2, 3), 1),
        tensor("codes", schema.TensorType.INT8, (2, 3), 2),
    ]
    graph.tensors[2].quantization = schema.QuantizationParametersT()
    graph.tensors[2].quantization.scale = np.array((0.5, 0.25), np.float32)
    graph.tensors[2].quantization.zeroPoint = np.zeros(2, np.int64)
    graph.operators = [schema.OperatorT(), schema.OperatorT()]
    graph.operators[1].opcodeIndex = 1
    other.tensors, other.operators = [tensor("a", schema.TensorType.FLOAT32, (2, 3), 1)], []
    made.subgraphs = [graph, other]
    signature, entry = schema.SignatureDefT(), schema.TensorMapT()
    entry.name, entry.tensorIndex = "input", 0
    signature.signatureKey, signature.subgraphIndex = "decode", 0
    signature.inputs, signature.outputs = [entry], []
    made.signatureDefs = [signature]
    return made


def packed(made: Any) -> bytes:
    builder = flatbuffers.Builder(1024)
    builder.Finish(made.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.tflite"
    path.write_bytes(packed(model()))
    return path


def test_constants_and_signatures(path: Path) -> None:
    found = read_tflite(str(path))
    x, shared, codes = found.graphs[0].tensors
    assert (x.name, x.shape, x.stored) == ("x", (-1, -1), None)
    assert shared.name == "a;b" and shared.stored is not None and codes.stored is not None
    np.testing.assert_array_equal(shared.stored.read(), VALUES)
    np.testing.assert_array_equal(codes.stored.read(), CODES)
    assert codes.scales is not None and codes.scales.read().tolist() == [0.5, 0.25] and codes.axis == 0
    assert found.graphs[1].tensors[0].buffer == shared.buffer
    assert found.graphs[0].operators == (schema.BuiltinOperator.ADD, schema.BuiltinOperator.GELU)
    assert found.signatures["decode"].inputs == {"input": 0} and found.signatures["decode"].graph == 0
    assert found.constant_bytes == VALUES.nbytes + CODES.nbytes and found.nbytes == path.stat().st_size


def test_truncated_files(path: Path) -> None:
    """At no length does reading end in another exception; a file is not padded, so none of them is valid."""
    whole, failed = path.read_bytes(), 0
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        try:
            found = read_tflite(str(path))
            for each in (each for graph in found.graphs for each in graph.tensors if each.stored is not None):
                assert each.stored is not None
                each.stored.read()
        except InputError as error:
            assert error.path == str(path)
            failed += 1
    assert failed > 0.9 * len(whole) / 3


def test_damaged_files(path: Path) -> None:
    """Any byte may be wrong: reading ends, and only in errors of ours."""
    whole, random, errors = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(600):
        data = bytearray(whole)
        for at in random.integers(8, len(data), 2):
            data[at] = random.integers(256)
        path.write_bytes(data)
        try:
            read_tflite(str(path))
        except GptConvertError:
            errors += 1
    assert errors > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(20), "zip archive"),
        (bytes(4) + b"TFL2" + bytes(20), "not a LiteRT model"),
        (b"", "not a LiteRT model"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.tflite").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tflite(str(tmp_path / "x.tflite"))


def test_another_version(tmp_path: Path) -> None:
    made = model()
    made.version = 4
    (tmp_path / "x.tflite").write_bytes(packed(made))
    with pytest.raises(UnsupportedError, match="unknown version"):
        read_tflite(str(tmp_path / "x.tflite"))


def test_constants_outside_the_flatbuffer(tmp_path: Path) -> None:
    made = model()
    made.buffers[1].data, made.buffers[1].offset, made.buffers[1].size = None, 4096, 24
    (tmp_path / "x.tflite").write_bytes(packed(made))
    with pytest.raises(UnsupportedError, match="outside"):
        read_tflite(str(tmp_path / "x.tflite"))


def test_a_constant_of_another_size_than_its_shape(tmp_path: Path) -> None:
    made = model()
    made.subgraphs[0].tensors[1].shape = np.array((2, 4), np.int32)
    (tmp_path / "x.tflite").write_bytes(packed(made))
    with pytest.raises(InputError, match="damaged"):
        read_tflite(str(tmp_path / "x.tflite"))
