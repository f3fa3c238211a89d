"""Rule 1 for safetensors: the directory read back as a checkpoint, and compared with the one it came from.

A wrong config.json makes right weights compute wrong logits, so the configuration is compared too.
"""

from __future__ import annotations

import os

from gptconvert.checkpoint import Checkpoint
from gptconvert.errors import GptConvertError
from gptconvert.families import Request, family_named, understand
from gptconvert.mapping import tied_pairs
from gptconvert.sources import hf
from gptconvert.sources.source import OpenOptions, Source
from gptconvert.verify.probes import Level
from gptconvert.verify.report import ArtifactReport, Stage
from gptconvert.verify.weights import WeightReport, as_stored, compare

#: Configuration that changes no logits, and that formats without a place for it do not carry.
NOT_COMPARED = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})


def verify_safetensors(
    checkpoint: Checkpoint, path: str, shown_as: str, level: Level, stage: Stage
) -> ArtifactReport:
    """Verify the weights file ``shown_as`` of the directory ``path`` and the configuration beside it.

    Raises:
        InputError: the file or the configuration cannot be read.
    """
    source = hf.FORMAT.open(path, OpenOptions(weights_file=os.path.basename(shown_as)))
    report = ArtifactReport("safetensors", shown_as, WeightReport(len(checkpoint.weights)), computes=False)
    return compare_checkpoints(report, checkpoint, source, "config.json", stage)


def compare_checkpoints(
    report: ArtifactReport, checkpoint: Checkpoint, source: Source, says: str, stage: Stage
) -> ArtifactReport:
    """Compare a checkpoint with what was written of it and opened again.

    Args:
        report: filled in.
        checkpoint: the original.
        source: what was written.
        says: what the written configuration is read from, for messages.
        stage: told about progress.
    """
    try:
        found = understand(source, Request(task=checkpoint.config.task, n_head=_heads(checkpoint, source)))
    except GptConvertError as error:
        report.weights.problems = str(error).splitlines()
        return report
    ours, theirs = checkpoint.config.as_dict(), found.config.as_dict()
    report.problems = [
        f"{says}: {key} is {theirs[key]!r}, the checkpoint has {ours[key]!r}"
        for key in ours
        if key not in NOT_COMPARED and ours[key] != theirs[key]
    ]
    checkpoint = as_stored(checkpoint, found.weights.values())
    if report.problems:
        return report
    pairs = [(name, weight, found.weights[name]) for name, weight in checkpoint.weights.items()]
    scheme = family_named(found.config.family).scheme(source.scheme)
    repeated = tied_pairs(scheme, found.config, source.tensors, found.prefix)
    extra = [(name, checkpoint.weights[canonical], source.tensors[name]) for name, canonical in repeated]
    compare(report.weights, pairs, stage("comparing weights", checkpoint.nbytes))
    report.problems = compare(WeightReport(len(extra)), extra).problems
    return report


def _heads(checkpoint: Checkpoint, source: Source) -> int | None:
    """The number of heads, for a format without any configuration, which leaves it to whoever opens the files."""
    return None if source.config else checkpoint.config.n_head
