"""The weights of an ONNX graph verified without its plan: matched by name in our own files, by content in others."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterator, Mapping
from typing import Any

from gptconvert.model.blocks import Quantised
from gptconvert.model.tensors import Array, LazyTensor
from gptconvert.model.transforms import transpose
from gptconvert.targets.onnx.file import OnnxFile, tensors_of
from gptconvert.verify.weights import Pair, WeightReport

#: A larger initializer that is not a weight of the model is a problem; smaller ones are constants.
MOST_CONSTANT_ELEMENTS = 4096


def pair_up(
    file: OnnxFile, weights: Mapping[str, LazyTensor], tables: Collection[Array] = ()
) -> tuple[WeightReport, list[Pair]]:
    """Pair weights and initializers of one of our own files by name; unmatched ones are problems of the report.

    ``tables`` as in :func:`unplanned`.
    """
    report, pairs = WeightReport(len(weights)), list[Pair]()
    flips = orientations(file.model.graph)
    quantised = {name: weight for name, weight in weights.items() if isinstance(weight, Quantised)}
    parts = {f"{name}.{part}": (name, tensor) for name, w in quantised.items() for part, tensor in w.parts.items()}
    for stored, (name, tensor) in parts.items():
        if stored in file.initializers:
            pairs.append(Pair(name, stored, tensor, file.initializers[stored]))
        else:
            report.problems.append(f"{stored}: not in the graph")
    for name, weight in ((name, weight) for name, weight in weights.items() if name not in quantised):
        found, uses = file.initializers.get(name), flips.get(name, {False})
        if found is None:
            report.problems.append(f"{name}: not in the graph")
        elif len(uses) > 1:
            report.problems.append(f"{name}: used both as stored and transposed")
        else:
            pairs.append(Pair(name, name, transpose(weight) if uses == {True} else weight, found))
    report.problems += unplanned(file, {*weights, *parts}, tables)
    return report, pairs


def unplanned(file: OnnxFile, weights: Container[str], tables: Collection[Array] = ()) -> list[str]:
    """One line for each initializer that is neither a weight, nor small, nor one of the graph's own ``tables``."""
    known = {table.tobytes() for table in tables}
    return [
        f"{name}: not a weight of this model"
        for name, tensor in file.initializers.items()
        if name not in weights and tensor.size > MOST_CONSTANT_ELEMENTS and tensor.read().tobytes() not in known
    ]


def used_tensors(file: OnnxFile) -> dict[str, LazyTensor]:
    """The initializers and constants that the outputs depend on, by name.

    A correct copy of a weight that nothing uses proves nothing.
    """
    graph = file.model.graph
    needed, constants = {value.name for value in graph.output}, dict[str, LazyTensor]()
    for node in reversed(graph.node):  # topological order, which ONNX requires
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            needed.update(name for attribute in node.attribute for name in _captured(attribute))
            if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                constants.update(zip(node.output, file.lazy(node.attribute[0].t), strict=False))
    return {name: tensor for name, tensor in {**file.initializers, **constants}.items() if name in needed}


def other_sizes(file: OnnxFile, known: Container[str]) -> set[int]:
    """Sizes, in elements, of all tensors in the file but those named in ``known``; indices and masks do not count."""
    import onnx

    graph, whole = file.model.graph, onnx.TensorProto
    nodes = [node for node in graph.node if node.op_type != "Constant" or node.output[0] not in known]
    nodes += [node for function in file.model.functions for node in function.node]
    tensors = [tensor for tensor in graph.initializer if tensor.name not in known]
    tensors += [sparse.values for sparse in graph.sparse_initializer]
    sizes = {len(attribute.floats) for node in nodes for attribute in node.attribute}
    for tensor in (*tensors, *tensors_of(nodes)):
        if tensor.data_type not in (whole.INT64, whole.INT32, whole.BOOL, whole.STRING):
            sizes.add(math.prod(tensor.dims))
    return sizes


def _captured(attribute: Any) -> Iterator[str]:
    """Names that the subgraphs of an attribute use."""
    for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
        yield from (value.name for value in graph.output)
        for node in graph.node:
            yield from node.input
            yield from (name for inner in node.attribute for name in _captured(inner))


def orientations(graph: Any) -> dict[str, set[bool]]:
    """Initializer → whether its matrix products take it as [in, out], the transpose of the canonical weight.

    ``transB`` decides for a ``Gemm``; a ``MatMul`` always does. Casts and transposes in between are followed.
    """
    uses: dict[str, set[bool]] = {}
    origin: dict[str, tuple[str, bool]] = {tensor.name: (tensor.name, False) for tensor in graph.initializer}
    for node in graph.node:  # topological order, which ONNX requires
        if node.op_type in ("Cast", "Identity", "Transpose") and node.input[0] in origin:
            name, flipped = origin[node.input[0]]
            origin[node.output[0]] = name, flipped ^ (node.op_type == "Transpose")
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in origin:
            name, flipped = origin[node.input[1]]
            as_is = any(a.name == "transB" and a.i for a in node.attribute)
            uses.setdefault(name, set()).add(as_is == flipped)
        elif node.op_type == "Gather" and node.input[0] in origin:
            name, flipped = origin[node.input[0]]
            uses.setdefault(name, set()).add(flipped)
    return uses
