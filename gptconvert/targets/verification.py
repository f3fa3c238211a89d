"""The gate: every export of a plan is compared with its checkpoint and needs a passing report of its own."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from gptconvert.errors import GptConvertError, InputError, OutputError, UsageError, VerificationError
from gptconvert.model.export import Export
from gptconvert.model.options import Level
from gptconvert.model.progress import Progress, Stage
from gptconvert.publish.source_reader import StoppedError
from gptconvert.targets.registry import target_named
from gptconvert.targets.target import Candidate, Target
from gptconvert.verify.background import in_background
from gptconvert.verify.evaluation import Evaluation
from gptconvert.verify.report import ArtifactReport, Report


def verify_exports(
    exports: Sequence[Export],
    directory: str,
    level: Level = "default",
    progress: Progress | None = None,
    *,
    seed: int = 0,
    evaluation: Evaluation | None = None,
    target_of: Callable[[str], Target] = target_named,
) -> Report:
    """Verify all planned exports from the files in ``directory``, with the probes of ``seed``.

    ``evaluation`` is what lossy exports are measured on.

    Raises:
        VerificationError: an export has no report.
        InputError: the checkpoint itself computes NaN, or a file cannot be read.
        UnsupportedError: an artifact cannot be run here.
    """
    candidates = [
        Candidate(
            e.target, os.path.normpath(os.path.join(directory, e.path)), e.path, e.checkpoint, e, seed, evaluation
        )
        for e in exports
    ]
    with _relative_to(directory):
        report = verify(candidates, level, progress, target_of=target_of)
    require_complete(exports, report)
    return report


def require_complete(exports: Sequence[Export], report: Report) -> None:
    """Check that every export has a report of its own.

    Raises:
        VerificationError: some have none; all of them are listed.
    """
    reported = {(found.kind, found.path) for found in report.artifacts}
    missing = [export for export in exports if (export.target, export.path) not in reported]
    if missing:
        raise VerificationError(
            f"not verified: {', '.join(export.path for export in missing)}",
            hint="nothing was published; this is a bug in gptconvert, so please report it",
        )


def verify(
    candidates: Sequence[Candidate],
    level: str = "default",
    progress: Progress | None = None,
    *,
    target_of: Callable[[str], Target] = target_named,
) -> Report:
    """Compare artifacts with the checkpoints they came from.

    A failed comparison does not raise: ``Report.passed`` is False.

    Args:
        candidates: the artifacts to verify.
        level: ``default``, or ``full``, with prompts as long as the context too.
        progress: receives stages.
        target_of: target name → target.

    Raises:
        InputError: an artifact cannot be read or loaded, or the checkpoint itself computes NaN.
        UsageError: no such level.
        UnsupportedError: an artifact's inputs or outputs are unknown.
        UnsafeInputError: an artifact refers to files outside its directory.
    """
    known: Mapping[str, Level] = {"default": "default", "full": "full"}
    if level not in known:
        raise UsageError("no such verification level", expected=" or ".join(known), found=level)
    stage = _stages(progress)

    def judge(candidate: Candidate, stage: Stage) -> ArtifactReport:
        started = time.monotonic()
        found = target_of(candidate.target).verify(candidate, known[level], stage)
        size = found.size
        if size is None and candidate.export is not None:
            size = sum(file.nbytes for file in candidate.export.files)
        return dataclasses.replace(found, seconds=time.monotonic() - started, size=size)

    # Comparing bytes waits for the disk, so it runs in the background while the other artifacts run.
    run = [c for c in candidates if target_of(c.target).runs] or list(candidates)
    rest = [c for c in candidates if c not in run]
    with in_background(lambda stop: [judge(candidate, _until(stop)) for candidate in rest]) as compared:
        found = dict(zip(map(id, run), [judge(candidate, stage) for candidate in run], strict=True))
        stage("comparing weights", 0)
        found |= dict(zip(map(id, rest), compared.result(), strict=True))
    report = Report(level, [found[id(candidate)] for candidate in candidates])
    _check_continuations(candidates, report, stage, target_of)
    return report


def _check_continuations(
    candidates: Sequence[Candidate], report: Report, stage: Stage, target_of: Callable[[str], Target]
) -> None:
    """Check each greedy continuation with the first artifact whose target can, if both have passed."""
    passed = [(c, found) for c, found in zip(candidates, report.artifacts, strict=True) if found.ok]
    judges = [(c, found, check) for c, found in passed if (check := target_of(c.target).check_continuation)]
    for _, found in passed:
        if found.greedy is not None and judges:
            judge, proof, check = judges[0]
            stage("comparing greedy continuations", 0)
            found.runs[0].groups.append(check(found.greedy, judge, proof.runs[0].groups))


def _until(stop: threading.Event) -> Stage:
    """A stage that shows no progress and raises StoppedError once ``stop`` is set."""

    def advance(count: int) -> None:
        if stop.is_set():
            raise StoppedError

    return lambda name, total: advance


def _stages(progress: Progress | None) -> Stage:
    def stage(name: str, total: int) -> Callable[[int], None]:
        if progress is None:
            return lambda count: None
        progress.stage(name, total)
        return progress.advance

    return stage


@contextmanager
def _relative_to(directory: str) -> Iterator[None]:
    """Make paths in errors relative to ``directory``: the staging directory means nothing to the user."""
    try:
        yield
    except GptConvertError as error:
        if isinstance(error, InputError) and isinstance(error.__cause__, OSError) and _is_inside(error, directory):
            found = OutputError(error.message, path=error.path, item=error.item, hint=error.hint)
            found.__cause__, error = error.__cause__, found  # it was written by this run
        for name in ("message", "path", "expected", "found", "hint"):
            text = getattr(error, name)
            if text is not None:
                setattr(error, name, text.replace(f"{directory}{os.sep}", "").replace(directory, "."))
        raise error


def _is_inside(error: GptConvertError, directory: str) -> bool:
    return error.path is not None and error.path.startswith(directory + os.sep)
