"""Planted bugs: every mutation of every node of correct exports of all five families, which verification must find.

ONNX graphs and, in every fourth case, SavedModels (:mod:`.planted_saved_model`).
Each mutant is checked twice: as our own export, whose nodes are compared with those that this version builds, and as
another program's, of which only weights and outputs are known, with stress weights too. Allowed outcomes:

* ``caught by`` nodes, weights, outputs or stress weights;
* ``cannot run``: onnxruntime refuses it, or its inputs and outputs are no model's;
* ``equal``: it computes the same bits on random inputs, with the checkpoint's weights and with stress weights;
* ``equal but for rounding``: in float64 it computes the same, as a constant added to all scores does;
* ``too small to see``: it is one of those in :data:`TOO_SMALL`, for the reason given there.

A family's score is the share of mutants caught among those that run and are not equal.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from campaigns import planted_saved_model
from campaigns.correct import close_tensorflow, one_tensorflow
from campaigns.graph_mutations import Graph, Mutant, mutants
from campaigns.models import Model
from campaigns.planted_saved_model import EXACT, CorrectSavedModel
from campaigns.report import Case, Report
from gptconvert.errors import GptConvertError
from gptconvert.families.registry import family_named
from gptconvert.inspection import open_checkpoint
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.onnx import verify as onnx_verify
from gptconvert.targets.onnx.contract import check_contract
from gptconvert.targets.onnx.file import OnnxFile, open_onnx
from gptconvert.targets.onnx.foreign import pair_up
from gptconvert.targets.onnx.own_graph import graph_differences
from gptconvert.targets.onnx.plan import plan
from gptconvert.targets.onnx.runner import OnnxRunner, bind
from gptconvert.targets.saved_model import runner as tf_runner
from gptconvert.targets.target import Candidate
from gptconvert.verify.probes import Probe, make_probes
from gptconvert.verify.run_probes import whole
from gptconvert.verify.runners import Outputs, RunError
from gptconvert.verify.stress import settings_of, stress_weights
from gptconvert.verify.truth import TruthPass
from gptconvert.verify.weights import compare
from reference_model.config import GPTConfig, Rotary
from tests.helpers import write_planned

#: SavedModels are every so many-th case: TensorFlow takes ten times as long.
EVERY = 4
SIZES: Mapping[str, Any] = {
    "vocab_size": 97,
    "n_ctx": 40,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 56,
    "attn_scale": (8**-0.5,) * 2,
    "attn_window": (None, None),
}
#: Family → fields of its configuration beside those that all its models have.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gpt1": {"n_inner": 96},
    "gpt2": {"tied_head": False},
    "gpt_neo": {"attn_scale": (1.0, 1.0), "attn_window": (None, 5)},
    "gptj": {"rotary": Rotary(4, interleaved=True), "tied_head": False},
    "gpt_neox": {"rotary": Rotary(4), "residual": "parallel", "tied_head": False, "activation": "gelu_erf"},
}
#: End of a mutant's name → why outputs need not show it in the graph of another program.
TOO_SMALL: Mapping[str, str] = {
    "* 1.00001": "a part in 100,000 of a small part of a sum is below the limit of 4 roundings",
}


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Check mutants, in the order of the seed, until the time is over.

    Args:
        seed: of the order.
        seconds: wall time.
        start: number of the first mutant in that order.
        only: check this one alone.
    """
    report, end = Report("planted", seed, next=start), time.monotonic() + seconds
    if importlib.util.find_spec("tensorflow") is None:
        report.missing = ["SavedModels, which need TensorFlow"]
    with tempfile.TemporaryDirectory() as folder, remembered_truths(), one_tensorflow():
        bugs = Bugs(Path(folder), seed)
        for number in range(start, bugs.most) if only is None else (only,):
            if only is None and time.monotonic() > end:
                break
            bug = bugs[number]
            if bug is None:
                continue
            case = run_case(number, *bug)
            report.add(case)
            if not case.outcome.startswith(("equal", "cannot run")):
                counts = report.caught if case.outcome.startswith("caught") else report.missed
                counts[bug[0].scored_as(bug[1])] += 1
    close_tensorflow()
    return report


class Bugs:
    """The bugs of a seed by number: every :data:`EVERY`-th is one of a SavedModel, of each family in turn.

    SavedModels are exported when they are needed first: TensorFlow takes seconds to start.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        exports = [Correct.of(family, folder / family) for family in FAMILIES]
        self.checkpoints = {export.family: export.checkpoint for export in exports}
        self.onnx = in_order(exports, seed)
        self.most = len(self.onnx) * EVERY // (EVERY - 1)
        self.tensorflow: dict[str, CorrectSavedModel] = {}

    def __getitem__(self, number: int) -> tuple[Correct | CorrectSavedModel, Mutant] | None:
        """The export of a case and its bug; None without TensorFlow, or after the last bug."""
        turn, place = divmod(number, EVERY)
        if place < EVERY - 1:
            return self.onnx[number - turn] if number - turn < len(self.onnx) else None
        if importlib.util.find_spec("tensorflow") is None:
            return None
        index, which = divmod(turn, len(FAMILIES))
        family = list(FAMILIES)[which]
        if family not in self.tensorflow:
            folder = self.folder / "tf" / family
            self.tensorflow[family] = CorrectSavedModel.of(family, self.checkpoints[family], folder, self.seed)
        export = self.tensorflow[family]
        return (export, export.order[index]) if index < len(export.order) else None


def in_order(exports: Sequence[Correct], seed: int) -> list[tuple[Correct, Mutant]]:
    """All mutants of all exports, shuffled, so that any part of them is a sample."""
    found = [(export, mutant) for export in exports for mutant in mutants(export.graph)]
    random.Random(seed).shuffle(found)
    return found


def run_case(number: int, export: Correct | CorrectSavedModel, mutant: Mutant) -> Case:
    """Check one mutant."""
    started = time.process_time()
    check: Callable[[Any, Mutant], str] = (
        outcome_of if isinstance(export, Correct) else planted_saved_model.outcome_of
    )
    outcome = check(export, mutant)
    failed = outcome.startswith(("survived", "escaped"))
    return Case(
        number, f"{export.target}, {export.family}: {mutant.name}", outcome, time.process_time() - started, failed
    )


def outcome_of(export: Correct, mutant: Mutant) -> str:
    """What becomes of a mutant."""
    own = caught_as_own(export, mutant)
    try:
        found = caught_as_foreign(export, mutant)
    except Exception as error:  # anything but our own errors is a fault of the verifier
        return f"escaped: {type(error).__name__}: {str(error)[:200]}"
    if found == "nothing":
        if computes_the_same(export, mutant):
            return "equal"
        if exactly_equal(export, mutant):
            return "equal but for rounding"
        reason = next((why for end, why in TOO_SMALL.items() if mutant.name.endswith(end)), None)
        return f"too small to see: {reason}" if reason else "survived: as another program's"
    if found == "cannot run":
        return found
    return f"caught by {found}" if own else "survived: as our own"


@contextmanager
def remembered_truths() -> Iterator[None]:
    """Compute each truth once for all mutants of a model, and do not locate errors, which would take most time."""
    remembered = functools.partial(_Remembered, {})
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(onnx_verify, "first_bad_block", lambda *_: None))
        for module in (onnx_verify, tf_runner):
            stack.enter_context(mock.patch.object(module, "make_probes", functools.cache(make_probes)))
            stack.enter_context(mock.patch.object(module, "TruthPass", remembered))
        yield


@dataclass(frozen=True)
class Correct:
    """A correct export.

    Attributes:
        family: of the model.
        checkpoint: what it was made of.
        graph: its ModelProto, with the weights inside.
        folder: holds the file to verify.
        outputs: of the correct graph on random inputs, by name of the weights.
    """

    family: str
    checkpoint: Checkpoint
    graph: Graph
    folder: Path
    outputs: dict[str, list[Outputs | None]] = field(default_factory=dict)
    target = "onnx"

    @classmethod
    def of(cls, family: str, folder: Path) -> Correct:
        """Export a model with random weights."""
        fields = {**SIZES, **family_named(family).fixed, **FAMILIES[family]}
        config = GPTConfig(family=family, **fields)
        folder.mkdir()
        model = Model(list(FAMILIES).index(family), 0, config, "usual", np.dtype(np.float32), Options())
        return cls.made(family, open_checkpoint(model.write(folder / "source")), folder)

    @classmethod
    def made(cls, family: str, checkpoint: Checkpoint, folder: Path) -> Correct:
        """Export a checkpoint."""
        import onnx

        files = plan(checkpoint, Options())[0].files
        write_planned(folder / "out", files)
        loaded = onnx.load_model(folder / "out" / files[0].path)
        return cls(family, checkpoint, Graph.of(loaded, frozenset(checkpoint.weights)), folder)

    def scored_as(self, mutant: Mutant) -> str:
        """The score that a mutant counts for."""
        return f"onnx, {self.family}"

    def write(self, mutant: Mutant | None, producer: str | None = None) -> Path:
        """The file with a bug, by another producer if named."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.graph.model)
        if mutant is not None:
            mutant.plant(model)
        if producer is not None:
            model.producer_name = producer
        path = self.folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path


class SharedRunner(OnnxRunner):
    """Runs all mutants in this process: a process for each would take most of the time."""

    def _confined(self, tokens: int) -> Any:
        return None


def computes_the_same(export: Correct, mutant: Mutant) -> bool:
    """Whether a mutant gives the same bits as the correct graph, without optimisation, with all weights."""
    for name in ("", *(setting.name for setting in settings_of(export.checkpoint.config))):
        if name not in export.outputs:
            export.outputs[name] = list(outputs_of(export, None, name))
        pairs = zip(export.outputs[name], outputs_of(export, mutant, name), strict=True)
        if not all(_same_bits(right, wrong) for right, wrong in pairs):
            return False
    return True


def caught_as_own(export: Correct, mutant: Mutant) -> bool:
    """Whether the comparison with our own graph, contract and weights finds a bug."""
    try:
        file = open_onnx(str(export.write(mutant)))
    except GptConvertError:
        return True
    report, pairs = pair_up(file, export.checkpoint.weights)
    if check_contract(file, export.checkpoint.config) or not compare(report, pairs).ok:
        return True
    return any(True for _ in graph_differences(file, export.checkpoint))


def caught_as_foreign(export: Correct, mutant: Mutant) -> str:
    """What finds a bug in another program's graph; ``cannot run`` or ``nothing``."""
    path = export.write(mutant, "another exporter")
    verifier = onnx_verify.OnnxVerifier(runner=SharedRunner)
    try:
        report = verifier(Candidate("onnx", str(path), path.name, export.checkpoint), "default", _no_stage)
    except GptConvertError:
        return "cannot run"
    if not report.weights.ok or report.problems:
        return "weights"
    failed = [run for run in report.runs if not run.ok]
    if not failed:
        return "nothing"
    if all(p.startswith("the run failed") for group in failed[0].groups for p in group.problems or [""]):
        return "cannot run"
    return "stress weights" if failed[0].stressed else "outputs"


def _no_stage(name: str, total: int) -> Any:
    return lambda count: None


class _Remembered(TruthPass):
    """A truth that is computed once for all mutants of a model."""

    def __init__(
        self, truths: dict[Any, Any], checkpoint: Checkpoint, probes: Sequence[Probe], *rest: Any, **fields: Any
    ):
        content = hashlib.sha256()
        for weight in checkpoint.weights.values():
            content.update(np.ascontiguousarray(weight.read()).tobytes())
        self.key = (content.digest(), tuple(map(id, probes)), *rest, *sorted(fields.items()))
        self.truths, self.arguments = truths, (checkpoint, probes, rest, fields)

    def run(self, advance: Any = None) -> Any:
        """Compute the truth, or remember it."""
        if self.key not in self.truths:
            checkpoint, probes, rest, fields = self.arguments
            self.truths[self.key] = TruthPass(checkpoint, probes, *rest, **fields).run(advance)
        return self.truths[self.key]


def outputs_of(export: Correct, mutant: Mutant | None, setting: str) -> Iterator[Outputs | None]:
    """The outputs of a graph on random inputs; None where the run fails."""
    file = open_onnx(str(export.write(mutant)), confined=False)
    config = export.checkpoint.config
    runner = OnnxRunner(file, bind(file, config), config, optimise=False, threads=1)
    if setting:
        (chosen,) = (s for s in settings_of(config) if s.name == setting)
        runner = runner.with_weights(_arrays(file, export, chosen))
    for probe in _inputs(config):
        try:
            outputs = whole(runner, probe, config)
        except RunError:
            yield None
            continue
        new = probe.attention_mask[:, probe.past_length :].astype(bool)
        named = {name: array[new] for name, array in outputs.named.items()}
        yield Outputs(named, outputs.presents)


def _arrays(file: OnnxFile, export: Correct, setting: Any) -> dict[str, Any]:
    """Stress weights in the orientation of the file."""
    weights = export.checkpoint.weights
    values = stress_weights(export.checkpoint.config, {n: w.shape for n, w in weights.items()}, setting)
    _, pairs = pair_up(file, values)
    return {pair.name: np.ascontiguousarray(pair.expected.read()) for pair in pairs}


@functools.cache
def _inputs(config: GPTConfig) -> tuple[Probe, ...]:
    return make_probes(config, kv_cache=True, level="full", seed=20260101)


def _same_bits(a: Outputs | None, b: Outputs | None) -> bool:
    if a is None or b is None:
        return a is b
    pairs = [*zip(a.named.values(), b.named.values(), strict=True)]
    pairs += [
        (x, y)
        for first, second in zip(a.presents, b.presents, strict=True)
        for x, y in zip(first, second, strict=True)
    ]
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


def exactly_equal(export: Correct, mutant: Mutant) -> bool:
    """Whether a mutant computes the same in float64: then it differs by rounding alone."""
    config = export.checkpoint.config
    for setting in (None, *settings_of(config)):
        right, wrong = (_exact_outputs(export, each, setting) for each in (None, mutant))
        for a, b in zip(right, wrong, strict=True):
            if (
                b is None
                or a.shape != b.shape
                or not np.abs(a - b).max(initial=0) <= EXACT * np.abs(a).max(initial=0)
            ):
                return False
    return True


def _exact_outputs(export: Correct, mutant: Mutant | None, setting: Any) -> Iterator[Any]:
    """The outputs of a graph on random inputs in float64, of real tokens, in onnx's reference implementation."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    file, config = open_onnx(str(export.write(mutant))), export.checkpoint.config
    arrays = {} if setting is None else _arrays(file, export, setting)
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    for tensor in file.model.graph.initializer:
        if tensor.data_type == single:
            array = arrays.get(tensor.name, onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float64), tensor.name))
    for value in (*file.model.graph.input, *file.model.graph.output):
        kind = value.type.tensor_type
        kind.elem_type = double if kind.elem_type == single else kind.elem_type
    for attribute in (a for node in file.model.graph.node if node.op_type == "Cast" for a in node.attribute):
        attribute.i = double if attribute.i == single else attribute.i
    evaluator, binding = ReferenceEvaluator(file.model), bind_names(config)
    for probe in _inputs(config):
        feeds: dict[str, Any] = {
            name: getattr(probe, name) for name in ("input_ids", "attention_mask", "position_ids")
        }
        for layer, names in enumerate(binding):
            empty = np.zeros((len(probe.input_ids), config.n_head, 0, config.head_dim))
            pair = probe.past(layer, config) if probe.past_length else (empty, empty)
            feeds |= {name: array.astype(np.float64) for name, array in zip(names, pair, strict=True)}
        real = probe.attention_mask[:, probe.past_length :].astype(bool)
        try:
            logits, *presents = evaluator.run(None, feeds)
            yield logits[real]
        except Exception:  # numpy's, of any kind: onnxruntime allows what this implementation does not
            yield None
            return
        yield from presents


def bind_names(config: GPTConfig) -> list[tuple[str, str]]:
    """Names of the inputs for keys and values, by layer."""
    return [(f"past_key_values.{i}.key", f"past_key_values.{i}.value") for i in range(config.n_layer)]
