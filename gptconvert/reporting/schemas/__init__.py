"""JSON Schemas of every command's ``--json``, of ``manifest.json`` and of ``--report FILE.json``.

The files refer to ``common.json``; :func:`load` returns a schema with the definitions that it uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

#: Schemas in the order of ``gptconvert schema``.
NAMES = (
    "convert",
    "plan",
    "inspect",
    "verify",
    "quality",
    "generate",
    "batch",
    "web",
    "push",
    "formats",
    "version",
    "schema",
    "manifest",
    "report",
)
COMMON = "common"


def load(name: str) -> dict[str, Any]:
    """A schema that needs no other file; ``name`` is one of :data:`NAMES`."""
    schema, shared = _read(name), _read(COMMON)["$defs"]
    used: dict[str, Any] = {}
    wanted = [*_references(schema)]
    while wanted:
        definition = wanted.pop()
        if definition not in used:
            used[definition] = shared[definition]
            wanted += _references(shared[definition])
    text = json.dumps({**schema, "$defs": {key: used[key] for key in sorted(used)}} if used else schema)
    bundled: dict[str, Any] = json.loads(text.replace(f'"{COMMON}.json#/', '"#/'))
    return bundled


def _read(name: str) -> dict[str, Any]:
    text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _references(value: object) -> Iterator[str]:
    """Names of the definitions that a schema refers to."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "$ref":
                yield str(each).rpartition("/")[2]
            else:
                yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)
