"""Fixtures in other programs' formats, and comparison of a checkpoint with its golden logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptconvert.families.registry import understand
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.sources.detect import open_source
from tests.helpers import FIXTURES, Arrays, tiny_gpt2, torch_weights

ORIGINALS = FIXTURES / "originals"
PLAIN = Options()


def opened(path: Path | str, options: Options = Options(), **more: Any) -> Checkpoint:  # noqa: B008
    """The checkpoint at a path, with its format detected."""
    options = dataclasses.replace(options, **more)
    return understand(open_source(path, options), options)


def golden(name: str) -> Any:
    """An array of the golden file."""
    with np.load(ORIGINALS / "golden.npz", allow_pickle=False) as found:
        return found[name]


def logits(checkpoint: Checkpoint, ids: Any = None) -> Any:
    """The reference model's float64 logits for ``ids``, or for the golden ids."""
    import torch

    from reference_model.model import GPT

    torch.set_num_threads(1)
    model = GPT.from_weights(checkpoint.config, torch_weights(checkpoint))
    with torch.no_grad():
        outputs, _ = model.outputs(torch.from_numpy(golden("ids") if ids is None else ids))
    return outputs["logits"].numpy()


def gap(checkpoint: Checkpoint, name: str) -> float:
    """Largest difference from the golden logits ``name``, relative to the largest of them."""
    expected = golden(name)
    return float(np.abs(logits(checkpoint) - expected).max() / np.abs(expected).max())


def gpt2_arrays(seed: int = 0, **config: object) -> tuple[Mapping[str, object], Arrays]:
    """A tiny GPT-2 (n_inner = 4 D): config.json, and arrays by transformers' names."""
    return tiny_gpt2(seed, n_inner=None, **config)


def same_weights(found: Checkpoint, expected: Checkpoint) -> bool:
    """Whether two checkpoints hold the same weights, bit for bit and in the same types."""
    return found.weights.keys() == expected.weights.keys() and all(
        np.ascontiguousarray(found.weights[n].read()).tobytes() == np.ascontiguousarray(w.read()).tobytes()
        and found.weights[n].dtype == w.dtype
        for n, w in expected.weights.items()
    )
