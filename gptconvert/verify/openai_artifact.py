"""Rule 1 for OpenAI's own formats: the folder read back as anyone would read it, and compared with its source."""

from __future__ import annotations

import os

from gptconvert.checkpoint import Checkpoint
from gptconvert.sources import gpt1_npy, openai_tf
from gptconvert.sources.source import OpenOptions
from gptconvert.verify.probes import Level
from gptconvert.verify.report import ArtifactReport, Stage
from gptconvert.verify.safetensors_artifact import compare_checkpoints
from gptconvert.verify.weights import WeightReport

#: A file that every such folder has → how the folder is read.
FORMATS = {"params_shapes.json": gpt1_npy.FORMAT, "hparams.json": openai_tf.FORMAT, "checkpoint": openai_tf.FORMAT}


def is_openai_folder(path: str) -> bool:
    """Whether a directory holds OpenAI's files."""
    return any(os.path.isfile(os.path.join(path, name)) for name in FORMATS)


def verify_openai(checkpoint: Checkpoint, path: str, shown_as: str, level: Level, stage: Stage) -> ArtifactReport:
    """Verify the weights and sizes in the folder ``path``.

    Raises:
        InputError: it cannot be read.
    """
    form = next(form for name, form in FORMATS.items() if os.path.isfile(os.path.join(path, name)))
    source = form.open(path, OpenOptions())
    report = ArtifactReport("openai-tf", shown_as, WeightReport(len(checkpoint.weights)), computes=False)
    return compare_checkpoints(report, checkpoint, source, "hparams.json", stage)
