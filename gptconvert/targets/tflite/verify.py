"""Verifies a LiteRT file: its bytes by rule 1, its outputs in LiteRT by rule 2, and what it loses by rule 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptconvert.containers.tflite import TfliteModel, TfliteTensor, read_tflite
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.blocks import CODES, SCALES
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.int8 import Int8Rows
from gptconvert.model.options import Level
from gptconvert.model.progress import Stage
from gptconvert.model.tensors import Array, Computed, LazyTensor, Stored
from gptconvert.targets.child.client import Limits
from gptconvert.targets.saved_model.contract import inputs_of, outputs_of
from gptconvert.targets.saved_model.runner import Run, SavedModelRunner
from gptconvert.targets.target import Candidate
from gptconvert.targets.tflite.forms import CODES_SUFFIX, SCALES_SUFFIX, Form, signatures_of, stored_as
from gptconvert.targets.tflite.plan import NAME
from gptconvert.targets.tflite.process import LiteError, LiteProcess, require_litert
from gptconvert.targets.tflite.safety import check_model
from gptconvert.verify.background import half_the_cores
from gptconvert.verify.evaluation import Evaluation
from gptconvert.verify.probes import Probe, make_probes
from gptconvert.verify.quality import measurable, measure
from gptconvert.verify.report import ArtifactReport
from gptconvert.verify.run_probes import feeds_of
from gptconvert.verify.weights import Pair, WeightReport, compare
from reference_model.config import GPTConfig

#: Default limit of the mean KL divergence of 8-bit weights from the source, in nats per token.
MAX_KL = 0.05
#: Largest constant that is not a weight.
MOST_CONSTANT_BYTES = 1 << 20
#: Constants that the converter may leave out, because adding or multiplying by them changes nothing.
NEUTRAL = (0.0, 1.0)
#: Type and shape of an input or output; None for any size.
Description = tuple[str, tuple[int | None, ...]]
#: NumPy's name of the type of a stored matrix → the form.
FORMS: Mapping[str, Form] = {"float32": "f32", "float16": "f16", "int8": "int8"}


class LiteRunner(SavedModelRunner):
    """A loaded LiteRT file, whose signatures are those of the SavedModel."""

    program = "LiteRT"

    def __init__(self, process: LiteProcess, config: GPTConfig) -> None:
        super().__init__(process, config)  # type: ignore[arg-type]  # it has the one method that is called


def verify(candidate: Candidate, level: Level, stage: Stage) -> ArtifactReport:
    """The report on one file.

    Raises:
        InputError: it cannot be read or loaded; or the checkpoint itself computes NaN.
        UnsupportedError: LiteRT is not installed, or the file was not written by gptconvert.
        UnsafeInputError: a file of unknown origin holds more than a model's mathematics, or exceeds its limits.
    """
    require_litert()
    model = read_tflite(candidate.path)
    graph_bytes, found = check_model(model), named_constants(model)
    checkpoint = candidate.checkpoint
    if candidate.export is None:
        checkpoint = _as_found(candidate, found)
    report = ArtifactReport(NAME, candidate.shown_as, WeightReport(len(checkpoint.weights)))
    pairs = list(_pairs(checkpoint, found, report))
    compare(report.weights, pairs, stage("comparing weights", checkpoint.nbytes))
    report.weights.problems += _other_constants(model, checkpoint)
    if not report.weights.ok:
        return report
    checkpoint = _in_file(checkpoint, found)
    limits = None
    if candidate.export is None:
        longest = _longest(checkpoint, level, candidate.evaluation)
        limits = Limits.of(candidate.path, model.constant_bytes, graph_bytes, checkpoint.config, longest)
    with LiteProcess(limits) as process:
        _run(report, process, candidate, checkpoint, level, stage)
    return report


def named_constants(model: TfliteModel) -> dict[str, list[TfliteTensor]]:
    """Name → the constants of that name, of all graphs, each once."""
    found: dict[str, list[TfliteTensor]] = {}
    for tensor in (tensor for graph in model.graphs for tensor in graph.tensors if tensor.stored is not None):
        for name in tensor.name.split(";"):
            same = found.setdefault(name, [])
            if all((tensor.buffer, tensor.scales) != (other.buffer, other.scales) for other in same):
                same.append(tensor)
    return found


def _as_found(candidate: Candidate, found: Mapping[str, Sequence[TfliteTensor]]) -> Checkpoint:
    """The checkpoint with its weights as the types in the file say."""
    checkpoint = candidate.checkpoint
    if not found.keys() & checkpoint.weights.keys():
        raise UnsupportedError(
            "this LiteRT file was not written by gptconvert, or is of another model",
            path=candidate.path,
            expected=f"constants named {', '.join(list(checkpoint.weights)[:2])} …",
        )

    def form(name: str, shape: tuple[int, ...]) -> Form:
        dtype = found[name][0].dtype if name in found else None
        form = FORMS.get("" if dtype is None else dtype.name, "f32")
        return "f32" if len(shape) != 2 else form

    return stored_as(checkpoint, form)


def _pairs(
    checkpoint: Checkpoint, found: Mapping[str, Sequence[TfliteTensor]], report: ArtifactReport
) -> Iterator[Pair]:
    """Every constant that the file should have, with those that it has.

    Weights that the converter leaves out count as equal: their elements are all 0 or all 1.
    """
    omitted = 0
    for name, weight in checkpoint.weights.items():
        if name not in found:
            if _is_neutral(weight):
                omitted += 1
            else:
                report.weights.problems.append(f"{name}: not in the file")
            continue
        for tensor in found[name]:
            yield from _parts(name, weight, tensor, report.weights.problems)
        if isinstance(weight, Int8Rows):
            for tensor in found.get(f"{name}{CODES_SUFFIX}", ()):
                yield Pair(name, tensor.name, weight.codes, _stored(tensor))
            for tensor in found.get(f"{name}{SCALES_SUFFIX}", ()):
                yield Pair(name, tensor.name, weight.scales, _flat(_stored(tensor)))
    report.weights.equal += omitted


def _zeros(rows: int) -> LazyTensor:
    return Computed(lambda box: np.zeros(box[0].stop - box[0].start, np.int64), np.dtype(np.int64), (rows,))


def _parts(name: str, weight: LazyTensor, tensor: TfliteTensor, problems: list[str]) -> Iterator[Pair]:
    if not isinstance(weight, Int8Rows):
        yield Pair(name, name, weight, _stored(tensor))
        return
    yield Pair(name, f"{name}.{CODES}", weight.codes, _stored(tensor))
    if tensor.scales is None or tensor.zeros is None or tensor.axis != 0:
        problems.append(f"{name}: expected a scale and a code of zero for each row")
        return
    yield Pair(name, f"{name}.{SCALES}", weight.scales, tensor.scales)
    yield Pair(name, f"{name}.zeros", _zeros(weight.shape[0]), tensor.zeros)


def _stored(tensor: TfliteTensor) -> Stored:
    assert tensor.stored is not None  # constants only
    return tensor.stored


def _flat(stored: Stored) -> Stored:
    return Stored(stored.parts, stored.dtype, (stored.size,))


def _is_neutral(weight: LazyTensor) -> bool:
    return any(all(bool((chunk == value).all()) for chunk in weight.chunks()) for value in NEUTRAL)


def _other_constants(model: TfliteModel, checkpoint: Checkpoint) -> Iterator[str]:
    """Large constants that are not weights."""
    known = {name + end for name in checkpoint.weights for end in ("", CODES_SUFFIX, SCALES_SUFFIX)}
    for name, tensors in named_constants(model).items():
        for tensor in tensors:
            if _stored(tensor).nbytes > MOST_CONSTANT_BYTES and not known & {*tensor.name.split(";")}:
                yield f"{name}: a constant of {_stored(tensor).nbytes} bytes that is not a weight of this model"


def _in_file(checkpoint: Checkpoint, found: Mapping[str, Sequence[TfliteTensor]]) -> Checkpoint:
    """The checkpoint with 8-bit weights read from the file, which has been compared: they need no computing."""

    def read(name: str, weight: LazyTensor) -> LazyTensor:
        if not isinstance(weight, Int8Rows) or name not in found:
            return weight
        tensor = found[name][0]
        return dataclasses.replace(weight, codes=_stored(tensor), scales=tensor.scales or weight.scales)

    weights = {name: read(name, weight) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def _longest(checkpoint: Checkpoint, level: Level, evaluation: Evaluation | None) -> int:
    """Most tokens in one run."""
    probes = make_probes(checkpoint.config, kv_cache=True, free_positions=True, level=level)
    windows = evaluation.windows if evaluation is not None and measurable(checkpoint.config) else ()
    return max(checkpoint.config.n_ctx, *(probe.input_ids.size for probe in (*probes, *windows)))


def _run(
    report: ArtifactReport,
    process: LiteProcess,
    candidate: Candidate,
    checkpoint: Checkpoint,
    level: Level,
    stage: Stage,
) -> None:
    """Rules 2 and 3.

    LiteRT rounds the activations that it multiplies by 8-bit matrices, which no reference can reproduce. So rule 2
    runs the same bytes with these products in float32, and rule 3 judges the file as it is.
    """
    lossy = {name: weight for name, weight in checkpoint.weights.items() if isinstance(weight, Int8Rows)}
    signatures = _load(process, candidate, stage, float_products=bool(lossy))
    report.problems += contract_problems(signatures, checkpoint)
    if report.problems:
        return
    runner = LiteRunner(process, checkpoint.config)
    run = Run.of(runner, level, candidate.seed, stage)
    found = run.report("LiteRT on the CPU" + (", products in float32" if lossy else ""), checkpoint)
    report.probes = [probe.as_dict() for probe in run.probes]
    report.runs.append(found)
    evaluation = candidate.evaluation
    if report.proven and lossy and evaluation is not None and measurable(checkpoint.config):
        _load(process, candidate, stage)

        def logits(window: Probe) -> Array:
            return runner.run(feeds_of(window, checkpoint.config), False).named["logits"]

        advance = stage("measuring the quality", len(evaluation.windows))
        report.quality = measure(evaluation, logits, MAX_KL, lossy, advance)


def _load(
    process: LiteProcess, candidate: Candidate, stage: Stage, *, float_products: bool = False
) -> Mapping[str, Any]:
    """Load the file; returns its signatures.

    Raises:
        InputError: LiteRT refuses it.
    """
    stage("loading the LiteRT file", 0)
    try:
        return process.load(candidate.path, half_the_cores(), float_products=float_products)
    except LiteError as error:
        raise InputError("LiteRT cannot load the file", path=candidate.path, found=error) from error


def contract_problems(signatures: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    """Differences of the signatures from those of the SavedModel."""
    config, expected = checkpoint.config, signatures_of(checkpoint.config)
    yield from (f"no signature {name}" for name in expected if name not in signatures)
    yield from (f"signature {name} is not in the contract" for name in signatures if name not in expected)
    for name in (name for name in expected if name in signatures):
        for side, table in (("inputs", inputs_of(config, name)), ("outputs", outputs_of(config, name))):
            found = {key: (str(kind), tuple(shape)) for key, (kind, shape) in signatures[name][side].items()}
            wrong = [key for key in {**table, **found} if not _agree(table.get(key), found.get(key))]
            if wrong:
                shown = [f"{key} is {found.get(key)}, expected {table.get(key)}" for key in wrong]
                yield f"{side} of {name}: {'; '.join(shown)}"


def _agree(expected: Description | None, found: Description | None) -> bool:
    """Whether types and ranks are equal, and sizes where both are fixed: the converter knows fewer."""
    if expected is None or found is None or expected[0] != found[0] or len(expected[1]) != len(found[1]):
        return False
    return all(None in pair or pair[0] == pair[1] for pair in zip(expected[1], found[1], strict=True))
