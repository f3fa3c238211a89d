"""Documents of real runs, and of broken exports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx

from gptconvert.cli import run
from tests.commands import TINY

SOURCE = TINY / "hf-safetensors"
#: Figures of an export that fails in its last block.
FAULTY = "h.1.mlp.active"


def converted(directory: Path, *options: str) -> Path:
    """An export of the tiny GPT-2."""
    assert run(["hf", str(SOURCE), "-o", str(directory), "-q", *options]) == 0
    return directory


def broken(export: Path, directory: Path) -> Path:
    """A copy of an export whose second block has the other form of GELU."""
    shutil.copytree(export, directory)
    path = directory / "onnx" / "model.onnx"
    model = onnx.load_model(path, load_external_data=False)
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu" and "h.1." in node.output[0])
    next(a for a in gelu.attribute if a.name == "approximate").s = b"none"
    path.write_bytes(model.SerializeToString())
    return directory


def strict(schema: Any) -> Any:
    """The schema with no properties but those that it lists."""
    if isinstance(schema, dict):
        closed = {key: strict(value) for key, value in schema.items()}
        if "properties" in schema and schema.get("type") == "object":
            closed.setdefault("additionalProperties", False)
        return closed
    return [strict(each) for each in schema] if isinstance(schema, list) else schema


def valid(name: str, found: Any) -> Any:
    """``found``, once it satisfies the schema of that name and has no key that the schema does not list."""
    from jsonschema import Draft202012Validator

    from gptconvert.reporting.schemas import load

    Draft202012Validator(load(name)).validate(found)
    Draft202012Validator(strict(load(name))).validate(found)
    return found
