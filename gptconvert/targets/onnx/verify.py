"""Verifies one ONNX file by both rules."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from gptconvert.errors import InputError
from gptconvert.model.blocks import Quantised
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Level
from gptconvert.model.progress import Stage
from gptconvert.model.tensors import Array, LazyTensor
from gptconvert.publish.source_reader import StoppedError
from gptconvert.targets.onnx.contract import check_contract
from gptconvert.targets.onnx.file import OnnxFile, open_onnx
from gptconvert.targets.onnx.foreign import other_sizes, pair_up, unplanned, used_tensors
from gptconvert.targets.onnx.localise import first_bad_block
from gptconvert.targets.onnx.own_graph import graph_differences, is_rewritten, version_note
from gptconvert.targets.onnx.plan import NAME
from gptconvert.targets.onnx.quantised import (
    as_found,
    by_recipe,
    calibration_note,
    measured,
    recorded,
    with_float_activations,
)
from gptconvert.targets.onnx.runner import Binding, OnnxRunner, bind
from gptconvert.targets.rotary import rotary_tables
from gptconvert.targets.target import Candidate
from gptconvert.verify.background import half_the_cores, in_background, torch_threads
from gptconvert.verify.content import Match, match_by_content
from gptconvert.verify.evaluation import Evaluation
from gptconvert.verify.foreign import as_stored
from gptconvert.verify.heap import trim_heap
from gptconvert.verify.outputs import Group, judge
from gptconvert.verify.probes import Probe, make_probes, waves
from gptconvert.verify.quality import measurable
from gptconvert.verify.replacement import Replacement, kept_note, replacement
from gptconvert.verify.report import ArtifactReport, RunReport
from gptconvert.verify.run_probes import run_probes
from gptconvert.verify.runners import available_memory
from gptconvert.verify.stress import Setting, large_note, settings_of, stress_weights
from gptconvert.verify.truth import Truth, TruthPass
from gptconvert.verify.weights import Pair, WeightReport, compare, in_one_piece, pairs_of
from reference_model.config import GPTConfig

#: Up to this many bytes of weights, a model runs in a plain session, as a user would run it; that copies the weights.
SMALL_MODEL = 600 << 20
IN_PLACE, DEFAULT = "onnxruntime, weights in place", "onnxruntime, default options"
LENT = "onnxruntime, the source's weights in place (equal to the file's)"


@dataclass(frozen=True)
class OnnxVerifier:
    """Verifies one graph file and its external data.

    Weights are compared while the graph runs. A small model runs with the weights in the file; a large one with the
    source's, and its run counts only if the two prove equal: the source's are cached already, and reading a second
    copy into memory takes longer than all runs together.

    Attributes:
        small_model: up to this many bytes of weights, a model runs in a plain session, which copies them.
        runner: runs the graph.
        compare: compares weights.
    """

    small_model: int = SMALL_MODEL
    runner: type[OnnxRunner] = OnnxRunner
    compare: Callable[..., WeightReport] = compare

    def __call__(self, candidate: Candidate, level: Level, stage: Stage) -> ArtifactReport:
        """The report on one graph.

        Raises:
            InputError: the file cannot be read as a model.
            UnsupportedError: its inputs or outputs are unknown.
            UnsafeInputError: its external data is stored outside its directory, an operator does more than compute,
                or a run exceeds its limits.
        """
        file = open_onnx(candidate.path, confined=candidate.export is None)
        checkpoint, weights, pairs, match = _weights(candidate, file)
        if candidate.export is None and file.is_own and not recorded(file) and is_rewritten(file, checkpoint):
            file = dataclasses.replace(file, rewritten=True)
            checkpoint, weights, pairs, match = _weights(candidate, file)
        quantised = any(isinstance(weight, Quantised) for weight in checkpoint.weights.values())
        report = ArtifactReport(NAME, candidate.shown_as, weights, size=file.size)
        if candidate.export or file.is_own:
            report.problems = check_contract(file, checkpoint.config, not quantised and not file.is_in_place)
        if not weights.ok or report.problems:
            self.compare(weights, pairs, stage("comparing weights", checkpoint.nbytes))
            return report
        proven = with_float_activations(file) if quantised else file
        run_with = as_found(checkpoint, file.initializers) if quantised else checkpoint
        runs = self._run(report, proven, run_with, pairs, level, candidate.seed, stage)
        if candidate.export:
            runs.close()
        shares = file.is_last_token or file.is_in_place  # the weights of another graph, which is measured
        if quantised and report.ok and candidate.evaluation is not None and not shares:
            self._measure(report, file, candidate.evaluation, stage)
        if candidate.export:
            return report
        other = version_note(file, candidate.shown_as) if file.is_own else ["not our own"]
        if file.is_own:
            report.notes += [*other, *calibration_note(file, candidate.shown_as)]
            report.problems += [] if other else graph_differences(file, checkpoint)
        if file.rewritten:
            report.notes.append(f"{report.path}: another program rewrote the graph: its nodes were not compared")
        if report.ok and other and not quantised:
            self._stress(report, runs, match or match_by_content(used_tensors(file), checkpoint), level)
        return report

    def _stress(self, report: ArtifactReport, runs: Runs, match: Match, level: Level) -> None:
        """Rule 2 with stress weights, for a graph that is not known to be our own."""
        path, file, checkpoint = report.path, runs.file, runs.checkpoint
        if runs.binding.compute != "float32":
            report.notes.append(f"{path}: it was not run with stress weights, because it computes in half precision")
            return
        if file.weight_bytes > self.small_model and level != "full":
            report.notes.append(large_note(path, file.weight_bytes))
            return
        tensors = used_tensors(file)
        found = replacement(tensors, other_sizes(file, tensors), match, checkpoint)
        report.notes += kept_note(
            path,
            [name for name in found.kept if name not in report.weights.outputs_only],
            "the graph's tensors for them are not known for certain",
        )
        for setting in settings_of(checkpoint.config) if found.places else ():
            stressed = runs.with_weights(found, setting)
            try:
                run = stressed.run()
            except InputError:  # weights that were not replaced overflow
                report.notes.append(f"{path}: with {setting.name}, the weights that were kept overflow")
                continue
            stressed.locate_error(run)
            report.runs.append(run)
            stressed.session.close()
            if not run.ok:
                break

    def _run(
        self,
        report: ArtifactReport,
        file: OnnxFile,
        checkpoint: Checkpoint,
        pairs: Sequence[Pair],
        level: Level,
        seed: int,
        stage: Stage,
    ) -> Runs:
        """Check both rules at once."""
        with in_background(lambda stop: self.compare(report.weights, pairs, stop=stop)) as compared:
            small = file.weight_bytes <= min(self.small_model, available_memory() // 4)
            lent = None if small else in_one_piece(pairs)
            runs = Runs(file, checkpoint, lent, level, stage, runner=self.runner, seed=seed)
            report.probes = [probe.as_dict() for probe in runs.probes]
            run = runs.run()
            stage("comparing weights", 0)
            compared.result()
        if report.weights.ok:  # a run with the wrong weights proves nothing
            runs.locate_error(run)
            report.runs = [run]
        return runs

    def _measure(self, report: ArtifactReport, file: OnnxFile, evaluation: Evaluation, stage: Stage) -> None:
        """Rule 3, on the graph as it is shipped."""
        config = evaluation.checkpoint.config
        if not measurable(config):
            report.notes.append(f"{report.path}: quality is not measured for {config.task}")
            return
        stage("running the source model", 0)
        evaluation.source  # noqa: B018 - computed here, in a stage of its own
        advance = stage("measuring the quality", len(evaluation.windows))
        report.quality = measured(file, evaluation, advance, runner=self.runner)


verify = OnnxVerifier()


def _weights(candidate: Candidate, file: OnnxFile) -> tuple[Checkpoint, WeightReport, list[Pair], Match | None]:
    """The checkpoint as stored, and the pairs to compare: matched by plan, else by name, else by content.

    The last is the match by content, if that was necessary.
    """
    if file.is_last_token and not candidate.checkpoint.config.last_token:
        config = dataclasses.replace(candidate.checkpoint.config, last_token=True)
        candidate = dataclasses.replace(
            candidate, checkpoint=dataclasses.replace(candidate.checkpoint, config=config)
        )
    rotary = candidate.checkpoint.config.rotary
    tables = [table for pair in rotary_tables(rotary) for table in pair] if rotary else []
    if candidate.export is not None:
        report = WeightReport(len(candidate.checkpoint.weights))
        pairs = pairs_of(candidate.export, file.initializers, report)
        planned = {placed.name for placed in candidate.export.placed}
        report.problems += unplanned(file, planned, tables)
        return candidate.checkpoint, report, pairs, None
    if file.is_own:  # its tables may take more bytes than its weights
        names = candidate.checkpoint.weights.keys() & file.initializers.keys()
        checkpoint = by_recipe(candidate.checkpoint, file) or as_stored(
            candidate.checkpoint, [file.initializers[name] for name in names]
        )
        return checkpoint, *pair_up(file, checkpoint.weights, tables), None
    checkpoint = as_stored(candidate.checkpoint, file.initializers.values())
    match = match_by_content(used_tensors(file), candidate.checkpoint)
    weights = {**checkpoint.weights, **match.weights}
    return dataclasses.replace(checkpoint, weights=weights), match.report, [], match


class Runs:
    """Rule 2: runs the graph beside the truth, one wave of probes at a time, each on half of the cores.

    A small model runs in a plain session, with weights copied into the kernels' layout. A large one runs with its
    weights in place: a second copy would cost more than all runs together.

    Args:
        file: the checked file.
        checkpoint: weights as stored in it.
        lent: for a large model, weights to use instead of the file's, by name; None for a small model.
        level: selects the probes.
        stage: receives progress.
        runner: runs the graph.
        seed: of the probes.
    """

    def __init__(
        self,
        file: OnnxFile,
        checkpoint: Checkpoint,
        lent: Mapping[str, LazyTensor] | None,
        level: Level,
        stage: Stage,
        *,
        runner: type[OnnxRunner] = OnnxRunner,
        seed: int = 0,
    ) -> None:
        self.file, self.checkpoint, self.lent, self.stage, self.runner = file, checkpoint, lent, stage, runner
        self.config: GPTConfig = checkpoint.config
        self.replaced: Mapping[str, Array] = {}
        self.binding: Binding = bind(file, self.config)
        self.name = DEFAULT if lent is None else LENT if lent else IN_PLACE
        self.probes = make_probes(
            self.config,
            kv_cache=bool(self.binding.past),
            free_positions="position_ids" in self.binding.inputs,
            level=level,
            seed=seed,
        )

    def with_weights(self, found: Replacement, setting: Setting) -> Self:
        """The same probes and process, with stress weights."""
        other = copy.copy(self)
        shapes = {name: weight.shape for name, weight in self.checkpoint.weights.items()}
        other.checkpoint = found.checkpoint(self.checkpoint, stress_weights(self.config, shapes, setting))
        other.replaced = found.arrays(other.checkpoint)
        other.name = f"stress weights: {setting.name}"
        other.__dict__["session"] = self.session.with_weights(other.replaced)  # in place of the cached property
        return other

    def close(self) -> None:
        """Free the session, and return its memory to the system."""
        self.__dict__.pop("session", None)
        trim_heap()

    def run(self) -> RunReport:
        """Run all probes."""
        groups: dict[str, Group] = {}
        for wave in waves(self.probes):
            self._run_wave(wave, groups)
        return RunReport(self.name, list(groups.values()), stressed=bool(self.replaced))

    def locate_error(self, run: RunReport) -> None:
        """Record where the error of a failed run begins."""
        if not run.ok:
            self.stage("locating the error", 0)
            found = first_bad_block(self.file, self.binding, self.checkpoint, run.groups, self.replaced)
            if found is not None:
                run.first_bad, run.taps = found

    @functools.cached_property
    def session(self) -> OnnxRunner:
        """The session that runs beside the truth."""
        small = self.lent is None
        return self.runner(
            self.file,
            self.binding,
            self.config,
            prepack=small,
            lent=self.lent,
            threads=half_the_cores(),
            tokens=max(probe.input_ids.size for probe in self.probes),
        )

    def _run_wave(self, wave: Sequence[Probe], groups: dict[str, Group]) -> None:
        """Run one wave of probes; its truth, which may be large, is freed on return."""
        advance = self.stage(f"running {self.name}", len(wave))
        alone = threading.Event()
        with in_background(lambda stop: self._truth(wave, stop, alone)) as computed:
            answers = run_probes(self.session, wave, self.config, advance)
            alone.set()
            self.stage("computing the truth", 0)
            truth = computed.result()

        def measure_noise(yardsticks: int) -> Truth:
            self.stage("measuring the rounding noise", 0)
            return self._truth(wave, threading.Event(), alone, yardsticks)

        judge(answers, self.binding.compute, self.config, groups, truth, measure_noise)

    def _truth(
        self, wave: Sequence[Probe], stop: threading.Event, alone: threading.Event, yardsticks: int = 1
    ) -> Truth:
        """Compute the truth on half of the cores, and on all once ``alone`` is set."""
        with torch_threads() as use:

            def go_on(layers: int = 0) -> None:
                if stop.is_set():
                    raise StoppedError
                use(half_the_cores() * (2 if alone.is_set() else 1))

            go_on()
            presents = bool(self.binding.past)
            truth = TruthPass(self.checkpoint, wave, self.binding.compute, presents=presents, yardsticks=yardsticks)
            return truth.run(go_on)
