"""An untrusted ONNX file: parses its graph, locates and checks its weights, and executes nothing.

onnxruntime opens a file only after every external tensor has been found inside a regular file beside the graph
(``onnx.checker`` accepts truncated data and offsets past the end).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from gptconvert.containers.untrusted import explain_file, file_beside, file_size
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, reason
from gptconvert.model.tensors import Array, Box, Computed, LazyTensor, Segment, Stored
from gptconvert.targets.interface import Tensors
from gptconvert.targets.onnx.safety import check_operators, check_text
from gptconvert.targets.onnx.skeleton import without_weights

#: Largest graph file; larger weights are external.
MOST_BYTES = (2 << 30) - 1
#: The weights of larger graph files stay where they are.
LARGE_BYTES = 16 << 20
#: Keys that ONNX defines for external data.
EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum", "basepath"})
#: Fields of TensorProto that hold data by type.
TYPED_DATA = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
#: In a location, this makes onnxruntime read its own memory at the offset.
MEMORY_ADDRESS = "_ORT_MEM_ADDR_"
#: Elements per byte of the types smaller than one.
PACKED = {"int4": 2, "uint4": 2, "float4e2m1fn": 2, "int2": 4, "uint2": 4}


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A parsed model.

    Attributes:
        path: of the graph file.
        model: the ModelProto, external data not loaded.
        initializers: name → lazy tensor, except for types smaller than a byte and strings.
        confined: whether it runs in a process with limits.
        omitted: name of an attribute that nodes do not have when it is run; empty to run the file as it is.
        inside: whether weights that the file itself holds are external data of ``model``, at their offsets in it.
        rewritten: whether another program has optimised a graph of gptconvert, whose name it kept.
    """

    path: str
    model: Any
    initializers: Mapping[str, LazyTensor]
    confined: bool = True
    omitted: str = ""
    inside: bool = False
    rewritten: bool = False

    @property
    def is_own(self) -> bool:
        """Whether gptconvert wrote the file, so that every name in it is known."""
        return bool(self.model.producer_name == "gptconvert") and not self.rewritten

    @property
    def is_in_place(self) -> bool:
        """Whether it writes keys and values into a buffer of the caller's, of which past and present are views."""
        return any(node.op_type == "GroupQueryAttention" for node in self.model.graph.node)

    @property
    def is_half(self) -> bool:
        """Whether its outputs are float16."""
        import onnx

        half = onnx.TensorProto.FLOAT16
        return any(output.type.tensor_type.elem_type == half for output in self.model.graph.output)

    @property
    def is_last_token(self) -> bool:
        """Whether it computes the logits of each row's last token only."""
        dims = [d for o in self.model.graph.output if o.name == "logits" for d in o.type.tensor_type.shape.dim]
        return len(dims) == 3 and bool(dims[1].dim_value == 1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all initializers in a plain session, which widens 16-bit ones to 32."""
        return sum(t.size * (4 if t.dtype.itemsize == 2 else t.dtype.itemsize) for t in self.initializers.values())

    def lazy(self, tensor: Any) -> list[LazyTensor]:
        """A TensorProto of the file as a lazy tensor; none if its elements are strings or smaller than a byte."""
        return [_lazy(self.path, tensor)] if _whole_bytes(tensor) else []

    @property
    def size(self) -> int:
        """Bytes of the graph and its weights."""
        return self.graph_bytes + sum(_nbytes(tensor) for tensor in self.model.graph.initializer)

    @property
    def graph_bytes(self) -> int:
        """Bytes of the file without its initializers."""
        return int(self.model.ByteSize() - sum(len(tensor.raw_data) for tensor in self.model.graph.initializer))

    def inputs(self) -> dict[str, Any]:
        """Name → ValueInfoProto of the inputs to feed, in order."""
        fixed = {tensor.name for tensor in self.model.graph.initializer}
        return {value.name: value for value in self.model.graph.input if value.name not in fixed}

    def outputs(self) -> dict[str, Any]:
        """Name → ValueInfoProto, in order."""
        return {value.name: value for value in self.model.graph.output}


def open_onnx(path: str, *, confined: bool = True) -> OnnxFile:
    """Parse a model, and check its operators and where its weights are stored.

    Args:
        path: the graph file.
        confined: whether to run it in a process with limits: unless this process has just written it.

    Raises:
        InputError: not an ONNX model; an initializer is ambiguous or without data; or its external data is missing,
            truncated or malformed.
        UnsafeInputError: an operator does more than compute; or external data is stored outside the model's directory
            or not in a regular file.
    """
    import onnx

    if (size := file_size(path)) > MOST_BYTES:
        expected = f"at most {MOST_BYTES} bytes, the limit of protobuf"
        raise InputError("too large for an ONNX model", path=path, expected=expected, found=f"{size} bytes")
    if explained := explain_file(path):
        raise InputError(f"is not an ONNX model: this file {explained}", path=path)
    inside = size > LARGE_BYTES
    try:
        model = onnx.load_model_from_string(without_weights(path)) if inside else onnx.load_model(path, None, False)
    except OSError as error:
        raise InputError(f"cannot be read ({reason(error)})", path=path) from error
    except Exception as error:  # protobuf's DecodeError moves between modules
        raise InputError("is not an ONNX model", path=path, found=str(error)[:200] or type(error).__name__) from error
    if not model.graph.node:
        raise InputError("is not an ONNX model", path=path, found="no nodes")
    check_text(model, path)
    check_operators(model, path)
    problems: list[GptConvertError] = []
    for tensor in (*_tensors(model.graph), *(t for function in model.functions for t in tensors_of(function.node))):
        try:
            if _is_external(tensor):
                _locate(path, tensor)
            else:
                _require_filled(tensor)
        except GptConvertError as error:
            problems.append(error)
    problems += [InputError("two initializers have this name", item=name) for name in _twice(model.graph)]
    if problems:
        raise _worst(problems, path)
    return OnnxFile(
        path,
        model,
        {t.name: _lazy(path, t) for t in model.graph.initializer if _whole_bytes(t)},
        confined,
        inside=inside,
    )


def described(values: Mapping[str, Any]) -> Tensors:
    """Type and shape of ValueInfoProtos."""
    return {name: (_type_name(value), _declared_shape(value)) for name, value in values.items()}


def _type_name(value: Any) -> str:
    import onnx

    number = value.type.tensor_type.elem_type
    try:
        return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number)).name)
    except (KeyError, TypeError):
        return f"number {number}"


def _declared_shape(value: Any) -> tuple[int | None, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)


def _is_external(tensor: Any) -> bool:
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _worst(problems: list[GptConvertError], path: str) -> GptConvertError:
    """One error for all problems: UnsafeInputError if any is unsafe, otherwise InputError."""
    unsafe = [p for p in problems if isinstance(p, UnsafeInputError)]
    shown = (unsafe or problems)[:10]
    lines = "\n".join(f"{p.item}: {p.message}" for p in shown)
    more = f"\n… {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    return type(shown[0])(f"tensor data is unusable\n{lines}{more}", path=path, item=shown[0].item)


def _tensors(graph: Any) -> Iterator[Any]:
    """Every TensorProto of a graph, including nodes and subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from tensors_of(graph.node)


def tensors_of(nodes: Any) -> Iterator[Any]:
    """Every TensorProto of nodes and their subgraphs."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in _subgraphs(attribute):
                yield from _tensors(inner)


def _subgraphs(attribute: Any) -> list[Any]:
    return [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _twice(graph: Any) -> Iterator[str]:
    """Names that several initializers of one graph share: runtimes differ in the one they use."""
    sparse = (tensor.values.name for tensor in graph.sparse_initializer)
    counts = Counter((*(tensor.name for tensor in graph.initializer), *sparse))
    yield from (name for name, count in counts.items() if count > 1)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in _subgraphs(attribute):
                yield from _twice(inner)


def _locate(model_path: str, tensor: Any) -> Segment:
    """The checked byte range of an external tensor."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name, nbytes = tensor.name, _nbytes(tensor)
    if len(entries) < len(tensor.external_data):
        raise InputError("external data has a key twice", item=name)
    if MEMORY_ADDRESS in entries.get("location", ""):
        raise UnsafeInputError("external data is an address in memory", item=name)
    unknown = sorted(set(entries) - EXTERNAL_KEYS)
    if unknown or "location" not in entries:
        raise InputError(
            f"external data {f'has unknown keys {unknown}' if unknown else 'has no location'}", item=name
        )
    numbers = {key: entries.get(key, default) for key, default in (("offset", "0"), ("length", str(nbytes)))}
    if not all(value.isascii() and value.isdigit() for value in numbers.values()):
        raise InputError(f"external data offset or length is not a number: {numbers}", item=name)
    offset, length = int(numbers["offset"]), int(numbers["length"])
    if length != nbytes:
        raise InputError(f"external data has {length} bytes, the tensor's type and shape need {nbytes}", item=name)
    try:
        path = file_beside(model_path, entries["location"], "external data location")
        size = file_size(path)
    except GptConvertError as error:
        error.item = name
        raise
    if offset + length > size:
        raise InputError(
            f"external data is truncated: bytes {offset} to {offset + length} of {entries['location']}, "
            f"which has {size}",
            item=name,
        )
    return Segment(path, offset, length)


def _require_filled(tensor: Any) -> None:
    """Raise InputError unless a tensor inside the graph has as much data as its type and shape need."""
    if tensor.HasField("raw_data"):
        expected, found, unit = _nbytes(tensor), len(tensor.raw_data), "bytes"
    else:  # the field depends on the type; types smaller than a byte are packed in several ways
        expected, unit = math.prod(tensor.dims), "numbers"
        found = max(len(getattr(tensor, field)) for field in TYPED_DATA)
        name = _dtype(tensor).name
        if name.startswith("complex"):
            expected *= 2
        elif name in PACKED:
            expected = found or 1
    if expected != found:
        raise InputError(f"data does not fill its shape: {found} {unit}, expected {expected}", item=tensor.name)


def _dtype(tensor: Any) -> np.dtype[np.generic]:
    import onnx

    try:
        return cast("np.dtype[np.generic]", np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)))
    except KeyError:
        raise InputError("unknown element type", item=tensor.name, found=tensor.data_type) from None


def _nbytes(tensor: Any) -> int:
    """Bytes that type and shape need."""
    dtype, count = _dtype(tensor), 1
    for size in tensor.dims:
        count *= size
    return -(-count // PACKED[dtype.name]) if dtype.name in PACKED else count * dtype.itemsize


def _whole_bytes(tensor: Any) -> bool:
    import onnx

    return tensor.data_type != onnx.TensorProto.STRING and _dtype(tensor).name not in PACKED


def _lazy(path: str, tensor: Any) -> LazyTensor:
    """An initializer of the model ``path`` as a lazy tensor."""
    dtype, shape = _dtype(tensor), tuple(tensor.dims)
    if _is_external(tensor):
        return Stored((_locate(path, tensor),), dtype, shape)

    def read(box: Box) -> Array:
        import onnx

        try:
            array: Array = onnx.numpy_helper.to_array(tensor)[box]
        except (ValueError, TypeError) as error:
            raise InputError("initializer's data does not fill its shape", item=tensor.name) from error
        return array

    return Computed(read, dtype, shape)
