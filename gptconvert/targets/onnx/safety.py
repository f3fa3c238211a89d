"""Checks the operators of an untrusted ONNX graph before any runtime loads it.

Every node passes or is named: in the main graph, in the branches of ``If``, and in the model's functions, called or
not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gptconvert.errors import InputError
from gptconvert.targets.calls import Body, call_problems, refuse
from gptconvert.targets.onnx.operators import ALLOWED

#: Deepest nesting of ``If``: onnxruntime's time to load a graph doubles with every level.
MOST_NESTED = 4
#: The call of the main graph in error messages and among functions.
MAIN = "the main graph"


def check_operators(model: Any, path: str) -> None:
    """Refuse a ModelProto unless it holds nothing but a model's mathematics.

    Raises:
        UnsafeInputError: it holds another operator, or expands without bound; all are listed.
    """
    refuse(list(_problems(model)), path, "onnxruntime")


def check_text(model: Any, path: str) -> None:
    """Refuse a ModelProto with text that is not UTF-8, which protobuf returns as bytes.

    Raises:
        InputError: a name or other text is not UTF-8.
    """
    pending = [model]
    while pending:
        for field_, value in pending.pop().ListFields():
            if field_.type not in (field_.TYPE_STRING, field_.TYPE_MESSAGE):
                continue
            values = [value] if isinstance(value, (str, bytes)) or hasattr(value, "ListFields") else value
            if field_.type == field_.TYPE_MESSAGE:
                pending += values
            elif wrong := [text for text in values if isinstance(text, bytes)]:
                raise InputError(
                    "is damaged", path=path, expected=f"UTF-8 in `{field_.name}`", found=repr(wrong[0])[:80]
                )


@dataclass
class _Nodes:
    """What a graph or function holds, its branches included."""

    count: int = 0
    calls: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _problems(model: Any) -> Iterator[str]:
    keys = [_key(function.domain, function.name, function) for function in model.functions]
    yield from (f"two functions named {key}" for key, count in Counter(keys).items() if count > 1)
    if model.training_info:
        yield "graphs for training"
    bodies: dict[str, Body] = {}
    parts = [(MAIN, model.graph.node), *((k, f.node) for k, f in zip(keys, model.functions, strict=True))]
    for key, nodes in parts:
        found, where = _Nodes(), key if key == MAIN else f"function {key}"
        _read_nodes(nodes, found, set(keys), where)
        bodies[key] = Body(found.count, found.calls)
        yield from found.problems
    yield from call_problems(bodies, [MAIN])


def _read_nodes(nodes: Any, found: _Nodes, functions: set[str], where: str, depth: int = 0) -> None:
    """Add nodes, and those of their branches."""
    found.count += len(nodes)
    if depth > MOST_NESTED:
        found.problems.append(f"branches nested more than {MOST_NESTED} levels, in {where}")
        return
    for node in nodes:
        key, shown = _key(node.domain, node.op_type, node), f"{node.name or ', '.join(node.output)!r}"
        if key in functions:
            found.calls.append(key)
        elif node.op_type not in ALLOWED.get(node.domain, ()):
            domain = f" of domain {node.domain}" if node.domain not in ("", "ai.onnx") else ""
            found.problems.append(f"operator {node.op_type}{domain} (node {shown}, in {where})")
        for attribute in node.attribute:
            inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            if inner and (node.op_type, node.domain) not in (("If", ""), ("If", "ai.onnx")):
                found.problems.append(f"attribute {attribute.name} with a graph (node {shown}, in {where})")
            for graph in inner:
                branch = f"{attribute.name} of {node.op_type} {shown}, in {where}"
                _read_nodes(graph.node, found, functions, branch, depth + 1)


def _key(domain: str, name: str, node: Any) -> str:
    """The name of a function, or of a node that could call it."""
    overload = getattr(node, "overload", "")
    return ":".join(filter(None, ("" if domain == "ai.onnx" else domain, name, overload)))
