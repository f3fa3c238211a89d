"""Bugs for SavedModels: mutation operators that are applied to every node of every function that computes outputs.

As in :mod:`.graph_mutations`, mutants that cannot be loaded, or compute the same, are sorted out later. Needs
TensorFlow, for its protobufs and the definitions of its operators.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from campaigns.graph_mutations import Mutant, changed_constants
from gptconvert.targets.saved_model.operators import ALLOWED

#: Operators that one may be mistaken for.
SIMILAR: Mapping[str, tuple[str, ...]] = {
    "AddV2": ("Sub", "Mul"),
    "All": ("Any",),
    "ArgMax": ("ArgMin",),
    "Erf": ("Tanh",),
    "Exp": ("Expm1",),
    "FloorDiv": ("FloorMod",),
    "FloorMod": ("FloorDiv",),
    "Greater": ("GreaterEqual", "Less"),
    "Less": ("LessEqual", "Greater"),
    "LessEqual": ("Less", "GreaterEqual"),
    "LogicalAnd": ("LogicalOr",),
    "LogicalOr": ("LogicalAnd",),
    "Max": ("Min",),
    "Maximum": ("Minimum", "AddV2"),
    "Mean": ("Sum", "Max"),
    "Min": ("Max",),
    "Minimum": ("Maximum",),
    "Mul": ("AddV2", "Sub", "RealDiv"),
    "NotEqual": ("Equal",),
    "Pow": ("Mul",),
    "RealDiv": ("Mul",),
    "Relu": ("Relu6", "Softplus", "Tanh"),
    "Rsqrt": ("Sqrt", "Reciprocal"),
    "Sigmoid": ("Tanh",),
    "Softmax": ("LogSoftmax",),
    "Square": ("Abs", "Neg"),
    "Sub": ("AddV2",),
    "Sum": ("Mean", "Max"),
    "Tanh": ("Sigmoid", "Erf", "Relu"),
}
#: Functions that store and load variables: not those that compute outputs.
SAVES = ("_traced_save", "_traced_restore")
#: Attributes that state how many inputs or outputs a node has.
COUNTS = ("N", "num", "num_split")
#: Field of an attribute → other values.
OTHER_VALUES: Mapping[str, Callable[[Any], tuple[object, ...]]] = {
    "b": lambda value: (not value,),
    "f": lambda value: (0.0, value * 10),
    "i": lambda value: (value - 1, value + 1),
}
#: Values before a node that may replace an input, per input.
NEAREST = 3
#: What has no operands that a bug could change: checks stop a run, and these only pass values on.
CHECKS = ("Assert", "NoOp", "Placeholder")

#: Type and shape of a value; None for an unknown shape.
Kind = tuple[int, str | None]


@dataclass(frozen=True)
class Function:
    """A function of the library.

    Attributes:
        index: in the library.
        name: without TensorFlow's number.
        nodes: its nodes, in topological order.
        kinds: value → its kind; arguments first, then in the order of the nodes.
        position: value → index of the node that computes it; -1 for arguments.
    """

    index: int
    name: str
    nodes: Any
    kinds: Mapping[str, Kind]
    position: Mapping[str, int]


def functions_of(model: Any) -> Iterator[Function]:
    """The functions that compute outputs, in an order that does not depend on TensorFlow's numbers."""
    library = model.meta_graphs[0].graph_def.library.function
    numbered = sorted((*_stem(f.signature.name), i) for i, f in enumerate(library))
    seen: Counter[str] = Counter()
    for stem, _, index in numbered:
        if stem.endswith(SAVES):
            continue
        name = stem.removeprefix("__inference_") + (f".{seen[stem]}" if seen[stem] else "")
        seen[stem] += 1
        kinds, position = _values(library[index])
        yield Function(index, name, library[index].node_def, kinds, position)


def _stem(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdecimal() else (name, 0)


def _values(function: Any) -> tuple[dict[str, Kind], dict[str, int]]:
    kinds: dict[str, Kind] = {}
    position: dict[str, int] = {}
    for index, argument in enumerate(function.signature.input_arg):
        shapes = function.arg_attr[index].attr if index in function.arg_attr else {}
        kinds[argument.name] = argument.type, _shape(shapes, 0)
        position[argument.name] = -1
    for index, node in enumerate(function.node_def):
        for number, (name, kind) in enumerate(_outputs(node)):
            kinds[name] = kind, _shape(node.attr, number)
            position[name] = index
    return kinds, position


def _shape(attributes: Any, number: int) -> str | None:
    shapes = attributes["_output_shapes"].list.shape if "_output_shapes" in attributes else ()
    return str([d.size for d in shapes[number].dim]) if number < len(shapes) else None


def _outputs(node: Any) -> Iterator[tuple[str, int]]:
    """Name and type of each output."""
    for argument in definition(node.op).output_arg:
        if argument.type_list_attr:
            types = list(attribute(node, argument.type_list_attr).list.type)
        else:
            types = [argument.type or attribute(node, argument.type_attr).type]
        if argument.number_attr:
            types *= attribute(node, argument.number_attr).i
        yield from ((f"{node.name}:{argument.name}:{number}", kind) for number, kind in enumerate(types))


def definition(operator: str) -> Any:
    """TensorFlow's definition of an operator."""
    from tensorflow.python.framework import op_def_registry

    return op_def_registry.get(operator)


def attribute(node: Any, name: str) -> Any:
    """An attribute, or its default, which SavedModels leave out. A look-up in ``node.attr`` would add it."""
    if name in node.attr:
        return node.attr[name]
    return next(each for each in definition(node.op).attr if each.name == name).default_value


def mutants(model: Any) -> dict[tuple[str, str], list[Mutant]]:
    """All mutants of a SavedModel in a fixed order, by kind of mutation and operator of the node."""
    found: dict[tuple[str, str], list[Mutant]] = {}
    for function in functions_of(model):
        for index, node in enumerate(function.nodes):
            for mutate in OPERATORS if node.op not in CHECKS else ():
                found.setdefault((mutate.__name__, node.op), []).extend(mutate(function, index))
    return found


def in_order(model: Any, seed: int) -> list[Mutant]:
    """All mutants, shuffled, but with all kinds in turn, and for each kind all operators."""
    chance, kinds = random.Random(seed), dict[str, list[list[Mutant]]]()
    for (kind, _), found in mutants(model).items():
        kinds.setdefault(kind, []).append(chance.sample(found, len(found)))
    return _in_turn([_in_turn(chance.sample(lists, len(lists))) for lists in kinds.values()])


def _in_turn(lists: Sequence[Sequence[Mutant]]) -> list[Mutant]:
    return [mutant for round_ in itertools.zip_longest(*lists) for mutant in round_ if mutant is not None]


def _on(function: Function, index: int, what: str, change: Callable[[Any, Any], None]) -> Mutant:
    """A mutant that changes a node: ``change(function, node)``."""
    node = function.nodes[index]

    def plant(model: Any) -> None:
        changed = model.meta_graphs[0].graph_def.library.function[function.index]
        change(changed, changed.node_def[index])

    return Mutant(f"{function.name}/{node.name} ({node.op}): {what}", plant)


def _replace(function: Any, node: Any, operator: str) -> None:
    """Change a node's operator; whatever uses its output names it by the operator's own name for it."""
    old, new = (definition(name) for name in (node.op, operator))
    renamed = {
        f"{node.name}:{a.name}:0": f"{node.name}:{b.name}:0"
        for a, b in zip(old.output_arg, new.output_arg, strict=True)
    }
    for user in function.node_def:
        user.input[:] = [renamed.get(name, name) for name in user.input]
    for key, value in function.ret.items():
        function.ret[key] = renamed.get(value, value)
    known = {attribute.name for attribute in new.attr}
    for key in [key for key in node.attr if key not in known and not key.startswith("_")]:
        del node.attr[key]
    node.op = operator


def other_operators(function: Function, index: int) -> Iterator[Mutant]:
    """A similar operator."""
    for other in SIMILAR.get(function.nodes[index].op, ()):
        if other in ALLOWED:

            def change(function: Any, node: Any, other: str = other) -> None:
                _replace(function, node, other)

            yield _on(function, index, other, change)


def attributes(function: Function, index: int) -> Iterator[Mutant]:
    """Other values of each attribute: MatMul's transposed flags and the masks of slices among them."""
    for key in (each.name for each in definition(function.nodes[index].op).attr if each.name not in COUNTS):
        value = attribute(function.nodes[index], key)
        field = str(value.WhichOneof("value"))
        for other in OTHER_VALUES[field](getattr(value, field)) if field in OTHER_VALUES else ():

            def change(_: Any, node: Any, key: str = key, field: str = field, other: Any = other) -> None:
                setattr(node.attr[key], field, other)

            yield _on(function, index, f"{key} {other!r}", change)


def constants(function: Function, index: int) -> Iterator[Mutant]:
    """Another constant."""
    import tensorflow as tf

    node = function.nodes[index]
    if node.op != "Const" or not tf.as_dtype(node.attr["dtype"].type).is_numpy_compatible:
        return
    array = tf.make_ndarray(node.attr["value"].tensor)
    for what, other in _other_arrays(array):

        def change(_: Any, node: Any, other: NDArray[Any] = other) -> None:
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(other))

        yield _on(function, index, what, change)


def _other_arrays(array: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    if array.dtype == np.bool_:
        yield "negated", ~array
    wide: Any = {"i": np.int64, "f": np.float32}.get(array.dtype.kind)
    if wide is not None:
        yield from ((what, other.astype(array.dtype)) for what, other in changed_constants(array.astype(wide)))


def other_inputs(function: Function, index: int) -> Iterator[Mutant]:
    """Inputs swapped, or another value of the same type and shape: a weight for a weight, a value computed before."""
    names = [name for name in function.nodes[index].input if not name.startswith("^")]
    for k in range(len(names) - 1):
        if function.kinds.get(names[k], 0) == function.kinds.get(names[k + 1], 1) and names[k] != names[k + 1]:
            swapped = [*names[:k], names[k + 1], names[k], *names[k + 2 :]]
            yield _on(function, index, f"inputs {k} and {k + 1} swapped", _with_inputs(swapped))
    for k, name in enumerate(names):
        same = [o for o, kind in function.kinds.items() if o != name and kind == function.kinds.get(name)]
        before = [other for other in same if function.position[other] < index]
        for other in before[-NEAREST:]:
            yield _on(function, index, f"input {k} is {other}", _with_inputs([*names[:k], other, *names[k + 1 :]]))


def _with_inputs(names: list[str]) -> Callable[[Any, Any], None]:
    def change(_: Any, node: Any) -> None:
        node.input[:] = [*names, *(name for name in node.input if name.startswith("^"))]

    return change


def bypassed(function: Function, index: int) -> Iterator[Mutant]:
    """The node left out: its output is one of its inputs."""
    node, outputs = function.nodes[index], list(_outputs(function.nodes[index]))
    if len(outputs) != 1 or node.op == "Identity":
        return
    for k, name in enumerate(node.input):
        if function.kinds.get(name) == function.kinds[outputs[0][0]]:

            def change(function: Any, node: Any, name: str = name, kind: int = outputs[0][1]) -> None:
                _replace(function, node, "Identity")
                node.attr["T"].type = kind
                node.input[:] = [name]

            yield _on(function, index, f"left out, input {k} stays", change)


OPERATORS: tuple[Callable[[Function, int], Iterator[Mutant]], ...] = (
    other_operators,
    attributes,
    constants,
    other_inputs,
    bypassed,
)
