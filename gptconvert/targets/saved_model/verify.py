"""Verifies our SavedModels by both rules: variables read back from the bundle, signatures run by TensorFlow.

TensorFlow runs in a process of its own. A SavedModel is a program: one of unknown origin is read as data first
(:mod:`.safety`), and runs with limits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from gptconvert.containers.tf_bundle import read_bundle
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Level
from gptconvert.model.progress import Stage
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import transpose
from gptconvert.publish.utf8_path import utf8_path
from gptconvert.targets.child.client import Limits
from gptconvert.targets.saved_model.contract import (
    XLA,
    inputs_of,
    outputs_of,
    signature_names,
)
from gptconvert.targets.saved_model.own_graph import OwnGraph, version_of
from gptconvert.targets.saved_model.plan import NAME
from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess
from gptconvert.targets.saved_model.runner import Run, SavedModelRunner
from gptconvert.targets.saved_model.safety import check_saved_model
from gptconvert.targets.saved_model.stress import run_with_stress_weights
from gptconvert.targets.target import Candidate
from gptconvert.verify.background import in_background
from gptconvert.verify.foreign import as_stored
from gptconvert.verify.probes import make_probes
from gptconvert.verify.report import ArtifactReport
from gptconvert.verify.runners import available_memory
from gptconvert.verify.weights import Pair, WeightReport, compare, difference, pairs_of
from reference_model.config import GPTConfig

PREFIX, SUFFIX = "weights/", "/.ATTRIBUTES/VARIABLE_VALUE"
#: Largest constant allowed in a graph: weights belong in variables.
MOST_CONSTANT_BYTES = 1 << 20
#: Memory that TensorFlow needs to load and run a model, as a multiple of its weights (measured: 1.35 at 6.2 GB).
MEMORY_FACTOR = 1.5


@dataclass(frozen=True)
class SavedModelVerifier:
    """Verifies a SavedModel directory.

    Attributes:
        process: starts TensorFlow; None for :class:`TensorFlowProcess`.
        free_memory: returns the available bytes of memory.
    """

    process: Callable[[], AbstractContextManager[TensorFlowProcess]] | None = None
    free_memory: Callable[[], int] = available_memory

    def __call__(self, candidate: Candidate, level: Level, stage: Stage) -> ArtifactReport:
        """The report on one directory.

        Raises:
            InputError: it cannot be read or loaded.
            UnsupportedError: TensorFlow is not installed, the variables have other names than ours, or they do not
                fit in memory.
            UnsafeInputError: its graph holds more than a model's mathematics, or exceeds its limits.
        """
        path, variables = candidate.path, read_variables(candidate.path)
        limits = None if candidate.export else limits_of(path, variables, candidate.checkpoint.config, level)
        checkpoint, weights, pairs, own = _weights(candidate, variables)
        report = ArtifactReport(NAME, candidate.shown_as, weights)
        compare(weights, pairs, stage("comparing weights", checkpoint.nbytes))
        if not weights.ok:
            return report
        require_memory(path, sum(tensor.nbytes for tensor in variables.values()), self.free_memory())
        with (
            self.process() if self.process else TensorFlowProcess(limits) as tensorflow,
            in_background(lambda stop: Loaded.from_file(tensorflow, path, own, stop)) as loading,
        ):
            run = _run(report, tensorflow, loading.result, checkpoint, level, candidate.seed, stage)
            loaded = loading.result()
            report.problems += loaded.differences
            report.notes += loaded.notes
            if run is not None and own is not None and loaded.notes and report.ok:
                run_with_stress_weights(report, run, checkpoint, own, list(loaded.description["signatures"]), level)
        return report


verify = SavedModelVerifier()


@dataclass(frozen=True)
class Loaded:
    """A loaded SavedModel.

    Attributes:
        description: see :func:`.worker.load`.
        differences: of its graph from the one that this version builds.
        notes: for the user, one sentence each.
    """

    description: Mapping[str, Any]
    differences: Sequence[str]
    notes: Sequence[str]

    @classmethod
    def from_file(
        cls, tensorflow: TensorFlowProcess, path: str, own: OwnGraph | None, stop: threading.Event
    ) -> Loaded:
        """Compare the graph with our own, if given, and load it.

        Raises:
            InputError: TensorFlow cannot load it.
            UnsafeInputError: it exceeds its limits.
        """
        try:
            with utf8_path(os.path.abspath(path)) as readable:
                differences, notes = own.compare(tensorflow, readable, stop) if own else ([], [])
                return cls(tensorflow.ask("load", stop, path=readable), differences, notes)
        except TensorFlowError as error:
            raise InputError("TensorFlow cannot load the SavedModel", path=path, found=error) from error


def limits_of(path: str, variables: Mapping[str, LazyTensor], config: GPTConfig, level: Level) -> Limits:
    """Check the graph of a SavedModel of unknown origin, and limit its runs.

    Raises:
        UnsafeInputError: it holds more than a model's mathematics.
        InputError: it cannot be read.
    """
    graph_bytes, weight_bytes = check_saved_model(path), sum(tensor.nbytes for tensor in variables.values())
    longest = max(
        probe.input_ids.size for probe in make_probes(config, kv_cache=True, free_positions=True, level=level)
    )
    return Limits.of(path, weight_bytes, graph_bytes, config, max(longest, config.n_ctx))


def _weights(
    candidate: Candidate, variables: Mapping[str, LazyTensor]
) -> tuple[Checkpoint, WeightReport, list[Pair], OwnGraph | None]:
    """The checkpoint as stored, the pairs to compare, and the graph to compare, unless it was just built."""
    checkpoint = candidate.checkpoint
    weights = WeightReport(len(checkpoint.weights))
    weights.problems += [
        f"{name}: not a weight of this model" for name in variables if name not in checkpoint.weights
    ]
    if candidate.export is not None:
        return checkpoint, weights, pairs_of(candidate.export, variables, weights), None
    checkpoint = as_stored(checkpoint, variables.values())
    weights.problems += [f"{name}: not in the SavedModel" for name in checkpoint.weights if name not in variables]
    found = {name: variables[name] for name in checkpoint.weights if name in variables}
    flipped = {name: _flipped(checkpoint.weights[name], tensor) for name, tensor in found.items()}
    pairs = [
        Pair(name, name, transpose(weight) if flipped[name] else weight, found[name])
        for name, weight in checkpoint.weights.items()
        if name in found
    ]
    version = version_of(candidate.path)
    own = OwnGraph(candidate.shown_as, version, candidate.checkpoint, found, flipped)
    return checkpoint, weights, pairs, own


def read_variables(path: str) -> dict[str, LazyTensor]:
    """Canonical name → stored tensor.

    Raises:
        InputError: the bundle cannot be read.
        UnsupportedError: its keys are not ours.
    """
    tensors = read_bundle(os.path.join(path, "variables", "variables"))
    unknown = [key for key in tensors if not (key.startswith(PREFIX) and key.endswith(SUFFIX))]
    if unknown:
        raise UnsupportedError(
            "this SavedModel was not written by gptconvert",
            path=path,
            expected=f"variables named {PREFIX}…",
            found=unknown[0],
        )
    bare = {key.removeprefix(PREFIX).removesuffix(SUFFIX): tensor for key, tensor in tensors.items()}
    return {name.replace("..", "."): tensor for name, tensor in bare.items()}  # TensorFlow doubles dots in keys


def require_memory(path: str, nbytes: int, free: int) -> None:
    """Raise :class:`UnsupportedError` if TensorFlow, which loads all variables, would run out of memory."""
    needed = int(MEMORY_FACTOR * nbytes)
    if free < needed:
        raise UnsupportedError(
            "the SavedModel is too large to load and verify on this machine",
            path=path,
            expected=f"{needed} bytes of memory",
            found=f"{free} bytes available",
            hint="verify it on a machine with more memory, or skip verification with --no-verify",
        )


def _flipped(weight: LazyTensor, found: LazyTensor) -> bool | None:
    """Whether a tensor is stored transposed; None if it equals its transpose.

    A square matrix may have either orientation: the outputs show how it is used.
    """
    if len(weight.shape) != 2:
        return False
    flipped = transpose(weight)
    if weight.shape != flipped.shape:
        return found.shape == flipped.shape
    if difference("", flipped, found):
        return False
    return True if difference("", weight, found) else None


def contract_problems(loaded: Mapping[str, Any], config: GPTConfig) -> Iterator[str]:
    """Yield the contract violations in a loaded model's description."""
    found: Mapping[str, Mapping[str, Any]] = loaded["signatures"]
    expected = signature_names(config, any(name.endswith(XLA) for name in found))
    yield from (f"no signature {name}" for name in expected if name not in found)
    yield from (f"signature {name} is not in the contract" for name in found if name not in expected)
    for name in (name for name in expected if name in found):
        for side, table in (("inputs", inputs_of(config, name)), ("outputs", outputs_of(config, name))):
            agreed = {key: [kind, list(shape)] for key, (kind, shape) in table.items()}
            if found[name][side] != agreed:
                wrong = [k for k in {**agreed, **found[name][side]} if agreed.get(k) != found[name][side].get(k)]
                shown = [f"{k} is {found[name][side].get(k)}, expected {agreed.get(k)}" for k in wrong]
                yield f"{side} of {name}: {'; '.join(shown)}"
    if loaded["largest_constant"] > MOST_CONSTANT_BYTES:
        yield f"the graph holds a constant of {loaded['largest_constant']} bytes"


def _run(
    report: ArtifactReport,
    tensorflow: TensorFlowProcess,
    loaded: Callable[[], Loaded],
    checkpoint: Checkpoint,
    level: Level,
    seed: int,
    stage: Stage,
) -> Run | None:
    """Rule 2: run all probes on the signatures with all inputs and outputs, then compare the others with these.

    The first truth is computed while TensorFlow starts and loads the model. Returns the run, to be repeated with
    other weights; None if it failed.
    """
    run = Run.of(SavedModelRunner(tensorflow, checkpoint.config), level, seed, stage)

    def keeps_contract() -> bool:
        stage("loading the SavedModel", 0)
        report.problems = list(contract_problems(loaded().description, checkpoint.config))
        return not report.problems

    found = run.report("TensorFlow", checkpoint, keeps_contract)
    if report.problems:
        return None
    report.probes = [probe.as_dict() for probe in run.probes]
    report.runs.append(found)
    if not found.ok:
        return None
    report.greedy = run.add_others(found, checkpoint, list(loaded().description["signatures"]))
    return run
