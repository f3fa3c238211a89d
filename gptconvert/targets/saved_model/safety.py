"""Reads an untrusted ``saved_model.pb`` as data, and refuses what TensorFlow must not load.

A SavedModel is a program: operators read and write files, open sockets and call Python, and some run as soon as it is
loaded. Only the operators of :mod:`.operators` pass, in every function of the library, called or not, and only the
kinds of objects that our own SavedModels hold.
Formats: tensorflow/core/protobuf/{saved_model,meta_graph,saved_object_graph}.proto, tensorflow/core/framework/{graph,
function,node_def,attr_value,tensor}.proto.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from gptconvert.containers.protobuf import MalformedError, Message
from gptconvert.containers.untrusted import read_small
from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.targets.calls import Body, call_problems, refuse
from gptconvert.targets.saved_model.operators import ALLOWED, CHECKPOINTS

#: Largest graph file: 48 layers with compiled twins take 6 MB.
MOST_BYTES = 256 << 20
#: Files that TensorFlow reads in place of saved_model.pb, or could.
OTHER_GRAPHS = ("saved_model.cpb", "saved_model.pbtxt")
#: Kinds of objects (fields of SavedObject) → names. Others run code on loading, or refer to files.
OBJECTS = {4: "user_object", 6: "function", 7: "variable", 8: "bare_concrete_function", 9: "constant"}
OTHER_OBJECTS = {
    3: "slot_variables",
    5: "asset",
    10: "resource",
    11: "saveable_objects",
    12: "captured_tensor",
    13: "registered_name",
    14: "serialized_user_proto",
    16: "registered_saver",
}
#: Python objects that loading may create.
CLASSES = frozenset(
    (
        "_generic_user_object",
        "signature_map",
        "trackable_dict_wrapper",
        "trackable_list_wrapper",
        "trackable_tuple_wrapper",
    )
)
#: Collections that TensorFlow 2 writes; its loader reads none.
COLLECTIONS = frozenset(("saved_model_main_op", "trainable_variables", "variables"))
#: Types of constants (tensorflow/core/framework/types.proto): numbers, booleans, strings. No resources, no variants.
CONSTANT_TYPES = frozenset((1, 2, 3, 4, 5, 6, 7, 9, 10, 14, 17, 19, 22, 23))
#: Largest constant, in elements: a few bytes of the file can state that all of them are equal.
MOST_ELEMENTS = 8 << 20
#: Deepest nesting of attributes, and attributes that name functions by text alone.
MOST_NESTED, BY_NAME = 8, frozenset(("api_implements", "api_preferred_device"))


@dataclass
class _Function:
    """What a graph or function holds.

    Attributes:
        nodes: number of nodes.
        calls: every function that a node or attribute refers to.
        operators: operator → name of the first node.
        problems: everything else that is refused.
    """

    nodes: int = 0
    calls: list[str] = field(default_factory=list)
    operators: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_saved_model(path: str) -> int:
    """Refuse the SavedModel in the directory ``path`` unless it holds nothing but a model's mathematics.

    Returns:
        size of its graph in bytes.

    Raises:
        UnsafeInputError: it holds another operator, object or file; all are listed.
        InputError: ``saved_model.pb`` is missing, too large or damaged.
    """
    others = [name for name in OTHER_GRAPHS if os.path.lexists(os.path.join(path, name))]
    if others:
        raise UnsafeInputError(
            "more than one graph, so the one checked may not be the one run", path=path, found=others[0]
        )
    file = os.path.join(path, "saved_model.pb")
    content = read_small(file, MOST_BYTES, "the graph of a GPT")
    try:
        refuse(list(_problems(Message(content))), file, "TensorFlow")
    except (MalformedError, UnicodeDecodeError) as error:
        raise InputError(f"damaged: {error}", path=file) from error
    return len(content)


def _problems(model: Message) -> Iterator[str]:
    """Yield everything refused in a SavedModel."""
    metas = model.messages(2)
    if len(metas) != 1 or 7 not in metas[0]:
        yield f"{len(metas)} graphs, expected one with objects: TensorFlow would run the initializers of version 1"
        return
    meta = metas[0]
    graph, objects = meta.message(2), meta.message(7)
    collections = [_text(entry, 1) for entry in meta.messages(4)]
    yield from (f"collection {name}" for name in collections if name not in COLLECTIONS)
    yield from (f"asset file {_text(asset, 2)!r}" for asset in meta.messages(6))
    yield from _object_problems(objects)
    yield from _graph_problems(graph, [_text(entry, 1) for entry in objects.messages(2)])


def _object_problems(objects: Message) -> Iterator[str]:
    for index, item in enumerate(objects.messages(1)):
        yield from (f"object {index} has {name}" for number, name in OTHER_OBJECTS.items() if number in item)
        if not any(number in item for number in OBJECTS):
            yield f"object {index} is of an unknown kind"
        if 4 in item and (name := _text(item.message(4), 1)) not in CLASSES:
            yield f"object {index} is of the Python class {name}"


def _graph_problems(graph: Message, exposed: list[str]) -> Iterator[str]:
    """Yield everything refused in the main graph and the function library. ``exposed`` functions can be called."""
    library = graph.message(2)
    main, functions = _Function(), dict[str, _Function]()
    _read_nodes(graph.messages(1), main)
    for message in library.messages(1):
        name, function = _text(message.message(1), 1), _Function()
        if name in functions:
            yield f"two functions named {name}"
        functions[name] = function
        _read_nodes(message.messages(3), function)
        _read_attributes(message, 5, function, name)
        for entry in message.messages(7):  # attributes of arguments: index → ArgAttrs
            _read_attributes(entry.message(2), 1, function, name)
    yield from (f"a gradient function of {_text(gradient, 1)}" for gradient in library.messages(2))
    yield from (f"a registered gradient, {_text(gradient, 1)}" for gradient in library.messages(3))
    callable_ = {*exposed, *(called for function in functions.values() for called in function.calls)}
    for where, function in (("the main graph", main), *((f"function {n}", f) for n, f in functions.items())):
        saves = function is not main and where.removeprefix("function ") not in callable_
        allowed = ALLOWED | CHECKPOINTS if saves else ALLOWED
        yield from (f"{problem}, in {where}" for problem in function.problems)
        for operator, node in function.operators.items():
            if operator not in allowed and operator not in functions:
                yield f"operator {operator} (node {node}, in {where})"
    bodies = {name: Body(function.nodes, function.calls) for name, function in functions.items()}
    yield from call_problems(bodies, [*exposed, *main.calls])


def _read_nodes(nodes: list[Message], function: _Function) -> None:
    """Add nodes to a function."""
    function.nodes += len(nodes)
    for node in nodes:
        name, operator = _text(node, 1), _text(node, 2)
        function.operators.setdefault(operator, name)
        function.calls.append(operator)  # a function's name is an operator too
        _read_attributes(node, 5, function, name)


def _read_attributes(holder: Message, number: int, function: _Function, name: str, depth: int = 0) -> None:
    """Add the functions that a map of attributes refers to, and the constants that are refused."""
    if depth > MOST_NESTED:
        function.problems.append(f"attributes of {name} nested more than {MOST_NESTED} levels")
        return
    for entry in holder.messages(number):
        if (key := _text(entry, 1)) in BY_NAME:
            function.problems.append(f"attribute {key} of {name}")
        value = entry.message(2)
        several = value.message(1)
        for called in (*value.messages(10), *several.messages(9)):
            function.calls.append(_text(called, 1))
            _read_attributes(called, 2, function, name, depth + 1)
        for tensor in (*value.messages(8), *several.messages(8)):
            sizes = [size.integer(1) for size in tensor.message(2).messages(2)]
            if tensor.integer(1) not in CONSTANT_TYPES or min(sizes, default=0) < 0:
                function.problems.append(f"constant {name} of type {tensor.integer(1)}")
            elif math.prod(sizes) > MOST_ELEMENTS:
                function.problems.append(f"constant {name} of {math.prod(sizes)} elements")


def _text(message: Message, number: int) -> str:
    return message.raw(number).decode("utf-8")
