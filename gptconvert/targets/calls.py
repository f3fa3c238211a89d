"""How much an untrusted graph with functions computes: their calls, expanded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptconvert.errors import UnsafeInputError

#: Largest number of nodes once all calls are expanded: ten times as many as the graph of the largest GPT.
MOST_NODES = 1_000_000
#: Deepest calls of functions within functions.
MOST_DEPTH = 32
#: Problems that one error lists.
MOST_SHOWN = 10


@dataclass(frozen=True)
class Body:
    """A function's size and calls.

    Attributes:
        nodes: number of nodes.
        calls: names of the functions that they call, once per call.
    """

    nodes: int
    calls: Sequence[str]


def call_problems(functions: Mapping[str, Body], roots: Sequence[str]) -> Iterator[str]:
    """Yield why the calls of ``functions`` are too many, too deep or recursive. Other names are ignored."""
    nodes: dict[str, int] = {}
    depth: dict[str, int] = {}
    active: set[str] = set()
    pending = [(name, False) for name in {**dict.fromkeys(roots), **functions} if name in functions]
    while pending:
        name, done = pending.pop()
        inner = [called for called in functions[name].calls if called in functions]
        if done:
            active.discard(name)
            nodes[name] = functions[name].nodes + sum(nodes[called] for called in inner)
            depth[name] = 1 + max((depth[called] for called in inner), default=0)
        elif name not in nodes:
            active.add(name)
            pending.append((name, True))
            for called in dict.fromkeys(inner):
                if called in active:
                    yield f"function {called} calls itself"
                    return
                if called not in nodes:
                    pending.append((called, False))
    total = sum(nodes[name] for name in roots if name in nodes)
    if total > MOST_NODES:
        yield f"its functions expand to {total} nodes, more than {MOST_NODES}"
    if (deepest := max(depth.values(), default=0)) > MOST_DEPTH:
        yield f"its functions call each other {deepest} levels deep, more than {MOST_DEPTH}"


def refuse(problems: Sequence[str], path: str, program: str) -> None:
    """Raise one error for all problems, if there are any.

    Args:
        problems: what was found.
        path: the graph file.
        program: that runs such graphs.

    Raises:
        UnsafeInputError: there are.
    """
    if problems:
        more = f"\n… {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise UnsafeInputError(
            "refused: the graph holds more than the mathematics of a model\n"
            + "\n".join(problems[:MOST_SHOWN])
            + more,
            path=path,
            hint=f"if you trust its author, run it in {program} itself",
        )
