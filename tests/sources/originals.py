"""Shared by the tests of the original trainers' formats: fixtures and the reference model's logits for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.families import registry
from gptconvert.families.family import Family
from gptconvert.families.registry import understand
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.model.schemes import Scheme
from gptconvert.model.source import Source
from gptconvert.sources.detect import open_source
from tests.families import witness
from tests.helpers import FIXTURES

ORIGINALS = FIXTURES / "originals"
#: Rounding noise of the golden float32 logits, relative to the largest logit.
NOISE = 2e-6
#: Smallest difference that a planted bug must cause.
BUG = 1e-3


def copied(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(ORIGINALS / name, tmp_path / name))


def opened(path: str | Path, **options: Any) -> Source:
    """The source at ``path``, with its format detected."""
    return open_source(path, Options(**options))


def understood(path: str | Path, options: Options | None = None, **request: Any) -> Checkpoint:
    return understand(open_source(path, options or Options()), Options(**request))


def plant(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Scheme], Scheme]) -> None:
    """Replace the name table ``name`` for the duration of a test."""

    def changed(family: Family) -> Family:
        trainers = (replace(t, scheme=change(t.scheme)) if t.scheme.name == name else t for t in family.trainers)
        return replace(family, hf=change(family.hf) if name == "hf" else family.hf, trainers=tuple(trainers))

    families = tuple(changed(family) for family in registry.FAMILIES)
    monkeypatch.setattr(registry, "FAMILIES", families)


def difference(checkpoint: Checkpoint, golden: Path) -> float:
    """Largest difference of the reference model's logits from the golden ones, relative to the largest of them."""
    stored = np.load(golden / "golden.npz", allow_pickle=False)
    logits = witness.our_outputs(witness.reference(checkpoint), {"input_ids": stored["ids"]})["logits"]
    expected = stored["logits"]
    assert logits.shape[-1] == expected.shape[-1]
    return float(np.abs(logits[:, -expected.shape[1] :] - expected).max() / np.abs(expected).max())
