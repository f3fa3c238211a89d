"""Compares one of our own graphs, node for node, with the one that this version builds for the checkpoint.

Outputs show an error only if it exceeds rounding noise with the checkpoint's weights; a wrong epsilon or mask value
may not. The options of the conversion that shape a graph (operator set, cache, positions, types and orientations of
weights) are read from the graph itself, so it needs no manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptconvert.model.blocks import Quantised
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import LazyTensor, Transposed, filled
from gptconvert.targets.onnx.contract import check_contract, check_interface
from gptconvert.targets.onnx.file import OnnxFile
from gptconvert.targets.onnx.foreign import orientations
from gptconvert.version import __version__


def version_note(file: OnnxFile, shown_as: str) -> list[str]:
    """A note if another version of this program wrote the graph, which is then not compared."""
    version = file.model.producer_version
    if version == __version__:
        return []
    return [
        f"{shown_as}: its nodes were not compared, because gptconvert {version} wrote it and this is {__version__}"
    ]


def graph_differences(file: OnnxFile, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the nodes and constants that differ from those of the graph that this version builds.

    Inputs, outputs and weights have been compared before.
    """
    found, weights = file.model.graph, _placeholders(file, checkpoint)
    expected = _built(file, checkpoint, weights)
    yield from _node_differences(_by_outputs(expected.node), _by_outputs(found.node))
    stored = {*weights, *(f"{n}.{part}" for n, w in weights.items() if isinstance(w, Quantised) for part in w.parts)}
    constants = [{t.name: t for t in graph.initializer if t.name not in stored} for graph in (expected, found)]
    for name in dict.fromkeys((*constants[0], *constants[1])):
        before, after = (_content(each.get(name)) for each in constants)
        if before != after:
            yield f"constant {name}: expected {_shown(before)}, found {_shown(after)}"
    others = {"function": file.model.functions, "sparse initializer": found.sparse_initializer}
    yield from (f"the graph has a {kind}" for kind, values in others.items() if len(values))


def is_rewritten(file: OnnxFile, checkpoint: Checkpoint) -> bool:
    """Whether another program wrote the file from ours: it keeps the producer's name, but not what our files have.

    Optimisers fuse nodes, converters change the operator set or the types, and others rename weights, all of them.
    A graph that was edited or built wrongly has our nodes, or lacks some weights.

    Args:
        file: a file that says that this program wrote it.
        checkpoint: as stored in it.
    """
    if file.model.producer_version != __version__:
        return False
    names, found = checkpoint.weights.keys(), checkpoint.weights.keys() & file.initializers.keys()
    if check_interface(file, checkpoint.config) or 0 < len(found) < len(names):
        return False
    if not found or check_contract(file, checkpoint.config, portable=not file.is_in_place):
        return True
    expected = _by_outputs(_built(file, checkpoint, _placeholders(file, checkpoint)).node)
    return not expected.keys() <= _by_outputs(file.model.graph.node).keys()


def _placeholders(file: OnnxFile, checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Weights without content, of the type and orientation that the graph stores."""
    uses, made = orientations(file.model.graph), dict[str, LazyTensor]()
    for name, weight in checkpoint.weights.items():
        if isinstance(weight, Quantised):
            made[name] = weight  # computed when read, which building a graph does not
            continue
        stored = file.initializers[name]
        empty = filled(0.0, stored.dtype, stored.shape)
        made[name] = Transposed(empty) if uses.get(name) == {True} else empty
    return made


def _built(file: OnnxFile, checkpoint: Checkpoint, weights: Mapping[str, LazyTensor]) -> Any:
    """The GraphProto that this version builds, without weights."""
    import onnx_ir as ir

    from gptconvert.targets.onnx.graph import Form, build

    inputs, (opset,) = file.inputs(), [o.version for o in file.model.opset_import if o.domain in ("", "ai.onnx")]
    cached = any(name.startswith("past_key_values.") for name in inputs)
    levels = {a.i for node in file.model.graph.node for a in node.attribute if a.name == "accuracy_level"}
    level = min(levels, default=0)
    form = Form(opset, cached, "position_ids" in inputs, level, file.is_in_place, file.is_half)
    graph, builder = build(checkpoint.config, weights, form)
    for name in builder.stored:
        del graph.initializers[name]
    return ir.to_proto(graph)


Nodes = Mapping[tuple[str, ...], Any]


def _by_outputs(nodes: Any) -> Nodes:
    return {tuple(node.output): node for node in nodes}


def _node_differences(expected: Nodes, found: Nodes) -> Iterator[str]:
    yield from (f"node {', '.join(outputs)}: missing" for outputs in expected if outputs not in found)
    yield from (f"node {', '.join(outputs)}: unexpected" for outputs in found if outputs not in expected)
    for outputs, node in expected.items():
        before, after = _described(node), _described(found.get(outputs, node))
        for what in dict.fromkeys((*before, *after)):
            if before.get(what) != after.get(what):
                yield (
                    f"node {', '.join(outputs)}: {what} is {after.get(what, 'missing')}, "
                    f"expected {before.get(what, 'none')}"
                )
    if list(expected) != list(found) and expected.keys() == found.keys():
        yield "the nodes are in another order"


def _described(node: Any) -> dict[str, str]:
    """Operator, inputs and attributes of a node, as text."""
    attributes = {a.name: _value(a) for a in node.attribute}
    operator = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    return {"the operator": operator, "the input": ", ".join(node.input), **attributes}


def _value(attribute: Any) -> str:
    import numpy as np
    import onnx

    if attribute.type == onnx.AttributeProto.FLOAT:
        return str(np.float32(attribute.f))
    if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.TENSOR):
        return repr(attribute.SerializeToString(deterministic=True))
    return repr(onnx.helper.get_attribute_value(attribute))


def _content(tensor: Any) -> tuple[str, tuple[int, ...], bytes] | None:
    """Type, shape and bytes of a constant; None if there is none."""
    import onnx

    if tensor is None:
        return None
    array = onnx.numpy_helper.to_array(tensor)
    return array.dtype.name, array.shape, array.tobytes()


def _shown(content: tuple[str, tuple[int, ...], bytes] | None) -> str:
    import numpy as np

    if content is None:
        return "none"
    dtype, shape, raw = content
    return f"{dtype} {list(shape)}" if len(raw) > 64 else str(np.frombuffer(raw, dtype).tolist())
