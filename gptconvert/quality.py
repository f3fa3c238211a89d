"""Measures how far ONNX graphs of any origin are from a checkpoint: what they lose, not whether they are right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptconvert.errors import GptConvertError, InputError, UnsupportedError
from gptconvert.inspection import open_checkpoint
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import PlannedFile
from gptconvert.model.options import Options, as_options
from gptconvert.model.progress import Progress, Silent
from gptconvert.targets.package.sidecars import with_special_ids
from gptconvert.targets.package.tokenizer import tokenizer_files
from gptconvert.targets.package.tokenizer_process import text_encoder

if TYPE_CHECKING:
    from gptconvert.verify.evaluation import Evaluation
    from gptconvert.verify.quality import Quality


@dataclass(frozen=True)
class Measured:
    """The quality of one graph.

    Attributes:
        path: of the graph, relative to the directory.
        size: of the graph and its weights in bytes.
        quality: the figures.
    """

    path: str
    size: int
    quality: Quality

    def __repr__(self) -> str:
        return f"<Measured {self.path!r}: {self.size} bytes, {self.quality.verdict}>"

    def as_dict(self) -> dict[str, object]:
        """Plain values, for ``--json``."""
        return {"path": self.path, "size": self.size, **self.quality.as_dict(figures=True)}


def measure_quality(
    artifact: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> list[Measured]:
    """Measure every ONNX graph of a directory, or one graph, against a checkpoint.

    Args:
        artifact: a directory or graph file, exported by any program.
        against: the checkpoint; None if the directory holds one too, such as ``model.safetensors``.
        options: how to open the checkpoint, and the text.
        progress: receives stages.

    Raises:
        InputError: the checkpoint, the text or a graph cannot be read.
        UnsupportedError: the directory has no ONNX graph, or a graph or task that cannot be measured.
    """
    from gptconvert.targets.foreign import find_candidates
    from gptconvert.targets.onnx.file import open_onnx
    from gptconvert.targets.onnx.quantised import measured
    from gptconvert.verify.quality import require_measurable

    options, artifact, progress = as_options(options), os.fsdecode(artifact), progress or Silent()
    checkpoint = with_special_ids(_checkpoint(artifact, against, options))
    require_measurable(checkpoint.config)
    graphs = [c for c in find_candidates(checkpoint, artifact) if c.target == "onnx"]
    files = [(candidate.shown_as, open_onnx(candidate.path)) for candidate in graphs]
    files = [(name, file) for name, file in files if not file.is_last_token]
    if not files:
        raise UnsupportedError("no ONNX graph to measure", path=artifact, expected="*.onnx or onnx/*.onnx")
    evaluation, found = evaluation_of(checkpoint, options), []
    for name, file in files:
        progress.stage(f"measuring {name}", len(evaluation.windows))
        figures = measured(file, evaluation, progress.advance)
        found.append(Measured(name, file.size, figures))
    return found


def _checkpoint(artifact: str, against: str | os.PathLike[str] | None, options: Options) -> Checkpoint:
    """The checkpoint to measure against."""
    if against is not None:
        return open_checkpoint(against, options)
    try:
        return open_checkpoint(artifact, options)
    except GptConvertError as error:
        raise InputError(
            f"no checkpoint to measure against: {error.message}",
            path=artifact,
            hint="pass the checkpoint that was exported: --against SOURCE",
        ) from error


def evaluation_of(checkpoint: Checkpoint, options: Options, package: Sequence[PlannedFile] = ()) -> Evaluation:
    """What lossy exports of a checkpoint are measured on.

    Args:
        checkpoint: the source.
        options: the options of the conversion.
        package: the planned files, one of which may be tokenizer.json; if none, it is made here.

    Raises:
        InputError: the text file cannot be read, is empty, too large or not UTF-8.
    """
    from gptconvert.verify.evaluation import Evaluation
    from gptconvert.verify.text import read_text

    files = {file.path: file.head for file in package} or tokenizer_files(checkpoint)[0]
    path = options.eval_text
    text = None if path is None else read_text(path)
    return Evaluation(checkpoint, text_encoder(files), text, path, options.max_kl)
