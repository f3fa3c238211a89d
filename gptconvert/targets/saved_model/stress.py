"""Runs a loaded SavedModel with stress weights in place of the checkpoint's.

For one whose nodes are not compared: without our manifest, or of another version. All its weights are variables under
their names, so all can be replaced, but for matrices that equal their transposes: their orientation is unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Level
from gptconvert.model.tensors import Array
from gptconvert.targets.saved_model.own_graph import OwnGraph
from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess
from gptconvert.targets.saved_model.runner import Run
from gptconvert.verify.replacement import kept_note, representable
from gptconvert.verify.report import ArtifactReport
from gptconvert.verify.stress import MOST_STRESSED, Setting, large_note, settings_of, stress_weights


def run_with_stress_weights(
    report: ArtifactReport,
    run: Run,
    checkpoint: Checkpoint,
    own: OwnGraph,
    signatures: Sequence[str],
    level: Level,
) -> None:
    """Add a run for each setting to the report, up to the first that fails.

    Args:
        report: of the SavedModel, which has passed.
        run: what to repeat.
        checkpoint: as stored in the SavedModel.
        own: how its weights are stored.
        signatures: all that it has.
        level: of verification.

    Raises:
        InputError: its variables cannot be replaced.
        UnsafeInputError: the process exceeded its limits.
    """
    nbytes = sum(tensor.nbytes for tensor in own.stored.values())
    if nbytes > MOST_STRESSED and level != "full":
        report.notes.append(large_note(report.path, nbytes))
        return
    kept = [name for name, flipped in own.orientations.items() if flipped is None]
    report.notes += kept_note(report.path, kept, "they equal their transposes, so their orientation is unknown")
    for number, setting in enumerate(settings_of(checkpoint.config)):
        stressed = _with_stress_weights(checkpoint, own, setting)
        try:
            _assign(run.runner.tensorflow, stressed, own)
            found = run.report(f"stress weights: {setting.name}", stressed, stressed=True)
            if found.ok:
                run.add_others(found, stressed, signatures, thorough=number == 0)
        except TensorFlowError as error:
            raise InputError("TensorFlow cannot change the variables", path=report.path, found=error) from error
        except InputError:  # weights that were not replaced overflow
            report.notes.append(f"{report.path}: with {setting.name}, the weights that were kept overflow")
            continue
        report.runs.append(found)
        if not found.ok:
            break


def _with_stress_weights(checkpoint: Checkpoint, own: OwnGraph, setting: Setting) -> Checkpoint:
    """The checkpoint with stress weights, rounded to the types of the variables."""
    shapes = {name: weight.shape for name, weight in checkpoint.weights.items()}
    values = stress_weights(checkpoint.config, shapes, setting)
    replaced = {
        name: representable(value, own.stored[name].dtype.newbyteorder("="))
        for name, value in values.items()
        if own.orientations[name] is not None
    }
    return dataclasses.replace(checkpoint, weights={**checkpoint.weights, **replaced})


def _assign(tensorflow: TensorFlowProcess, checkpoint: Checkpoint, own: OwnGraph) -> None:
    """Give the variables the values in a checkpoint, one at a time: all at once would need twice the memory."""
    for name, flipped in own.orientations.items():
        if flipped is not None:
            tensorflow.assign(name, _oriented(checkpoint.weights[name].read(), flipped))


def _oriented(values: Array, flipped: bool) -> Array:
    """The values in float32, as stored."""
    return np.ascontiguousarray(values.T if flipped else values, np.float32)
