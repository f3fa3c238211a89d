"""The ONNX files: ``model.onnx`` (graph only) and ``model.onnx_data`` (weights), or one self-contained file.

The data file holds the weights sorted by canonical name, each at a multiple of 64 bytes. For OpenAI's GPT-2
checkpoints it equals the checkpoint's data file, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.containers.protobuf import varint
from gptconvert.errors import UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Export, Placed, PlannedFile, place
from gptconvert.model.options import Options
from gptconvert.model.tensors import Array, Box, Computed, LazyTensor
from gptconvert.targets.onnx.variants import Graph, graphs_of, has_cache, takes_positions
from gptconvert.version import __version__

if TYPE_CHECKING:  # imports onnx_ir
    from gptconvert.targets.onnx.builder import Builder

#: Opset → the lowest IR version that allows it. A runtime refuses later IR versions than its own, whatever the opset.
IR_VERSIONS: Mapping[int, int] = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}
NAME = "onnx"
#: Size limit of protobuf messages, and so of single-file models.
PROTOBUF_LIMIT = (1 << 31) - 1


def plan(checkpoint: Checkpoint, options: Options) -> tuple[Export, ...]:
    """One export for each graph: the graph file and, unless it holds the weights, its data file.

    Raises:
        UnsupportedError: ``single_file``, and the model is larger than 2 GiB.
        UsageError: ``kv_cache``, and the task has no cache; or the options name no graph or one twice.
    """
    exports: list[Export] = []
    for graph in graphs_of(checkpoint, options):
        exports.append(_export(graph, options, exports[-1] if graph.kind else None))
    return tuple(exports)


def _export(planned: Graph, options: Options, before: Export | None) -> Export:
    """The export of one graph; a graph of another kind uses the data file of the export ``before``."""
    from gptconvert.targets.onnx.graph import Form, build

    checkpoint, path = planned.checkpoint, planned.path
    if planned.kind == "last_token":
        checkpoint = replace(checkpoint, config=replace(checkpoint.config, last_token=True))
    form = Form(
        options.opset,
        has_cache(checkpoint.config, options),
        takes_positions(checkpoint.config, options),
        options.accuracy_level,
        planned.kind == "in_place",
        planned.half,
    )
    graph, builder = build(checkpoint.config, checkpoint.weights, form)
    variant = "_".join(filter(None, (planned.variant, planned.kind)))
    if planned.single:
        return Export(NAME, path, checkpoint, (_single_file(path, graph, builder, planned.metadata),), variant)
    data = _data_file(f"{path}_data", builder) if before is None else (before.files + before.shared)[-1]
    _attach(graph, data.tensors, data.path.rpartition("/")[2])
    model = PlannedFile.of_bytes(path, _serialise(graph, planned.metadata))
    if before is not None:
        return Export(NAME, path, checkpoint, (model,), variant, shared=(data,))
    return Export(NAME, path, checkpoint, (model, data), variant)


def _data_file(path: str, builder: Builder) -> PlannedFile:
    placed, size = place((name, builder.stored[name], name) for name in sorted(builder.stored))
    return PlannedFile(path, size, tensors=tuple(_described(item, builder) for item in placed))


def _described(placed: Placed, builder: Builder) -> Placed:
    """``placed`` with the weight, and the part or orientation of it, that it stores."""
    weight, part = builder.parts[placed.name]
    whole = builder.weights[weight]
    return replace(placed, weight=weight, part=part, transposed=not part and placed.tensor is not whole)


def _serialise(graph: object, metadata: Mapping[str, str]) -> bytes:
    """A deterministic ModelProto."""
    import onnx_ir as ir

    version = IR_VERSIONS[graph.opset_imports[""]]  # type: ignore[attr-defined]
    model = ir.Model(
        graph,
        ir_version=version,
        producer_name="gptconvert",
        producer_version=__version__,
        metadata_props=dict(metadata),
    )
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def _attach(graph: object, placed: Iterable[Placed], location: str) -> None:
    """Point every weight to its byte range in the data file."""
    import onnx_ir as ir

    for item in placed:
        value = graph.initializers[item.name]  # type: ignore[attr-defined]
        value.const_value = ir.ExternalTensor(
            location,
            item.offset,
            item.tensor.nbytes,
            ir.DataType.from_numpy(item.tensor.dtype),
            shape=ir.Shape(item.tensor.shape),
            name=item.name,
        )


def _single_file(path: str, graph: object, builder: Builder, metadata: Mapping[str, str]) -> PlannedFile:
    """One protobuf with the weights inside, laid out so that they still stream from the source.

    A GraphProto's initializers are length-delimited records in any order, so each weight's bytes get a hand-written
    record header, and the length of the graph message includes them all.
    """
    from onnx import GraphProto, ModelProto, TensorProto

    stored = builder.stored
    for name in stored:
        del graph.initializers[name]  # type: ignore[attr-defined]
    model = ModelProto.FromString(_serialise(graph, metadata))
    inner = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    records: list[tuple[str, LazyTensor, str | None]] = []
    for name, tensor in sorted(stored.items()):
        proto = TensorProto(name=name, dims=tensor.shape, data_type=_onnx_type(tensor.dtype))
        body = proto.SerializeToString(deterministic=True) + _tag(TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
        header = _tag(GraphProto.INITIALIZER_FIELD_NUMBER, len(body) + tensor.nbytes) + body
        records += [("", _literal(header), None), (name, tensor, name)]
    length = len(inner) + sum(tensor.nbytes for _, tensor, _ in records)
    start = model.SerializeToString(deterministic=True) + _tag(ModelProto.GRAPH_FIELD_NUMBER, length) + inner
    placed, size = place(records, len(start), alignment=1)
    placed = tuple(p if p.weight is None else _described(p, builder) for p in placed)
    check_single_file_size(size)
    return PlannedFile(path, size, start, placed)


def check_single_file_size(nbytes: int) -> None:
    """Raise UnsupportedError if protobuf cannot hold the file."""
    if nbytes > PROTOBUF_LIMIT:
        raise UnsupportedError(
            "the model does not fit in a single ONNX file: protobuf is limited to 2 GiB",
            item="--single-file",
            expected=f"at most {PROTOBUF_LIMIT} bytes",
            found=f"{nbytes} bytes",
            hint="without --single-file, the weights are stored in model.onnx_data beside the graph",
        )


def _tag(field: int, length: int) -> bytes:
    """Protobuf key and length of a length-delimited field."""
    return varint(field << 3 | 2) + varint(length)


def _literal(content: bytes) -> LazyTensor:
    """Bytes in memory, as a tensor."""
    array = np.frombuffer(content, np.uint8)

    def read(box: Box) -> Array:
        return array[box]

    return Computed(read, array.dtype, array.shape)


def _onnx_type(dtype: np.dtype[np.generic]) -> int:
    import onnx_ir as ir

    return int(ir.DataType.from_numpy(dtype).value)
