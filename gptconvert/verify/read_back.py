"""Rule 1 for artifacts that are checkpoints: read back and compared with their source.

The configuration is compared too: with a wrong one, correct weights compute wrong logits.
"""

from __future__ import annotations

from gptconvert.errors import GptConvertError, is_unreadable
from gptconvert.families.registry import family_named, understand
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.model.progress import Stage
from gptconvert.model.resolution import tied_pairs
from gptconvert.model.source import Source
from gptconvert.verify.foreign import as_stored
from gptconvert.verify.report import ArtifactReport
from gptconvert.verify.weights import Pair, WeightReport, compare

#: Keys that do not affect logits and that some formats cannot store.
NOT_COMPARED = frozenset({"pad_token_id"})


def compare_checkpoints(
    report: ArtifactReport, checkpoint: Checkpoint, source: Source, location: str, stage: Stage, *, planned: bool
) -> ArtifactReport:
    """Compare a checkpoint with its export, read back.

    Args:
        report: filled in and returned.
        checkpoint: the original.
        source: the export.
        location: where the export's configuration is stored; used in error messages.
        stage: receives progress.
        planned: whether ``checkpoint`` has its weights as they should be stored; if not, their type is inferred.
    """
    try:
        found = understand(source, Options(task=checkpoint.config.task, n_head=_heads(checkpoint, source)))
    except GptConvertError as error:
        if is_unreadable(error):
            raise
        report.weights.problems = str(error).splitlines()
        return report
    expected, stored = checkpoint.config.as_dict(), found.config.as_dict()
    report.problems = [
        f"{location}: {key} is {stored[key]!r}, the checkpoint has {expected[key]!r}"
        for key in expected
        if key not in NOT_COMPARED and expected[key] != stored[key]
    ]
    checkpoint = checkpoint if planned else as_stored(checkpoint, found.weights.values())
    if report.problems:
        return report
    pairs = [Pair(name, name, weight, found.weights[name]) for name, weight in checkpoint.weights.items()]
    scheme = family_named(found.config.family).scheme(source.scheme)
    repeated = tied_pairs(scheme, found.config, found.source.tensors, found.prefix)
    extra = [
        Pair(canonical, name, checkpoint.weights[canonical], found.source.tensors[name])
        for name, canonical in repeated
    ]
    compare(report.weights, pairs, stage("comparing weights", checkpoint.nbytes))
    report.problems = compare(WeightReport(len(extra)), extra).problems
    return report


def _heads(checkpoint: Checkpoint, source: Source) -> int | None:
    """The number of heads, for formats without a configuration, which need it as an option."""
    return None if source.config else checkpoint.config.n_head
