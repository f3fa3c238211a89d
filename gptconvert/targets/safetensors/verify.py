"""Rule 1 for safetensors: read the directory back as a checkpoint, and compare it with the source."""

from __future__ import annotations

import os

from gptconvert.model.options import Level, Options
from gptconvert.model.progress import Stage
from gptconvert.sources.hf import format as hf
from gptconvert.targets.safetensors.plan import NAME
from gptconvert.targets.target import Candidate
from gptconvert.verify.read_back import compare_checkpoints
from gptconvert.verify.report import ArtifactReport
from gptconvert.verify.weights import WeightReport


def verify(candidate: Candidate, level: Level, stage: Stage) -> ArtifactReport:
    """Verify a weights file, or a shard index and its shards, and the configuration beside it.

    Raises:
        InputError: the file or the configuration cannot be read.
    """
    directory, name = os.path.split(candidate.path)
    source = hf.FORMAT.open(directory or ".", Options(weights_file=name))
    report = ArtifactReport(NAME, candidate.shown_as, WeightReport(len(candidate.checkpoint.weights)), computes=False)
    return compare_checkpoints(
        report, candidate.checkpoint, source, "config.json", stage, planned=candidate.export is not None
    )
