"""The LiteRT process. Started by :mod:`.process`, never imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from gptconvert.targets.child.frames import Arrays
from gptconvert.targets.child.server import Command, serve
from gptconvert.targets.tflite.rewrite import with_float_products

PAST, PRESENT = "past_key_values", "present"
#: The loaded model, and the state of :func:`step`.
LOADED: dict[str, Any] = {}

Answer = tuple[Mapping[str, object], Arrays]


def load(request: Mapping[str, Any], _: Arrays) -> Answer:
    """Load the model at ``path``; return its signatures: inputs and outputs by name, as (type, shape).

    With ``float_products``, products with 8-bit matrices are computed in float32; without ``delegates``, XNNPACK is
    not used.
    """
    source: dict[str, Any] = {"model_path": request["path"]}
    if request["float_products"]:
        with open(request["path"], "rb") as file:
            source = {"model_content": with_float_products(file.read())}
    if not request["delegates"]:
        source["experimental_op_resolver_type"] = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(**source, num_threads=request["threads"])
    LOADED.clear()
    LOADED["runners"] = {name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()}
    described = {
        name: {"inputs": _described(runner.get_input_details()), "outputs": _described(runner.get_output_details())}
        for name, runner in LOADED["runners"].items()
    }
    return {"signatures": described}, {}


def _described(details: Mapping[str, Mapping[str, Any]]) -> dict[str, object]:
    return {
        name: (np.dtype(detail["dtype"]).name, [int(size) if size >= 0 else None for size in _sizes(detail)])
        for name, detail in details.items()
    }


def _sizes(detail: Mapping[str, Any]) -> Any:
    return detail["shape_signature"] if len(detail["shape_signature"]) else detail["shape"]


def run(request: Mapping[str, Any], inputs: Arrays) -> Answer:
    """The outputs of ``signature`` that are named in ``wanted``, or all."""
    results = LOADED["runners"][request["signature"]](**inputs)
    return {}, {name: results[name] for name in request["wanted"] or results}


def step(request: Mapping[str, Any], _: Arrays) -> Answer:
    """Feed ``rows`` to ``decode`` with the cache of the rows ``parents`` of the step before; return logits [B, V]."""
    decode, seen, rows = LOADED["runners"]["decode"], LOADED.get("seen", 0), request["rows"]
    details, total = decode.get_input_details(), seen + len(rows[0])
    if seen:
        past = {name: cache[request["parents"]] for name, cache in LOADED["past"].items()}
    else:
        past = {
            name: np.zeros((len(rows), _sizes(detail)[1], 0, _sizes(detail)[3]), np.float32)
            for name, detail in details.items()
            if name.startswith(f"{PAST}.")
        }
    feeds = {
        "input_ids": np.array(rows, np.int64),
        "attention_mask": np.ones((len(rows), total), np.int64),
        "position_ids": np.tile(np.arange(seen, total), (len(rows), 1)),
    }
    results = decode(**{name: array for name, array in feeds.items() if name in details}, **past)
    LOADED["past"] = {name: results[name.replace(PAST, PRESENT)] for name in past}
    LOADED["seen"] = total
    return {}, {"logits": results["logits"][:, -1]}


def reset(_: Mapping[str, Any], __: Arrays) -> Answer:
    """Forget the ids of earlier steps."""
    LOADED["seen"] = 0
    return {}, {}


COMMANDS: Mapping[str, Command] = {"load": load, "run": run, "step": step, "reset": reset}


if __name__ == "__main__":
    serve(COMMANDS, f"LiteRT {metadata.version('ai-edge-litert')}")
