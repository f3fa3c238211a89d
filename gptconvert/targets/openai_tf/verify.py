"""Rule 1 for OpenAI's formats: read the folder back as a checkpoint, and compare it with the source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gptconvert.model.options import Level, Options
from gptconvert.model.progress import Stage
from gptconvert.sources import openai_gpt1, openai_tf
from gptconvert.sources.format import Format
from gptconvert.targets.openai_tf.plan import NAME
from gptconvert.targets.target import Candidate
from gptconvert.verify.read_back import compare_checkpoints
from gptconvert.verify.report import ArtifactReport
from gptconvert.verify.weights import WeightReport

#: File that identifies a format → the format.
FORMATS: Mapping[str, Format[Any]] = {
    "params_shapes.json": openai_gpt1.FORMAT,
    "hparams.json": openai_tf.FORMAT,
    "checkpoint": openai_tf.FORMAT,
}


def is_openai_folder(path: str) -> bool:
    """Whether a directory contains OpenAI's files."""
    return any(os.path.isfile(os.path.join(path, name)) for name in FORMATS)


def verify(candidate: Candidate, level: Level, stage: Stage) -> ArtifactReport:
    """Verify the weights and sizes in the folder.

    Raises:
        InputError: it cannot be read.
    """
    path, checkpoint = candidate.path, candidate.checkpoint
    found = next(form for name, form in FORMATS.items() if os.path.isfile(os.path.join(path, name)))
    report = ArtifactReport(NAME, candidate.shown_as, WeightReport(len(checkpoint.weights)), computes=False)
    return compare_checkpoints(
        report,
        checkpoint,
        found.open(path, Options()),
        "hparams.json",
        stage,
        planned=candidate.export is not None,
    )
