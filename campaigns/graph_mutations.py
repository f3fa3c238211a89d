"""Bugs for ONNX graphs: mutation operators that are applied to every node in turn.

Each yields mutants of one node: a name, and a function that plants the bug in a ModelProto. Mutants that cannot be
loaded, or compute the same, are sorted out later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Operators that one may be mistaken for.
SIMILAR: Mapping[str, tuple[str, ...]] = {
    "Add": ("Sub", "Mul"),
    "And": ("Or",),
    "ArgMax": ("ArgMin",),
    "Cos": ("Sin",),
    "Div": ("Mul",),
    "Erf": ("Tanh",),
    "Gather": ("GatherElements",),
    "Gelu": ("Relu",),
    "Less": ("LessOrEqual", "Greater"),
    "LessOrEqual": ("Less", "GreaterOrEqual"),
    "Mul": ("Add", "Div"),
    "Neg": ("Identity", "Abs", "Relu"),
    "Or": ("And",),
    "Relu": ("Softplus", "Elu"),
    "Sigmoid": ("Tanh", "HardSigmoid"),
    "Sin": ("Cos",),
    "Softmax": ("LogSoftmax", "Hardmax"),
    "Sub": ("Add",),
    "Tanh": ("Erf", "HardSigmoid", "Softsign"),
}
#: Largest constant that is no weight or table.
SMALL = 16


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        name: the node, and what is wrong with it.
        plant: changes a ModelProto in place.
    """

    name: str
    plant: Callable[[Any], None]


@dataclass(frozen=True)
class Graph:
    """A correct graph.

    Attributes:
        model: the ModelProto; its nodes are in topological order.
        weights: names of the checkpoint's weights.
        types: value → (ONNX's number of its type, its rank).
        arrays: initializer → its content, except for weights.
        position: value → index of the node that computes it.
    """

    model: Any
    weights: frozenset[str]
    types: Mapping[str, tuple[int, int]]
    arrays: Mapping[str, NDArray[Any]]
    position: Mapping[str, int]

    @classmethod
    def of(cls, model: Any, weights: frozenset[str]) -> Graph:
        """Prepare a graph whose weights are external."""
        import onnx

        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        types = {v.name: (v.type.tensor_type.elem_type, len(v.type.tensor_type.shape.dim)) for v in values}
        initializers = model.graph.initializer
        types |= {t.name: (t.data_type, len(t.dims)) for t in initializers}
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in initializers if t.name not in weights}
        position = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
        return cls(model, weights, types, arrays, position)

    def kind(self, name: str) -> str:
        """``float``, ``int`` or ``other``."""
        import onnx

        element = self.types.get(name, (0, 0))[0]
        return {onnx.TensorProto.FLOAT: "float", onnx.TensorProto.INT64: "int"}.get(element, "other")


def mutants(graph: Graph) -> Iterator[Mutant]:
    """All mutants of a graph, in a fixed order."""
    for index in range(len(graph.model.graph.node)):
        for operator in OPERATORS:
            yield from operator(graph, index)
    for name in sorted(graph.weights):
        yield Mutant(f"{name}: one element", _one_element(name))


def _on(index: int, name: str, change: Callable[[Any, Any], None]) -> Mutant:
    """A mutant that changes a node: ``change(model, node)``."""
    return Mutant(name, lambda model: change(model, model.graph.node[index]))


def _label(graph: Graph, index: int) -> str:
    node = graph.model.graph.node[index]
    return f"{node.output[0]} ({node.op_type})"


def other_operators(graph: Graph, index: int) -> Iterator[Mutant]:
    """A similar operator."""
    for other in SIMILAR.get(graph.model.graph.node[index].op_type, ()):

        def change(_: Any, node: Any, other: str = other) -> None:
            node.op_type = other
            if other in ("Identity", "Abs"):
                del node.attribute[:]

        yield _on(index, f"{_label(graph, index)}: {other}", change)


def attributes(graph: Graph, index: int) -> Iterator[Mutant]:
    """Other values of each attribute."""
    import onnx

    kinds = onnx.AttributeProto
    for at, attribute in enumerate(graph.model.graph.node[index].attribute):
        values: list[tuple[str, object]] = []
        if attribute.type == kinds.FLOAT:
            values = [("f", value) for value in (0.0, attribute.f * 0.1, attribute.f * 10, attribute.f * 1.001)]
        elif attribute.type == kinds.INT:
            values = [("i", value) for value in sorted({attribute.i - 1, attribute.i + 1, 0, 1} - {attribute.i})]
        elif attribute.type == kinds.INTS:
            values = [("ints", value) for value in _swapped(list(attribute.ints))]
        elif attribute.type == kinds.STRING and attribute.name == "approximate":
            values = [("s", b"none" if attribute.s == b"tanh" else b"tanh")]
        for field, value in values:

            def change(_: Any, node: Any, at: int = at, field: str = field, value: Any = value) -> None:
                if field == "ints":
                    node.attribute[at].ints[:] = value
                else:
                    setattr(node.attribute[at], field, value)

            yield _on(index, f"{_label(graph, index)}: {attribute.name} {value!r}", change)


def _swapped(values: list[int]) -> Iterator[list[int]]:
    """Each pair of neighbours swapped."""
    for k in range(len(values) - 1):
        yield [*values[:k], values[k + 1], values[k], *values[k + 2 :]]


def other_inputs(graph: Graph, index: int) -> Iterator[Mutant]:
    """Inputs swapped, dropped, of another layer, or of another value of the same type and rank."""
    node = graph.model.graph.node[index]
    names = list(node.input)
    found: list[tuple[str, list[str]]] = [(f"inputs {k} and {k + 1} swapped", s) for k, s in enumerate(_swaps(names))]
    if len(names) == 3 and node.op_type in ("Gemm", "LayerNormalization"):
        found.append((f"no {names[2]}", names[:2]))
    for k, name in enumerate(names):
        found += [(f"input {k} is {o}", [*names[:k], o, *names[k + 1 :]]) for o in _mistakable(graph, index, name)]
    for what, inputs in found:

        def change(_: Any, node: Any, inputs: list[str] = inputs) -> None:
            node.input[:] = inputs

        yield _on(index, f"{_label(graph, index)}: {what}", change)


def _swaps(names: list[str]) -> Iterator[list[str]]:
    for k in range(len(names) - 1):
        yield [*names[:k], names[k + 1], names[k], *names[k + 2 :]]


def _mistakable(graph: Graph, index: int, name: str) -> list[str]:
    """Values that a node could use instead: of another layer; computed shortly before; an input of the graph."""
    kind = graph.types.get(name)
    layers = [name.replace(f".{i}.", f".{1 - i}.", 1) for i in (0, 1) if f".{i}." in name]
    before = [o for i in range(max(0, index - 8), index) for o in graph.model.graph.node[i].output]
    inputs = [value.name for value in graph.model.graph.input]
    norms = [name.replace("ln_1", "ln_2")] if "ln_1" in name else []
    before = [o for o in before if name not in graph.arrays and name not in graph.weights]
    inputs = inputs if name in inputs else []
    options = [o for o in (*layers, *norms, *before, *inputs) if o != name and graph.types.get(o) == kind]
    return [o for o in dict.fromkeys(options) if graph.position.get(o, -1) < index]


def bypassed(graph: Graph, index: int) -> Iterator[Mutant]:
    """The node left out: its output is one of its inputs."""
    node = graph.model.graph.node[index]
    for k, name in enumerate(node.input):
        if len(node.output) == 1 and graph.types.get(name) == graph.types.get(node.output[0]) and name:

            def change(_: Any, node: Any, name: str = name) -> None:
                node.op_type = "Identity"
                node.input[:] = [name]
                del node.attribute[:]

            yield _on(index, f"{_label(graph, index)}: left out, input {k} stays", change)


def outputs_swapped(graph: Graph, index: int) -> Iterator[Mutant]:
    """Neighbouring outputs of a Split swapped."""
    for k, names in enumerate(_swaps(list(graph.model.graph.node[index].output))):

        def change(_: Any, node: Any, names: list[str] = names) -> None:
            node.output[:] = names

        yield _on(index, f"{_label(graph, index)}: outputs {k} and {k + 1} swapped", change)


def other_constants(graph: Graph, index: int) -> Iterator[Mutant]:
    """Another constant in one use of it."""
    for k, name in enumerate(graph.model.graph.node[index].input):
        if name not in graph.arrays:
            continue
        for what, array in changed_constants(graph.arrays[name]):

            def change(model: Any, node: Any, k: int = k, array: NDArray[Any] = array) -> None:
                import onnx

                model.graph.initializer.append(onnx.numpy_helper.from_array(array, "planted"))
                node.input[k] = "planted"

            yield _on(index, f"{_label(graph, index)}: {name} {what}", change)


def changed_constants(array: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Other values of an int64 or float32 constant, with names."""
    if array.dtype == np.int64:
        for step in (-1, 1):
            for k in range(array.size):
                changed = array.copy()
                changed.reshape(-1)[k] += step
                yield f"[{k}] {step:+}", changed
    elif array.dtype == np.float32 and array.size <= SMALL:
        lowest = bool((array < -1e30).all())
        values = (-100.0, -1e4, -65504.0) if lowest else (0.0,)
        yield from ((f"= {value:g}", np.full_like(array, value)) for value in values)
        if not lowest:
            yield from ((f"* {f:g}", (array * np.float32(f)).astype(np.float32)) for f in (1.00001, 1.01, -1.0))
    elif array.dtype == np.float32:
        yield "in half precision", array.astype(np.float16).astype(np.float32)
        yield "* 1.00001", array * np.float32(1.00001)
        yield "one row on", np.roll(array, 1, 0)


def inserted(graph: Graph, index: int) -> Iterator[Mutant]:
    """An operation after the node."""
    node = graph.model.graph.node[index]
    for k, name in enumerate(node.output):
        kind, rank = graph.kind(name), graph.types.get(name, (0, 0))[1]
        for what, steps in INSERTED.get(kind, {}).items():
            if what == "heads swapped" and rank != 4:
                continue

            def change(model: Any, node: Any, k: int = k, steps: Steps = steps) -> None:
                _insert(model, node, k, steps)

            yield _on(index, f"{name} ({node.op_type}): {what}", change)


#: Operators with their attributes and further inputs.
Steps = tuple[tuple[str, Mapping[str, Any], tuple[NDArray[Any], ...]], ...]


def _float(*values: float) -> tuple[NDArray[Any], ...]:
    return tuple(np.array(value, np.float32) for value in values)


def _int(*values: int) -> tuple[NDArray[Any], ...]:
    return tuple(np.array(value, np.int64) for value in values)


INSERTED: Mapping[str, Mapping[str, Steps]] = {
    "float": {
        "clipped at 1e4": (("Clip", {}, _float(-1e4, 1e4)),),
        "clipped at 65504": (("Clip", {}, _float(-65504, 65504)),),
        "clipped at 10": (("Clip", {}, _float(-10, 10)),),
        "in half precision": (("Cast", {"to": 10}, ()), ("Cast", {"to": 1}, ())),
        "in bfloat16": (("Cast", {"to": 16}, ()), ("Cast", {"to": 1}, ())),
        "* 1.00001": (("Mul", {}, _float(1.00001)),),
        "negated": (("Neg", {}, ()),),
        "heads swapped": (("Gather", {"axis": 1}, (np.array([1, 0, 2]),)),),
    },
    "int": {
        "+ 1": (("Add", {}, _int(1)),),
        "- 1": (("Sub", {}, _int(1)),),
        "at most 30": (("Min", {}, _int(30)),),
        "at least 1": (("Max", {}, _int(1)),),
        "in half precision": (("Cast", {"to": 10}, ()), ("Cast", {"to": 7}, ())),
    },
    "other": {"negated": (("Not", {}, ()),)},
}


def _insert(model: Any, node: Any, k: int, steps: Steps) -> None:
    """Insert ``steps`` between a node's k-th output and whatever uses it."""
    import onnx

    name = node.output[k]
    index = next(i for i, each in enumerate(model.graph.node) if name in each.output)
    value = f"{name}.right"
    node.output[k] = value
    for number, (operator, fields, operands) in enumerate(steps):
        extra = [f"planted.{number}.{i}" for i in range(len(operands))]
        tensors = [onnx.numpy_helper.from_array(a, n) for a, n in zip(operands, extra, strict=True)]
        model.graph.initializer.extend(tensors)
        target = name if number == len(steps) - 1 else f"{name}.{number}"
        model.graph.node.insert(
            index + 1 + number, onnx.helper.make_node(operator, [value, *extra], [target], **fields)
        )
        value = target


def _one_element(name: str) -> Callable[[Any], None]:
    """One element of a weight, changed by a thousandth. The weight must be stored in the model."""

    def plant(model: Any) -> None:
        import onnx

        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[array.size // 2] *= 1.001
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))

    return plant


OPERATORS: tuple[Callable[[Graph, int], Iterator[Mutant]], ...] = (
    other_operators,
    attributes,
    other_inputs,
    bypassed,
    outputs_swapped,
    other_constants,
    inserted,
)
