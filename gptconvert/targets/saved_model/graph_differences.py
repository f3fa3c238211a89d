"""Compares two SavedModel protobufs, node for node. Runs in the TensorFlow process.

TensorFlow numbers functions and captured values in the order in which a process traces them, so the numbers depend on
what the process traced before; their order does not. All else is deterministic.
Formats: see :mod:`.safety`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from itertools import islice
from typing import Any

#: Differences that are listed.
MOST = 100
#: Longest value shown, and the most numbers of a constant.
MOST_SHOWN, MOST_NUMBERS = 80, 16
#: Attribute with the name of an argument in Python; of captured values, a number.
ARGUMENT = "_user_specified_name"


def differences(expected: Any, found: Any) -> list[str]:
    """What differs between two SavedModels, as text; both are changed."""
    if len(found.meta_graphs) != 1:
        return [f"{len(found.meta_graphs)} graphs, expected 1"]
    return list(islice(_differences(expected, found), MOST))


def _differences(expected: Any, found: Any) -> Iterator[str]:
    a, b = expected.meta_graphs[0], found.meta_graphs[0]
    _rename(a, _new_names(_functions(a), _functions(b)))
    for meta in (a, b):
        _forget_numbers(meta)
    yield from _library(_functions(a), _functions(b))
    yield from _nodes("the main graph", a.graph_def.node, b.graph_def.node)
    yield from _entries("signature", a.signature_def, b.signature_def)
    objects = [dict(enumerate(meta.object_graph_def.nodes)) for meta in (a, b)]
    yield from _entries("object", *objects)
    yield from _entries("object", *(meta.object_graph_def.concrete_functions for meta in (a, b)))
    for meta in (a, b):  # compared above
        del meta.graph_def.node[:], meta.graph_def.library.function[:], meta.object_graph_def.nodes[:]
        meta.object_graph_def.concrete_functions.clear()
        meta.signature_def.clear()
    yield from _message("the SavedModel", expected, found)


def _functions(meta: Any) -> dict[str, Any]:
    return {function.signature.name: function for function in meta.graph_def.library.function}


def _new_names(expected: Iterable[str], found: Iterable[str]) -> Mapping[str, str]:
    """Names of functions that differ only in their numbers: expected → found."""
    ordered = [_by_stem(names) for names in (expected, found)]
    return {a: b for stem in ordered[0] for a, b in zip(ordered[0][stem], ordered[1][stem], strict=False)}


def _by_stem(names: Iterable[str]) -> Mapping[str, list[str]]:
    """Name without its number → full names, in the order of their numbers."""
    numbered: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in names:
        stem, _, number = name.rpartition("_")
        if number.isdecimal() and len(number) < 20:
            numbered[stem].append((int(number), name))
    return defaultdict(list, {stem: [name for _, name in sorted(pairs)] for stem, pairs in numbered.items()})


def _rename(meta: Any, names: Mapping[str, str]) -> None:
    """Rename functions where they are defined, called and listed."""
    library = meta.graph_def.library.function
    for function in library:
        function.signature.name = names.get(function.signature.name, function.signature.name)
    for node in (n for nodes in (meta.graph_def.node, *(f.node_def for f in library)) for n in nodes):
        for value in node.attr.values():
            for called in (*([value.func] if value.HasField("func") else ()), *value.list.func):
                called.name = names.get(called.name, called.name)
    for item in meta.object_graph_def.nodes:
        if item.HasField("bare_concrete_function"):
            bare = item.bare_concrete_function
            bare.concrete_function_name = names.get(bare.concrete_function_name, bare.concrete_function_name)
        for index, name in enumerate(item.function.concrete_functions if item.HasField("function") else ()):
            item.function.concrete_functions[index] = names.get(name, name)
    concrete = meta.object_graph_def.concrete_functions
    moved = {names.get(name, name): _copy(function) for name, function in concrete.items()}
    concrete.clear()
    for name, function in moved.items():
        concrete[name].CopyFrom(function)


def _copy(message: Any) -> Any:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _forget_numbers(meta: Any) -> None:
    """Remove the numbers of captured values."""
    for function in meta.graph_def.library.function:
        for argument in function.arg_attr.values():
            if ARGUMENT in argument.attr and argument.attr[ARGUMENT].s.isdigit():
                del argument.attr[ARGUMENT]


def _library(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    yield from _missing("function", expected, found)
    for name in (name for name in expected if name in found):
        a, b = _copy(expected[name]), _copy(found[name])
        _rename_arguments(a, b)
        if _bytes(a) != _bytes(b):
            yield from _nodes(f"function {name}", a.node_def, b.node_def)
            del a.node_def[:], b.node_def[:]
            yield from _message(f"function {name}", a, b)


def _rename_arguments(expected: Any, found: Any) -> None:
    """Rename arguments and results of ``expected`` as in ``found`` if their names differ only in numbers."""
    a, b = expected.signature, found.signature
    pairs = (*zip(a.input_arg, b.input_arg, strict=False), *zip(a.output_arg, b.output_arg, strict=False))
    names = {x.name: y.name for x, y in pairs if x.name != y.name and _unnumbered(x.name) == _unnumbered(y.name)}
    if not names:
        return
    for argument in (*a.input_arg, *a.output_arg):
        argument.name = names.get(argument.name, argument.name)
    for node in expected.node_def:
        node.input[:] = [names.get(name, name) for name in node.input]
    results = {names.get(key, key): names.get(value, value) for key, value in expected.ret.items()}
    expected.ret.clear()
    expected.ret.update(results)


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _nodes(where: str, expected: Any, found: Any) -> Iterator[str]:
    """Differences between the nodes of two graphs; names are unique within a graph."""
    a, b = ({node.name: node for node in nodes} for nodes in (expected, found))
    yield from (f"{where}, {missing}" for missing in _missing("node", a, b))
    for name in (name for name in a if name in b):
        if _bytes(a[name]) != _bytes(b[name]):
            yield from _node(f"{where}, node {name}", a[name], b[name])
    if a.keys() == b.keys() and [n.name for n in expected] != [n.name for n in found]:
        yield f"{where}: the nodes are in another order, or there are two of one name"


def _node(where: str, expected: Any, found: Any) -> Iterator[str]:
    described = [
        {"operator": n.op, "inputs": ", ".join(n.input), **{key: _value(n.attr[key]) for key in sorted(n.attr)}}
        for n in (expected, found)
    ]
    wrong = [key for key in {**described[0], **described[1]} if described[0].get(key) != described[1].get(key)]
    for key in wrong:
        before, after = (_short(each.get(key, "none")) for each in described)
        yield f"{where}, {key}: expected {before}, found {after}"
    if not wrong:
        yield from _message(where, expected, found)


def _value(attribute: Any) -> str:
    """An attribute as text: a constant's numbers, else its fields."""
    import tensorflow as tf

    if attribute.HasField("tensor"):
        try:
            array = tf.make_ndarray(attribute.tensor)
        except (TypeError, ValueError):
            return _text(attribute)
        return f"{array.dtype} {array!s}" if array.size <= MOST_NUMBERS else _text(attribute)
    return _text(attribute)


def _missing(kind: str, expected: Iterable[Any], found: Iterable[Any]) -> Iterator[str]:
    a, b = set(expected), set(found)
    yield from (f"{kind} {name}: missing" for name in sorted(a - b))
    yield from (f"{kind} {name}: unexpected" for name in sorted(b - a))


def _entries(kind: str, expected: MutableMapping[Any, Any], found: MutableMapping[Any, Any]) -> Iterator[str]:
    yield from _missing(kind, expected, found)
    for key in sorted(key for key in expected if key in found):
        yield from _message(f"{kind} {key}", expected[key], found[key])


def _message(where: str, expected: Any, found: Any) -> Iterator[str]:
    """The first difference between two messages, if there is one."""
    if _bytes(expected) == _bytes(found):
        return
    a, b = (_text(each).split("\n") for each in (expected, found))
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    before, after = (_short(lines[at].strip() if at < len(lines) else "nothing") for lines in (a, b))
    yield f"{where}: expected {before}, found {after if after != before else 'unknown fields'}"


def _text(message: Any) -> str:
    return str(message)


def _bytes(message: Any) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}…"
