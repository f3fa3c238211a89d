"""Rewrites a converted model: names of the weights, and smaller types. Imported in child processes only.

Weights in float16 are followed by ``DEQUANTIZE``, whose result LiteRT keeps. An 8-bit matrix stays in its
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
from gptconvert.targets.tflite.forms import CODES_SUFFIX, SCALES_SUFFIX, form_of

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
    """Changes constants of a model.

    Attributes:
        model: the model.
        halves: buffer → that of the same constant in float16; several graphs share one.
        codes: buffer and shape → the buffer of its codes, that of its scales, and the scales. Equal constants share a
            buffer even if their shapes differ.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.halves: dict[int, int] = {}
        self.codes: dict[tuple[int, tuple[int, ...]], tuple[int, int, Any]] = {}

    def to_half(self, graph: Graph, number: int) -> None:
        """Store a constant in float16, and convert it in the graph."""
        tensor = graph.tensors[number]
        if tensor.buffer not in self.halves:
            values = self._values(tensor)
            halves = values.astype("<f2")
            if np.isinf(halves).any() and not np.isinf(values).any():
                raise ValueError(f"{tensor.name}: a weight is too large for float16")
            self.halves[tensor.buffer] = self._add_buffer(halves)
        half = _new(tensor, FLOAT16, tensor.name, self.halves[tensor.buffer])
        tensor.name, tensor.buffer = f"{tensor.name}/float32", 0
        graph.tensors.append(half)
        graph.operators.insert(0, self._operator(OPERATORS.DEQUANTIZE, [len(graph.tensors) - 1], number))

    def to_int8(self, graph: Graph, number: int) -> None:
        """Store a matrix in 8 bits, for all operators that use it."""
        tensor = graph.tensors[number]
        key = tensor.buffer, _shape(tensor)
        if key not in self.codes:
            values = self._values(tensor)
            scales = scales_of(values)
            self.codes[key] = self._add_buffer(codes_of(values, scales)), self._add_buffer(scales), scales
        tensor.buffer, column, scales = self.codes[key]
        tensor.type = INT8
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale, tensor.quantization.zeroPoint = scales, np.zeros(len(scales), np.int64)
        for operator in [o for o in graph.operators if number in o.inputs]:
            if self.code(operator) == OPERATORS.FULLY_CONNECTED:
                operator.opcodeIndex = self._code_index(OPERATORS.FULLY_CONNECTED)
                operator.builtinOptions.asymmetricQuantizeInputs = True
            else:
                self._scale_rows(graph, number, operator, column)

    def to_float_product(self, graph: Graph, product: Operator) -> None:
        """Convert the matrix of a product to float32 first."""
        number = int(product.inputs[1])
        tensor = graph.tensors[number]
        graph.tensors.append(_new(tensor, FLOAT32, f"{tensor.name}/float32", 0))
        converted = len(graph.tensors) - 1
        product.inputs = [product.inputs[0], converted, *product.inputs[2:]]
        product.builtinOptions.asymmetricQuantizeInputs = False
        graph.operators.insert(0, self._operator(OPERATORS.DEQUANTIZE, [number], converted))

    def _scale_rows(self, graph: Graph, number: int, lookup: Operator, column: int) -> None:
        """Replace the lookup of float rows by that of codes, a cast, and the product with the looked-up scales."""
        if self.code(lookup) != OPERATORS.GATHER:
            raise ValueError("a matrix has an unexpected use")
        tensor, ids, result = graph.tensors[number], int(lookup.inputs[1]), int(lookup.outputs[0])
        looked_up = graph.tensors[result]
        first, name = len(graph.tensors), tensor.name
        plain = _new(tensor, INT8, f"{name}{CODES_SUFFIX}", tensor.buffer)
        scales = _new(tensor, FLOAT32, f"{name}{SCALES_SUFFIX}", column)
        scales.shape = np.array((tensor.shape[0], 1), np.int32)
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

    def _add_buffer(self, values: Any) -> int:
        buffer = schema.BufferT()
        buffer.data = values.reshape(-1).view(np.uint8)
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
    """The bytes of a model, without the constants that nothing uses any more."""
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    used |= {entry.buffer for entry in model.metadata or ()}
    model.buffers = [_Aligned(buffer.data if i in used else None) for i, buffer in enumerate(model.buffers)]
    size = sum(0 if buffer.data is None else len(buffer.data) + ALIGNMENT for buffer in model.buffers)
    builder = flatbuffers.Builder(size + (1 << 20))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
