"""The onnxruntime process for graphs of unknown origin. Started by :mod:`.process`, never imported."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptconvert.kernels.library import import_onnxruntime
from gptconvert.targets.child.frames import Arrays
from gptconvert.targets.child.server import Command, serve
from gptconvert.targets.onnx.decoding import Decoding, DecodingInPlace
from gptconvert.targets.onnx.session import Settings, open_session, ort_value

#: Number → session, and the values lent to it, which it does not keep alive.
SESSIONS: dict[int, tuple[Any, Mapping[str, Any]]] = {}
DECODING: list[Decoding] = []
NUMBERS = itertools.count()

Answer = tuple[Mapping[str, object], Arrays]


def open_(request: Mapping[str, Any], arrays: Arrays) -> Answer:
    """Open a session on ``path``, or on the graph in the array ``content``; return its number.

    ``replaced`` maps the keys of further arrays to initializers.
    """
    lent = {
        name: ort_value(np.memmap(path, dtype, "r", offset, tuple(shape)), kind)
        for name, path, offset, dtype, shape, kind in request["lent"]
    }
    content = arrays["content"].tobytes() if "content" in arrays else None
    replaced = {name: ort_value(arrays[key], kind) for key, (name, kind) in request["replaced"].items()}
    number, settings = next(NUMBERS), Settings(**request["settings"])
    SESSIONS[number] = open_session(request["path"], content, settings, lent, replaced), {**lent, **replaced}
    return {"session": number}, {}


def run(request: Mapping[str, Any], arrays: Arrays) -> Answer:
    """Run a session; return the outputs in ``names``."""
    outputs = SESSIONS[request["session"]][0].run(request["names"], arrays)
    return {}, dict(zip(request["names"], outputs, strict=True))


def close(request: Mapping[str, Any], _: Arrays) -> Answer:
    """Free a session."""
    SESSIONS.pop(request["session"], None)
    return {}, {}


def start(request: Mapping[str, Any], _: Arrays) -> Answer:
    """Load the graph at ``path`` to generate text; return the names of its outputs."""
    session = open_session(request["path"], None, Settings(severity=3), {})
    DECODING[:] = [(DecodingInPlace if request["in_place"] else Decoding)(session)]
    return {"outputs": DECODING[0].outputs}, {}


def step(request: Mapping[str, Any], _: Arrays) -> Answer:
    """Logits [B, V] after the new ids ``rows``, which continue the rows ``parents`` of the step before."""
    return {}, {"logits": DECODING[0].step(request["rows"], request["parents"])}


def reset(_: Mapping[str, Any], __: Arrays) -> Answer:
    """Forget the ids of earlier steps."""
    DECODING[0].reset()
    return {}, {}


COMMANDS: Mapping[str, Command] = {
    "open": open_,
    "run": run,
    "close": close,
    "start": start,
    "step": step,
    "reset": reset,
}


if __name__ == "__main__":
    serve(COMMANDS, f"onnxruntime {import_onnxruntime().__version__}")
