"""Verification, a gate: every exported weight equals its source, every output the truth to within rounding noise."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gptconvert.checkpoint import Checkpoint
from gptconvert.errors import UnsupportedError, UsageError
from gptconvert.publish.source_reader import StoppedError
from gptconvert.verify.greedy import held_against_onnx
from gptconvert.verify.meanwhile import meanwhile
from gptconvert.verify.onnx_artifact import verify_onnx
from gptconvert.verify.openai_artifact import is_openai_folder, verify_openai
from gptconvert.verify.probes import Level
from gptconvert.verify.report import ArtifactReport, Report, Stage
from gptconvert.verify.safetensors_artifact import verify_safetensors
from gptconvert.verify.saved_model import verify_saved_model

__all__ = ["Artifact", "Progress", "Report", "find_artifacts", "verify"]


class Progress(Protocol):
    """Told what is going on, as in ``gptconvert.pipeline``."""

    def stage(self, name: str, total: int = 0) -> None: ...
    def advance(self, count: int) -> None: ...


@dataclass(frozen=True)
class Artifact:
    """Something to verify.

    Attributes:
        kind: ``onnx``, ``safetensors`` or ``openai-tf``.
        path: the graph file; the directory of the safetensors files and their config.json, or of OpenAI's files.
        shown_as: the path for reports, relative to what was asked for.
    """

    kind: str
    path: str
    shown_as: str


#: How each kind is verified.
VERIFIERS: Mapping[str, Callable[[Checkpoint, str, str, Level, Stage], ArtifactReport]] = {
    "onnx": verify_onnx,
    "safetensors": verify_safetensors,
    "tf": verify_saved_model,
    "openai-tf": verify_openai,
}
#: Kinds that nothing runs: they wait for the disk alone, and so are compared while others run.
COMPARED_ONLY = frozenset({"safetensors", "openai-tf"})
#: Files that announce safetensors weights.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


def find_artifacts(path: str) -> list[Artifact]:
    """What can be verified at a path: a graph file, or a directory and its ``onnx`` folder.

    Raises:
        UnsupportedError: nothing.
    """
    if not os.path.isdir(path):
        kind = "onnx" if path.endswith(".onnx") else "safetensors" if path.endswith(".safetensors") else None
        if kind == "onnx":
            return [Artifact(kind, path, os.path.basename(path))]
        if kind == "safetensors":
            return [Artifact(kind, os.path.dirname(path) or ".", os.path.basename(path))]
    found = []
    for folder in ("", "onnx"):
        names = sorted(os.listdir(os.path.join(path, folder))) if os.path.isdir(os.path.join(path, folder)) else []
        for name in names:
            shown = f"{folder}/{name}" if folder else name
            if name.endswith(".onnx"):
                found.append(Artifact("onnx", os.path.join(path, folder, name), shown))
            elif name in SAFETENSORS and not folder:
                found.append(Artifact("safetensors", path, shown))
    saved = [
        f for f in (os.path.join(path, "saved_model"), path) if os.path.isfile(os.path.join(f, "saved_model.pb"))
    ]
    found += [Artifact("tf", f, os.path.basename(os.path.abspath(f))) for f in saved]
    folders = [os.path.join(path, "openai-tf"), *([] if found else [path])]
    found += [Artifact("openai-tf", f, os.path.basename(f)) for f in folders if is_openai_folder(f)]
    if not found:
        raise UnsupportedError(
            "nothing here can be verified",
            path=path,
            expected=f"*.onnx, onnx/*.onnx, {' or '.join(SAFETENSORS)}, saved_model/",
        )
    return found


def verify(
    checkpoint: Checkpoint,
    artifacts: Sequence[Artifact],
    level: str = "default",
    progress: Progress | None = None,
) -> Report:
    """Hold artifacts against the checkpoint they came from.

    A failed gate is no exception: ``Report.passed`` is False.

    Args:
        checkpoint: weights as stored in the artifacts.
        artifacts: what to verify.
        level: ``default``, or ``full``: whole-length sequences too.
        progress: told about stages.

    Raises:
        InputError: an artifact is damaged beyond asking it anything, or the checkpoint itself computes NaN.
        UsageError: no such level.
        UnsupportedError: an artifact's inputs or outputs are not known.
        UnsafeInputError: an artifact refers to files outside its directory.
    """
    known: Mapping[str, Level] = {"default": "default", "full": "full"}
    if level not in known:
        raise UsageError("no such level of verification", expected=" or ".join(known), found=level)
    stage = _stages(progress)

    def judge(artifact: Artifact, stage: Stage) -> ArtifactReport:
        started = time.monotonic()
        found = VERIFIERS[artifact.kind](checkpoint, artifact.path, artifact.shown_as, known[level], stage)
        found.seconds = time.monotonic() - started
        return found

    run = [artifact for artifact in artifacts if artifact.kind not in COMPARED_ONLY] or artifacts
    rest = [artifact for artifact in artifacts if artifact not in run]
    with meanwhile(lambda stop: {artifact: judge(artifact, _until(stop)) for artifact in rest}) as compared:
        found = {artifact: judge(artifact, stage) for artifact in run}
        stage("comparing weights", 0)
        found |= compared.result()
    report = Report(level, [found[artifact] for artifact in artifacts])
    _compare_texts(checkpoint, artifacts, report, stage)
    return report


def _until(stop: threading.Event) -> Stage:
    """Stages that nobody is told of, and that end when ``stop`` is set."""

    def go_on(count: int) -> None:
        if stop.is_set():
            raise StoppedError

    return lambda name, total: go_on


def _compare_texts(checkpoint: Checkpoint, artifacts: Sequence[Artifact], report: Report, stage: Stage) -> None:
    """Hold what a SavedModel generated greedily against the first ONNX graph among the artifacts, if both passed."""
    passed = [(artifact, found) for artifact, found in zip(artifacts, report.artifacts, strict=True) if found.ok]
    graphs = [(artifact, found) for artifact, found in passed if artifact.kind == "onnx"]
    for _, found in passed:
        if found.greedy is not None and graphs:
            graph, proof = graphs[0]
            stage("comparing greedy continuations", 0)
            group = held_against_onnx(
                found.greedy, checkpoint.config, graph.path, graph.shown_as, proof.runs[0].groups
            )
            found.runs[0].groups.append(group)


def _stages(progress: Progress | None) -> Stage:
    """A stage begins: returns what is to be told of each step."""

    def stage(name: str, total: int) -> Callable[[int], None]:
        if progress is None:
            return lambda count: None
        progress.stage(name, total)
        return progress.advance

    return stage
