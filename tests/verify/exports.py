"""Tiny exported models and ways to break them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.foreign import find_candidates
from gptconvert.targets.onnx.plan import plan
from gptconvert.targets.registry import target_named
from gptconvert.targets.target import Target, Verifier
from gptconvert.targets.verification import verify
from gptconvert.verify.report import Report
from tests.helpers import checkpoint_of, tiny_gpt2, write_planned


def tiny(directory: Path, seed: int = 0, *, dtype: Any = np.float32, start: int = 0, **config: object) -> Checkpoint:
    """A tiny checkpoint in a file, aligned as in most checkpoints unless ``start`` is odd."""
    raw, arrays = tiny_gpt2(seed, **config)
    directory.mkdir(exist_ok=True)
    return checkpoint_of(raw, {n: array.astype(dtype) for n, array in arrays.items()}, directory, start=start)


def export(directory: Path, checkpoint: Checkpoint, **options: Any) -> Path:
    """Write the ONNX files of a checkpoint; return the graph's path."""
    planned = plan(checkpoint, Options(**options))[0].files
    write_planned(directory, planned)
    return directory / planned[0].path


def altered(checkpoint: Checkpoint, **config: Any) -> Checkpoint:
    """The same weights under another configuration."""
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **config))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a graph file in place; leave its external data alone."""
    model = onnx.load_model(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def node(model: Any, output: str) -> Any:
    """The node that computes a value."""
    return next(n for n in model.graph.node if output in n.output)


def insert_after(model: Any, output: str, *nodes: Any) -> None:
    """Insert nodes after the one that computes ``output``."""
    at = next(i for i, n in enumerate(model.graph.node) if output in n.output)
    for offset, new in enumerate(nodes):
        model.graph.node.insert(at + 1 + offset, new)


def attribute(model: Any, output: str, name: str) -> Any:
    return next(a for a in node(model, output).attribute if a.name == name)


def with_verifiers(verifiers: Mapping[str, Verifier]) -> Callable[[str], Target]:
    """The registry with other verifiers for some targets."""
    planted = {name: dataclasses.replace(target_named(name), verify=each) for name, each in verifiers.items()}
    return lambda name: planted.get(name) or target_named(name)


def report_on(
    checkpoint: Checkpoint, path: Path, level: str = "default", verifiers: Mapping[str, Verifier] | None = None
) -> Report:
    """The report of ``gptconvert verify`` on the artifacts at ``path``."""
    return verify(find_candidates(checkpoint, str(path)), level, target_of=with_verifiers(verifiers or {}))
