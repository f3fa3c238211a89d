"""Activations of the TensorFlow graph keep float32's accuracy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reference_model.config import ACTIVATIONS
from tests.helpers import ROOT

pytestmark = pytest.mark.tensorflow

#: From deep in both tails to the places where formulas cancel.
GRID = np.concatenate([np.linspace(-30, 30, 4001), [-100, -1e-6, 0, 1e-6, 100]]).astype(np.float32)
SCRIPT = """
import sys
import numpy as np, tensorflow as tf
from gptconvert.targets.saved_model.graph import ACTIVATION
x = tf.constant(np.load(sys.argv[1]))
values = tf.function(lambda x: {name: formula(x) for name, formula in ACTIVATION.items()})(x)
np.savez(sys.argv[2], **values)
"""


def test_accuracy(tmp_path: Path) -> None:
    """A few units in the last place of the result, or of the input if a formula multiplies it by a rounded gate."""
    import torch

    from reference_model.model import ACTIVATION

    np.save(tmp_path / "x.npy", GRID)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "x.npy"), str(tmp_path / "y.npz")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = dict(np.load(tmp_path / "y.npz"))
    assert set(found) == set(ACTIVATIONS)
    for formula, values in found.items():
        truth = ACTIVATION[formula](torch.from_numpy(GRID).double()).numpy()
        scale = np.maximum(np.maximum(np.abs(truth), np.abs(GRID)), 1)
        assert (np.abs(values - truth) <= 4 * 2.0**-23 * scale).all(), formula
