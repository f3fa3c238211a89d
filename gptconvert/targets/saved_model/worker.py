"""The TensorFlow process: builds the graph, or runs a SavedModel. Started by :mod:`.process`, never imported.

Importing TensorFlow takes seconds and half a gigabyte, so only this process does.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from gptconvert.model.generation import SpecialIds
from gptconvert.targets.child.frames import Arrays
from gptconvert.targets.child.server import Command, serve
from gptconvert.targets.saved_model.contract import XLA, signature_names
from gptconvert.targets.saved_model.graph import Weights
from gptconvert.targets.saved_model.graph_differences import differences
from gptconvert.targets.saved_model.signatures import signatures
from reference_model.config import GPTConfig, Rotary
from reference_model.rotary import RopeScaling

OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
#: A directory of TensorFlow's file system in memory.
IN_MEMORY = "ram://gptconvert"


def build(request: Mapping[str, Any]) -> dict[str, object]:
    """Save the model without its weights: ``saved_model.pb`` and ``object_graph`` in ``request["directory"]``.

    TensorFlow's checkpoint of the empty variables provides the keys under which it will look them up.

    Returns:
        ``keys``: canonical name → checkpoint key.
    """
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    saved = os.path.join(request["directory"], "empty")
    content = save(request, saved).SerializeToString(deterministic=True)
    reader = tf.train.load_checkpoint(os.path.join(saved, "variables", "variables"))
    objects = reader.get_tensor(OBJECT_GRAPH_KEY)
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(objects)
    keys = {a.full_name: a.checkpoint_key for node in graph.nodes for a in node.attributes}
    _write(request["directory"], "object_graph", objects)
    _write(request["directory"], "saved_model.pb", content)
    return {"keys": keys}


def save(request: Mapping[str, Any], saved: str) -> Any:
    """Save the model without its weights in ``saved``; return its SavedModel message.

    Variables are declared with unknown sizes and stay empty while the graph is traced and saved; their real shapes
    are then written into the message.
    """
    gc.disable()  # takes an eighth of the time and frees nothing among the million objects of a graph
    config = config_of(request["config"])
    special = SpecialIds(**{**request["special"], "eos": tuple(request["special"]["eos"])})
    shapes = {name: shape for name, (_, shape) in request["weights"].items()}
    variables = {name: empty_variable(name, dtype, len(shape)) for name, (dtype, shape) in request["weights"].items()}
    weights = Weights(variables, shapes, frozenset(request["flipped"]))
    root = tf.Module()
    root.weights = variables  # a flat dictionary: modules within modules take seconds to save
    names = signature_names(config, request["xla"])
    tf.saved_model.save(root, saved, signatures=signatures(weights, config, special, names))
    return with_shapes(read_saved_model(saved), shapes)


def compare(request: Mapping[str, Any]) -> dict[str, object]:
    """Compare the graph of the SavedModel at ``path`` with the one that :func:`build` would write.

    It is built in memory, since a confined process cannot write files. Graphs of other versions of TensorFlow differ.

    Returns:
        ``built_by``: the version that wrote the graph; ``tensorflow``: this version; and ``differences``, as text,
        empty for another version.
    """
    found = read_saved_model(request["path"])
    version = found.meta_graphs[0].meta_info_def.tensorflow_version
    versions = {"built_by": version, "tensorflow": tf.__version__}
    if version != tf.__version__:
        return {**versions, "differences": []}
    xla = any(name.endswith(XLA) for name in found.meta_graphs[0].signature_def)
    expected = save({**request, "xla": xla}, IN_MEMORY)
    gc.enable()
    return {**versions, "differences": differences(expected, found)}


def config_of(fields: Mapping[str, Any]) -> GPTConfig:
    """The configuration, from its ``as_dict`` read from JSON."""
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    rotary = plain.pop("rotary")
    if rotary is not None:
        scaling = rotary.pop("scaling")
        rotary = Rotary(**rotary, scaling=None if scaling is None else RopeScaling(**scaling))
    plain["rotary"] = rotary
    return GPTConfig(**plain)


def empty_variable(name: str, dtype: str, rank: int) -> Any:
    """A variable that takes no memory: all its sizes are unknown, and it is empty."""
    nothing = tf.zeros([0] * rank, tf.as_dtype(dtype))
    return tf.Variable(nothing, name=name, shape=tf.TensorShape([None] * rank))


def read_saved_model(path: str) -> Any:
    """The message in ``saved_model.pb`` in the directory ``path``."""
    from tensorflow.core.protobuf import saved_model_pb2

    with tf.io.gfile.GFile(f"{path}/saved_model.pb", "rb") as file:
        return saved_model_pb2.SavedModel.FromString(file.read())


def with_shapes(model: Any, shapes: Mapping[str, list[int]]) -> Any:
    """The SavedModel message ``model``, changed to have the variables' real shapes."""
    graph = model.meta_graphs[0]
    declared = {n.variable.name: n.variable.shape for n in graph.object_graph_def.nodes if n.HasField("variable")}
    handles = {n.name: n.attr["shape"].shape for n in graph.graph_def.node if n.op == "VarHandleOp"}
    if not declared.keys() == handles.keys() == shapes.keys():
        raise RuntimeError("this version of TensorFlow declares variables in an unknown way")
    for name, shape in shapes.items():
        for written in (declared[name], handles[name]):
            written.CopyFrom(tf.TensorShape(shape).as_proto())
    return model


def _write(directory: str, name: str, content: bytes) -> None:
    with open(os.path.join(directory, name), "wb") as file:
        file.write(content)


LOADED: dict[str, Any] = {}


def load(request: Mapping[str, Any]) -> dict[str, object]:
    """Load the SavedModel at ``path``.

    Returns:
        ``signatures``: name → {``inputs``: …, ``outputs``: …}, each name → [type, shape], and ``largest_constant``,
        in bytes.
    """
    LOADED.clear()
    model = LOADED["model"] = tf.saved_model.load(request["path"])
    return {
        "largest_constant": largest_constant(request["path"]),
        "signatures": {
            name: {
                "inputs": {spec.name: _described(spec) for spec in tf.nest.flatten(f.structured_input_signature)},
                "outputs": {key: _described(spec) for key, spec in f.structured_outputs.items()},
            }
            for name, f in model.signatures.items()
        },
    }


def largest_constant(path: str) -> int:
    """Bytes of the largest constant in the graph and its functions."""
    graphs = [meta.graph_def for meta in read_saved_model(path).meta_graphs]
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for graph in graphs for function in graph.library.function for node in function.node_def]
    sizes = [int(node.attr["value"].tensor.ByteSize()) for node in nodes if node.op == "Const"]
    return max(sizes)


def _described(spec: Any) -> list[object]:
    return [spec.dtype.name, spec.shape.as_list()]


def run(request: Mapping[str, Any], inputs: Arrays) -> dict[str, Any]:
    """The outputs of ``signature`` that are named in ``wanted``, or all."""
    results = LOADED["model"].signatures[request["signature"]](**{n: tf.constant(a) for n, a in inputs.items()})
    return {name: results[name].numpy() for name in request["wanted"] or results}


def assign(request: Mapping[str, Any], inputs: Arrays) -> dict[str, Any]:
    """Give the variable of the weight ``name`` the ``values``, cast to its type."""
    variable = LOADED["model"].weights[request["name"]]
    variable.assign(tf.cast(inputs["values"], variable.dtype))
    return {}


def step(request: Mapping[str, Any], _: Arrays) -> dict[str, Any]:
    """Feed ``rows`` to ``decode`` with the cache of the rows ``parents`` of the step before; return logits [B, V]."""
    decode, seen, rows = LOADED["model"].signatures["decode"], LOADED.get("seen", 0), request["rows"]
    specs = {spec.name: spec for spec in tf.nest.flatten(decode.structured_input_signature)}
    if seen:
        past = {name: tf.gather(cache, request["parents"]) for name, cache in LOADED["past"].items()}
    else:
        past = {
            name: tf.zeros((len(rows), spec.shape[1], 0, spec.shape[3]), spec.dtype)
            for name, spec in specs.items()
            if name.startswith("past_key_values.")
        }
    total = seen + len(rows[0])
    feeds = {
        "input_ids": tf.constant(rows, tf.int64),
        "attention_mask": tf.ones((len(rows), total), tf.int64),
        "position_ids": tf.tile(tf.range(seen, total, dtype=tf.int64)[tf.newaxis], (len(rows), 1)),
    }
    fed = {name: tf.cast(value, specs[name].dtype) for name, value in feeds.items() if name in specs}
    results = decode(**fed, **past)
    LOADED["past"] = {name: results[name.replace("past_key_values", "present")] for name in past}
    LOADED["seen"] = total
    return {"logits": tf.cast(results["logits"][:, -1], tf.float32).numpy()}


def reset(_: Mapping[str, Any]) -> dict[str, object]:
    """Forget the ids of earlier steps."""
    LOADED["seen"] = 0
    return {}


def _described_by(command: Callable[[Mapping[str, Any]], dict[str, object]]) -> Command:
    """A command that neither takes nor returns arrays."""
    return lambda request, _: (command(request), {})


def _computed_by(command: Callable[[Mapping[str, Any], Arrays], dict[str, Any]]) -> Command:
    """A command that returns arrays alone."""
    return lambda request, arrays: ({}, command(request, arrays))


COMMANDS: Mapping[str, Command] = {
    "assign": _computed_by(assign),
    "build": _described_by(build),
    "compare": _described_by(compare),
    "load": _described_by(load),
    "run": _computed_by(run),
    "step": _computed_by(step),
    "reset": _described_by(reset),
}


if __name__ == "__main__":
    tf.get_logger().setLevel("ERROR")
    serve(COMMANDS, f"TensorFlow {tf.__version__}")
