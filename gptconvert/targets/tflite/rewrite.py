"""Rewrites a converted model: names of the weights, and smaller types. Imported in child processes only.

Weights in float16 are followed by ``DEQUANTIZE``, which LiteRT runs once. An 8-bit matrix stays in its
``FULLY_CONNECTED``, which then rounds activations to 8 bits too; rows of an 8-bit embedding are looked up, cast and
scaled, so a tied head uses the same codes. The graph's own constants stay float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from gptconvert.model.int8 import codes_of, scales_of
from gptconvert.targets.tflite.forms import SCALES_SUFFIX, Form, form_of

FLOAT32, FLOAT16, INT8 = schema.TensorType.FLOAT32, schema.TensorType.FLOAT16, schema.TensorType.INT8
OPERATORS = schema.BuiltinOperator
#: Bytes at which LiteRT expects every constant to be aligned.
ALIGNMENT = 16
#: Version of operators as the converter would write them for these types.
VERSIONS = {OPERATORS.FULLY_CONNECTED: 12, OPERATORS.GATHER: 2, OPERATORS.CAST: 3, OPERATORS.DEQUANTIZE: 3}
#: First version of LiteRT that multiplies by 8-bit matrices with a scale per row.
RUNTIME_KEY, RUNTIME_VERSION = b"min_runtime_version", b"2.17.0"

#: The schema's classes have no types.
Model = Any
Graph = Any
Tensor = Any
Operator = Any
#: Number of a graph, number of a tensor in it, and its name.
Label = tuple[int, int, str]


def labels_of(content: bytes, weights: Iterable[tuple[str, Any]]) -> list[Label]:
    """The constants of a model that equal weights, named after them.

    One that equals several weights gets all their names, separated by ``;``.
    """
    names: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for name, value in weights:
        names.setdefault((value.shape, hashlib.sha256(value).digest()), []).append(name)
    shapes = {shape for shape, _ in names}
    model, digests, labels = schema.ModelT.InitFromPackedBuf(content, 0), dict[int, bytes](), list[Label]()
    for i, graph in enumerate(model.subgraphs):
        for j, tensor in enumerate(graph.tensors):
            shape, data = _shape(tensor), model.buffers[tensor.buffer].data
            if tensor.type == FLOAT32 and data is not None and shape in shapes:
                if tensor.buffer not in digests:
                    digests[tensor.buffer] = hashlib.sha256(data).digest()
                if found := names.get((shape, digests[tensor.buffer])):
                    labels.append((i, j, ";".join(found)))
    return labels


def rewritten(content: bytes, labels: Sequence[Label], kind: str) -> bytes:
    """A converted float32 model with its weights named, and stored in the type ``kind``.

    Raises:
        ValueError: a weight is too large for float16.
    """
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    rewriter = _Rewriter(model)
    for i, j, name in labels:
        graph = model.subgraphs[i]
        graph.tensors[j].name = name
        form = form_of(kind, name.partition(";")[0], _shape(graph.tensors[j]))
        if form == "f16":
            rewriter.to_half(graph, j)
        elif form == "int8":
            rewriter.to_int8(graph, j)
    if kind == "int8":
        _require_runtime(model)
    return _packed(model)


def with_float_products(content: bytes) -> bytes:
    """The same bytes of weights in a graph that converts 8-bit matrices to float32 before it multiplies by them."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    rewriter = _Rewriter(model)
    for graph in model.subgraphs:
        for operator in [o for o in graph.operators if rewriter.code(o) == OPERATORS.FULLY_CONNECTED]:
            if graph.tensors[operator.inputs[1]].type == INT8:
                rewriter.to_float_product(graph, operator)
    return _packed(model)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(map(int, tensor.shape)) if tensor.shape is not None else ()


class _Rewriter:
    """Changes constants of a model, in place.

    Attributes:
        model: the model.
        forms: buffer → its new form; several graphs share one.
        scales: buffer → scales of its rows, and the buffer that holds them as a column.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.forms: dict[int, Form] = {}
        self.scales: dict[int, tuple[Any, int]] = {}

    def to_half(self, graph: Graph, number: int) -> None:
        """Store a constant in float16, and convert it in the graph."""
        tensor = graph.tensors[number]
        half = _new(tensor, FLOAT16, tensor.name, tensor.buffer)
        if tensor.buffer not in self.forms:
            values = self._values(tensor).astype("<f2")
            if not np.isfinite(values).all():
                raise ValueError(f"{tensor.name}: a weight is too large for float16")
            self._store(tensor.buffer, "f16", values)
        tensor.name, tensor.buffer = f"{tensor.name}/float32", 0
        graph.tensors.append(half)
        graph.operators.insert(0, self._operator(OPERATORS.DEQUANTIZE, [len(graph.tensors) - 1], number))

    def to_int8(self, graph: Graph, number: int) -> None:
        """Store a matrix in 8 bits, for all operators that use it."""
        tensor = graph.tensors[number]
        if tensor.buffer not in self.forms:
            values = self._values(tensor)
            scales = scales_of(values)
            self._store(tensor.buffer, "int8", codes_of(values, scales))
            self.scales[tensor.buffer] = scales, self._add_buffer(scales)
        tensor.type = INT8
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale = self.scales[tensor.buffer][0]
        tensor.quantization.zeroPoint = np.zeros(len(tensor.quantization.scale), np.int64)
        for operator in [o for o in graph.operators if number in o.inputs]:
            if self.code(operator) == OPERATORS.FULLY_CONNECTED:
                operator.opcodeIndex = self._code_index(OPERATORS.FULLY_CONNECTED)
                operator.builtinOptions.asymmetricQuantizeInputs = True
            else:
                self._scale_rows(graph, number, operator)

    def to_float_product(self, graph: Graph, product: Operator) -> None:
        """Convert the matrix of a product to float32 first."""
        number = int(product.inputs[1])
        tensor = graph.tensors[number]
        graph.tensors.append(_new(tensor, FLOAT32, f"{tensor.name}/float32", 0))
        converted = len(graph.tensors) - 1
        product.inputs = [product.inputs[0], converted, *product.inputs[2:]]
        product.builtinOptions.asymmetricQuantizeInputs = False
        graph.operators.insert(0, self._operator(OPERATORS.DEQUANTIZE, [number], converted))

    def _scale_rows(self, graph: Graph, number: int, lookup: Operator) -> None:
        """Replace the lookup of float rows by that of codes, a cast, and the product with the looked-up scales."""
        if self.code(lookup) != OPERATORS.GATHER:
            raise ValueError("a matrix has an unexpected use")
        tensor, ids, result = graph.tensors[number], int(lookup.inputs[1]), int(lookup.outputs[0])
        looked_up, column = graph.tensors[result], [*tensor.shape[:1].tolist(), 1]
        first, name = len(graph.tensors), tensor.name
        plain = _new(tensor, INT8, f"{name}/codes", tensor.buffer)
        scales = _new(tensor, FLOAT32, f"{name}{SCALES_SUFFIX}", self.scales[tensor.buffer][1])
        scales.shape = np.array(column, np.int32)
        rows, floats, row_scales = (_new(looked_up, kind, f"{name}/{what}", 0) for kind, what in _STEPS)
        row_scales.shape, row_scales.shapeSignature = (
            None if sizes is None else np.array([*sizes[:-1], 1], np.int32)
            for sizes in (looked_up.shape, looked_up.shapeSignature)
        )
        graph.tensors += [plain, scales, rows, floats, row_scales]
        steps = [
            self._operator(OPERATORS.GATHER, [first, ids], first + 2, lookup),
            self._operator(OPERATORS.CAST, [first + 2], first + 3),
            self._operator(OPERATORS.GATHER, [first + 1, ids], first + 4, lookup),
            self._operator(OPERATORS.MUL, [first + 3, first + 4], result),
        ]
        at = graph.operators.index(lookup)
        graph.operators[at : at + 1] = steps

    def _values(self, tensor: Tensor) -> Any:
        return np.frombuffer(self.model.buffers[tensor.buffer].data, "<f4").reshape(_shape(tensor))

    def _store(self, buffer: int, form: Form, values: Any) -> None:
        self.model.buffers[buffer].data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.forms[buffer] = form

    def _add_buffer(self, values: Any) -> int:
        buffer = schema.BufferT()
        buffer.data = values.view(np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def code(self, operator: Operator) -> int:
        code = self.model.operatorCodes[operator.opcodeIndex]
        return int(max(code.builtinCode, code.deprecatedBuiltinCode))

    def _code_index(self, operator: int) -> int:
        """Index of an operator of the version that the new types need."""
        version = VERSIONS.get(operator, 1)
        for index, code in enumerate(self.model.operatorCodes):
            if (code.builtinCode, code.version) == (operator, version):
                return index
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = operator, min(operator, 127), version
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def _operator(self, operator: int, inputs: list[int], output: int, like: Operator | None = None) -> Operator:
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = self._code_index(operator), inputs, [output]
        if like is not None:
            made.builtinOptionsType, made.builtinOptions = like.builtinOptionsType, like.builtinOptions
        elif operator in _OPTIONS:
            made.builtinOptionsType, kind = _OPTIONS[operator]
            made.builtinOptions = kind()
        return made


#: Types and names of the steps of a lookup: codes, the same as floats, and scales.
_STEPS = ((INT8, "rows"), (FLOAT32, "rows/float32"), (FLOAT32, "rows/scales"))
_OPTIONS = {
    OPERATORS.CAST: (schema.BuiltinOptions.CastOptions, schema.CastOptionsT),
    OPERATORS.MUL: (schema.BuiltinOptions.MulOptions, schema.MulOptionsT),
    OPERATORS.DEQUANTIZE: (schema.BuiltinOptions.DequantizeOptions, schema.DequantizeOptionsT),
}


def _new(like: Tensor, kind: int, name: str, buffer: int) -> Tensor:
    tensor = schema.TensorT()
    tensor.shape, tensor.shapeSignature, tensor.hasRank = like.shape, like.shapeSignature, True
    tensor.type, tensor.name, tensor.buffer = kind, name, buffer
    return tensor


def _require_runtime(model: Model) -> None:
    """State the version of LiteRT that the file needs."""
    for entry in model.metadata or ():
        if entry.name == RUNTIME_KEY:
            model.buffers[entry.buffer].data = np.frombuffer(RUNTIME_VERSION.ljust(16, b"\0"), np.uint8)


class _Aligned(schema.BufferT):  # type: ignore[misc]
    """A constant whose bytes are aligned, which the schema asks for and the generated class does not do."""

    def Pack(self, builder: Any) -> Any:  # noqa: N802 - overrides
        if self.data is None or not len(self.data):
            return super().Pack(builder)
        builder.StartVector(1, len(self.data), ALIGNMENT)
        end = builder.Head()
        builder.head = end - len(self.data)
        builder.Bytes[builder.head : end] = np.ascontiguousarray(self.data, np.uint8).data
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


def _packed(model: Model) -> bytes:
    """The bytes of a model."""
    model.buffers = [_Aligned(buffer.data) for buffer in model.buffers]
    size = sum(0 if buffer.data is None else len(buffer.data) + ALIGNMENT for buffer in model.buffers)
    builder = flatbuffers.Builder(size + (1 << 20))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
