"""Runs all probes on a loaded SavedModel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Level
from gptconvert.model.progress import Stage
from gptconvert.targets.child.client import ChildError
from gptconvert.targets.saved_model.contract import POSITIONS, cache_names, inputs_of, outputs_of, signature_names
from gptconvert.targets.saved_model.process import TensorFlowProcess
from gptconvert.targets.saved_model.verify_signatures import check_other_signatures
from gptconvert.verify.greedy import Continuation
from gptconvert.verify.localise import from_groups
from gptconvert.verify.outputs import Group, judge
from gptconvert.verify.probes import Probe, default_positions, make_probes, waves
from gptconvert.verify.report import RunReport
from gptconvert.verify.run_probes import run_probes
from gptconvert.verify.runners import Feeds, Outputs, RunError, one_line
from gptconvert.verify.truth import Truth, TruthPass
from reference_model.config import CACHED_TASKS, GPTConfig


class SavedModelRunner:
    """A loaded SavedModel.

    Outputs come from ``serving_default`` if it takes the inputs, else from the signature that takes positions, else
    from ``decode``.
    """

    compute, program = "float32", "TensorFlow"

    def __init__(self, tensorflow: TensorFlowProcess, config: GPTConfig) -> None:
        self.tensorflow, self.config = tensorflow, config
        self.kv_cache, self.free_positions = config.task in CACHED_TASKS, True

    def run(self, feeds: Feeds, presents: bool) -> Outputs:
        """See :class:`~gptconvert.verify.runners.Runner`."""
        signature = self._signature(feeds)
        try:
            named = self._serving(signature, feeds) if signature else {}
            cache = self._decode(feeds, presents) if presents or not signature else {}
        except ChildError as error:
            raise RunError(one_line(error)) from error
        pairs = [(cache.pop(key), cache.pop(value)) for key, value in self._present_names(presents)]
        return Outputs(named or cache, tuple(pairs))

    def _signature(self, feeds: Feeds) -> str | None:
        """The signature that takes these inputs and returns no cache; None if ``decode`` alone takes them."""
        positions = default_positions(self.config.task, feeds.attention_mask, feeds.input_ids.shape[1])
        if feeds.past:
            return None
        if np.array_equal(positions, feeds.position_ids):
            return "serving_default"
        return POSITIONS if POSITIONS in signature_names(self.config) else None

    def _serving(self, signature: str, feeds: Feeds) -> dict[str, Any]:
        inputs = {name: getattr(feeds, name) for name in inputs_of(self.config, signature)}
        if self.config.task == "multiple-choice":
            inputs = {name: array[None] for name, array in inputs.items()}  # one question, B choices
        return self.tensorflow.run(signature, inputs)

    def _decode(self, feeds: Feeds, presents: bool) -> dict[str, Any]:
        inputs = {name: getattr(feeds, name) for name in ("input_ids", "attention_mask", "position_ids")}
        empty = np.zeros((len(feeds.input_ids), self.config.n_head, 0, self.config.head_dim), np.float32)
        past = feeds.past or [(empty, empty)] * self.config.n_layer
        for names, arrays in zip(cache_names(self.config, "past_key_values"), past, strict=True):
            inputs |= dict(zip(names, arrays, strict=True))
        wanted = [name for name in outputs_of(self.config, "decode") if presents or not name.startswith("present.")]
        return self.tensorflow.run("decode", inputs, tuple(wanted))

    def _present_names(self, presents: bool) -> list[tuple[str, str]]:
        return cache_names(self.config, "present") if presents else []


@dataclass(frozen=True)
class Run:
    """What runs on a SavedModel, with any weights.

    Attributes:
        runner: the loaded SavedModel.
        probes: all inputs of the signatures with all inputs and outputs.
        seed: of the inputs of the others.
        stage: receives progress.
    """

    runner: SavedModelRunner
    probes: tuple[Probe, ...]
    seed: int
    stage: Stage

    @classmethod
    def of(cls, runner: SavedModelRunner, level: Level, seed: int, stage: Stage) -> Self:
        """A run of the probes of a level and seed."""
        cache, positions = runner.kv_cache, runner.free_positions
        probes = make_probes(runner.config, kv_cache=cache, free_positions=positions, level=level, seed=seed)
        return cls(runner, probes, seed, stage)

    def report(
        self,
        name: str,
        checkpoint: Checkpoint,
        ready: Callable[[], bool] = lambda: True,
        *,
        stressed: bool = False,
    ) -> RunReport:
        """Run all probes and compare the outputs with the truth.

        Args:
            name: of the run.
            checkpoint: the weights that the SavedModel holds.
            ready: called once before the first probe runs, after its truth is computed; False ends the run.
            stressed: whether these are stress weights.
        """
        runner, config, stage = self.runner, checkpoint.config, self.stage
        groups: dict[str, Group] = {}
        for wave in waves(self.probes):
            advance = stage("computing the truth", config.n_layer)
            truth_pass = functools.partial(TruthPass, checkpoint, wave, runner.compute, presents=runner.kv_cache)
            truth = truth_pass().run(advance)
            if not groups and not ready():
                break
            answers = run_probes(runner, wave, config, stage(f"running {runner.program}", len(wave)))

            def measure_noise(yardsticks: int, truth_pass: Callable[..., TruthPass] = truth_pass) -> Truth:
                return truth_pass(yardsticks=yardsticks).run(stage("measuring the rounding noise", config.n_layer))

            judge(answers, runner.compute, config, groups, truth, measure_noise)
        run = RunReport(name, list(groups.values()), stressed=stressed)
        if not run.ok:
            run.first_bad = first_bad(run.groups, runner.kv_cache)
        return run

    def add_others(
        self, run: RunReport, checkpoint: Checkpoint, signatures: Sequence[str], *, thorough: bool = False
    ) -> Continuation | None:
        """Compare the other ``signatures`` with those of ``run``, which passed.

        ``thorough`` also checks what ``generate`` draws, and where it ends.

        Returns:
            the greedy continuation of ``generate``; None without one.
        """
        self.stage("running the other signatures", 0)
        tensorflow = self.runner.tensorflow
        others, greedy = check_other_signatures(
            tensorflow, checkpoint, signatures, run.groups, self.seed, thorough=thorough
        )
        run.groups.append(others)
        return greedy


def first_bad(groups: list[Group], kv_cache: bool) -> str | None:
    """The first layer whose keys or values leave the noise, as text; None if nothing was measured."""
    bad = {m.tensor for group in groups for m in group.measures.values() if not m.ok}
    presents = sorted((int(name.split(".")[1]), name) for name in bad if name.startswith("present."))
    if not presents:
        place = "the last block or the head" if kv_cache else "an unknown place: no keys or values to compare"
        return (from_groups(groups) or place) if bad else None
    layer, name = presents[0]
    return f"block {layer}, in {name}" + (
        f", or block {layer - 1} after its keys and values" if layer else ", or the embedding"
    )
