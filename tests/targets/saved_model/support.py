"""SavedModels for tests, written from their plans in the simplest way."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Placed, PlannedFile
from gptconvert.model.options import Options
from gptconvert.model.tensors import Transposed
from gptconvert.model.transforms import cast
from gptconvert.version import __version__
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import content


class Shared:
    """A TensorFlow process that outlives each ``with``, since importing TensorFlow is slow."""

    def __init__(self, process: Any) -> None:
        self.process = process

    def __call__(self, limits: object = None) -> Shared:
        return self

    def __enter__(self) -> Any:
        return self.process

    def __exit__(self, *error: object) -> None:
        pass


def crc32c(placed: Placed) -> int:
    value = 0
    for chunk in placed.tensor.chunks():
        value = google_crc32c.extend(value, chunk.tobytes())
    return value


def file_bytes(file: PlannedFile) -> bytes:
    data = content(file) if file.finish is None else file.finish(crc32c, threading.Event())
    assert len(data) == file.nbytes or (file.finish and len(data) < file.nbytes), f"{file.path}: {len(data)} bytes"
    return data


def write(directory: Path, files: Iterable[PlannedFile]) -> Path:
    """Write planned files; return the SavedModel's directory."""
    for file in files:
        path = directory / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_bytes(file))
    return directory / "saved_model"


def write_manifest(directory: Path) -> None:
    """A manifest that names this version, so that the graph of the SavedModel in ``directory`` is compared."""
    content = {"tool": {"name": "gptconvert", "version": __version__}, "targets": ["tf"]}
    (directory / "manifest.json").write_text(json.dumps(content))


def understood(case: Case, directory: Path, dtype: Any = None) -> Checkpoint:
    """A case's checkpoint, stored as ``dtype`` if one is given."""
    checkpoint = witness.checkpoint(case, directory, Options(task=case.task))
    if dtype is None:
        return checkpoint
    weights = {name: cast(weight, np.dtype(dtype)) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def transposed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every matrix of the layers stored transposed."""
    weights = {
        name: (weight.base if isinstance(weight, Transposed) else weight)
        for name, weight in checkpoint.weights.items()
    }
    for name, weight in checkpoint.weights.items():
        if name.startswith("h.") and len(weight.shape) == 2:
            array = np.ascontiguousarray(weight.read() if isinstance(weight, Transposed) else weight.read().T)
            stored = witness_tensor(array)
            weights[name] = stored if isinstance(weight, Transposed) else Transposed(stored)
    return dataclasses.replace(checkpoint, weights=weights)


def witness_tensor(array: Any) -> Any:
    from tests.helpers import computed_tensors

    return computed_tensors({"": array})[""]
