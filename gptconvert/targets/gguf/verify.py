"""Verifies a GGUF file: its bytes by rule 1, its outputs in llama.cpp by rule 2, and what it loses by rule 3."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.gguf import TYPES, GgufModel, read_gguf
from gptconvert.errors import install_hint
from gptconvert.families.trainers.gguf import OUTPUT, gguf_name
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.ggml import GgmlQuantised
from gptconvert.model.options import Level
from gptconvert.model.progress import Stage
from gptconvert.model.tensors import LazyTensor
from gptconvert.targets.gguf.foreign import check_model, metadata_problems
from gptconvert.targets.gguf.layout import ARCHITECTURES, Item, as_computed, in_file_order, items_of, stored_as
from gptconvert.targets.gguf.plan import NAME
from gptconvert.targets.gguf.predictions import compare_predictions
from gptconvert.targets.gguf.process import is_installed
from gptconvert.targets.target import Candidate
from gptconvert.verify.evaluation import Evaluation
from gptconvert.verify.probes import Probe
from gptconvert.verify.quality import measurable, measure
from gptconvert.verify.report import ArtifactReport
from gptconvert.verify.source_model import SourceModel
from gptconvert.verify.weights import Pair, WeightReport, compare

#: The package whose reader is a second witness of the bytes.
READER = "gguf"
#: Type of most matrices → default limit of the mean KL divergence from the source, in nats per token.
MAX_KL = {"Q8_0": 0.01, "Q5_0": 0.1, "Q4_0": 0.2}


def verify(candidate: Candidate, level: Level, stage: Stage) -> ArtifactReport:
    """The report on one model.

    Raises:
        InputError: a file cannot be read; or the checkpoint itself computes NaN.
        UnsupportedError: a file has tensors of types that are not compared.
        UnsafeInputError: a file of unknown origin exceeds its limits.
    """
    model = read_gguf(candidate.path)
    check_model(model, candidate.path)
    report = ArtifactReport(NAME, candidate.shown_as, WeightReport(len(candidate.checkpoint.weights)))
    checkpoint = _as_found(candidate, model, report)
    if not report.problems:
        report.problems = [*metadata_problems(checkpoint, model, planned=candidate.export is not None)]
        if candidate.export is not None and (level == "full" or not is_installed()):
            report.problems += _second_reading(model)
        pairs = _pairs(checkpoint, model, report.weights)
        compare(report.weights, [p for p in pairs if p.weight], stage("comparing weights", checkpoint.nbytes))
        zeros = compare(WeightReport(0), [pair for pair in pairs if not pair.weight])
        report.weights.problems += zeros.problems
    if report.problems or not report.weights.ok:
        return report
    checkpoint = _in_file(checkpoint, model)
    if not is_installed():
        report.computes = False
        report.notes.append(
            f"{candidate.shown_as}: its bytes were compared, but nothing ran it, because llama.cpp is not installed "
            f"({install_hint('gguf')})"
        )
    else:
        compare_predictions(report, checkpoint, model, candidate, level, stage)
    if report.proven and candidate.evaluation is not None:
        _measure(report, checkpoint, candidate.evaluation, stage)
    return report


def _as_found(candidate: Candidate, model: GgufModel, report: ArtifactReport) -> Checkpoint:
    """The checkpoint with its weights as stored: by plan, else by the types in the file."""
    if candidate.export is not None:
        return candidate.checkpoint
    checkpoint = candidate.checkpoint
    if checkpoint.config.family not in ARCHITECTURES:
        report.problems.append(f"llama.cpp has no graph for {checkpoint.config.family}")
        return checkpoint
    found = {name: tensor.type.name for name, tensor in model.tensors.items()}
    return stored_as(as_computed(checkpoint), lambda name, shape: _fitting(found.get(gguf_name(name), "F32"), shape))


def _fitting(kind: str, shape: tuple[int, ...]) -> str:
    """The type, or float32 if it has no form for this shape."""
    return "F32" if TYPES[kind].dtype is None and (len(shape) != 2 or shape[1] % TYPES[kind].block) else kind


def _pairs(checkpoint: Checkpoint, model: GgufModel, report: WeightReport) -> list[Pair]:
    """Every tensor that the file should have, with the one that it has; those of zeros belong to no weight."""
    expected = {item.name: item for item in items_of(checkpoint)}
    if OUTPUT in model.tensors and OUTPUT not in expected and checkpoint.config.tied_head:
        expected[OUTPUT] = dataclasses.replace(
            expected[gguf_name("wte.weight")], name=OUTPUT
        )  # llama.cpp's converter
    report.problems += [f"{name}: not in the file" for name in expected if name not in model.tensors]
    report.problems += [f"{name}: not a tensor of this model" for name in model.tensors if name not in expected]
    pairs = []
    for name, item in expected.items():
        if name in model.tensors and not (problem := _other_kind(item, model)):
            pairs.append(Pair(item.weight or "", name, item.tensor, model.tensors[name].stored))
        elif name in model.tensors:
            report.problems.append(problem)
    return pairs


def _other_kind(item: Item, model: GgufModel) -> str:
    """How a tensor's type or shape differs; empty if it does not."""
    found = model.tensors[item.name]
    if found.type != item.type:
        return f"{item.name}: expected type {item.type.name}, found {found.type.name}"
    if found.shape != item.shape:
        return f"{item.name}: expected shape {list(item.shape)}, found {list(found.shape)}"
    return ""


def _in_file(checkpoint: Checkpoint, model: GgufModel) -> Checkpoint:
    """The checkpoint with quantised weights read from the file, which has been compared: they need no computing."""

    def found(name: str, weight: LazyTensor) -> LazyTensor:
        if not isinstance(weight, GgmlQuantised) or in_file_order(checkpoint.config, name, weight) is not weight:
            return weight
        return dataclasses.replace(weight, encoded=model.tensors[gguf_name(name)].stored)

    weights = {name: found(name, weight) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def _second_reading(model: GgufModel) -> Iterator[str]:
    """Differences between this program's reading of the files and that of the gguf package, if it is installed.

    It takes seconds for a large vocabulary; llama.cpp, which reads the file too, takes less.
    """
    if importlib.util.find_spec(READER) is None:
        return
    from gguf import GGUFReader

    ours = {name: (t.type.number, t.shape, t.stored.nbytes, _places(t.stored)) for name, t in model.tensors.items()}
    theirs = {}
    for path in model.files:
        for tensor in GGUFReader(path).tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            place = ((path, int(tensor.data_offset)),) if tensor.n_bytes else ()
            theirs[tensor.name] = (int(tensor.tensor_type), shape, int(tensor.n_bytes), place)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: the gguf package reads {theirs.get(name)}, expected {ours.get(name)}"


def _places(stored: object) -> tuple[tuple[str, int], ...]:
    segments = stored.segments() or ()  # type: ignore[attr-defined]
    return tuple((segment.path, segment.offset) for segment in segments)


def _measure(report: ArtifactReport, checkpoint: Checkpoint, evaluation: Evaluation, stage: Stage) -> None:
    """Rule 3 for quantised weights: what they lose, computed with the weights as stored.

    llama.cpp was shown to compute the same; it predicts one position per request, which is too slow for a text.
    """
    quantised = {n: w for n, w in checkpoint.weights.items() if isinstance(w, GgmlQuantised)}
    if not quantised or not measurable(evaluation.checkpoint.config):
        return
    import torch

    stage("running the source model", 0)
    evaluation.source  # noqa: B018 - computed here, in a stage of its own
    stage("running the quantised model", 0)
    stored = SourceModel(checkpoint, evaluation.windows)

    def run(window: Probe) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = torch.cat([each for _, each in stored.logits(window)])[
            None
        ].numpy()  # (1, S, V)
        return logits

    limit = MAX_KL[_main_type(list(quantised.values()))]
    advance = stage("measuring the quality", len(evaluation.windows))
    report.quality = measure(evaluation, run, limit, quantised, advance)


def _main_type(weights: Sequence[GgmlQuantised]) -> str:
    """The type with the fewest bits."""
    return min((weight.format for weight in weights), key=lambda form: form.nbytes).name
