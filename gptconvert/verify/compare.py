"""Rule 2: a candidate runs every probe, and each of its outputs is held against the truth in units of noise.

What no figure can excuse comes first: a run that fails, a wrong shape or type, NaN, a past that is not passed
through, an output that does not depend on its input or depends on what comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from gptconvert.tensors import Array
from gptconvert.verify.metrics import EPSILON, Errors, Likeness, Measure
from gptconvert.verify.packing import Row
from gptconvert.verify.probes import Probe
from gptconvert.verify.runners import Feeds, Outputs, RunError, Runner
from gptconvert.verify.tasks import SHAPES, is_pooled, pooled_tokens, shape_of
from gptconvert.verify.truth import Truth, tensor_of
from reference_model.config import GPTConfig

CHUNKED = "chunked prefill"
#: Tokens whose outputs are compared at once: float64 logits of a long sequence are as large as a small model.
AT_ONCE = 64


@dataclass
class Group:
    """What was found about one kind of row.

    Attributes:
        name: of the probe group.
        tokens: how many tokens were compared.
        measures: tensor name → figures.
        likeness: what people ask about logits.
        problems: what needs no figure to be wrong.
        probes: the probes it comes from, as they were run whole.
    """

    name: str
    tokens: int = 0
    measures: dict[str, Measure] = field(default_factory=dict)
    likeness: Likeness = field(default_factory=Likeness)
    problems: list[str] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """The gate."""
        return not self.problems and all(measure.ok for measure in self.measures.values())

    def worst(self, *, presents: bool) -> Measure | None:
        """The measure nearest to failing, of keys and values or of the task's outputs."""
        chosen = [m for m in self.measures.values() if m.tensor.startswith("present.") == presents]
        return max(chosen, key=lambda m: m.badness, default=None)


class Trial:
    """One candidate against one truth.

    Args:
        runner: the candidate.
        truth: for the probes to run.
        config: the architecture.
        groups: found so far, by name; added to.
        answers: what the candidate already gave for some of the probes.
    """

    def __init__(
        self,
        runner: Runner,
        truth: Truth,
        config: GPTConfig,
        groups: dict[str, Group],
        answers: Mapping[Probe, Outputs] | None = None,
    ) -> None:
        self.runner, self.truth, self.config, self.groups = runner, truth, config, groups
        self.answers = answers or {}
        self.prompts: list[tuple[Row, Array]] = []
        self.first: tuple[Probe, Outputs] | None = None
        self.over_all: dict[str, tuple[float, float, float]] = {}

    def run(self, advance: Callable[[int], None] | None = None) -> None:
        """Run every probe, in every way it asks for. ``advance`` is told that one more is done."""
        for probe in dict.fromkeys(row.probe for row in self.truth.pack.rows):
            self._try(probe, probe.groups)
            if probe.chunks:
                self._try(probe, (CHUNKED,) * len(probe.groups), chunked=True)
            if advance is not None:
                advance(1)
        for (a, first), (b, second) in pairwise(self.prompts):
            self._check_causality(a, first, b, second)

    def _try(self, probe: Probe, names: Sequence[str], *, chunked: bool = False) -> None:
        """Run one probe in one way; row r of the batch counts for the group ``names[r]``."""
        groups = [self.groups.setdefault(name, Group(name)) for name in names]
        rows = [row for row in self.truth.pack.rows if row.probe is probe]
        if chunked:
            rows = [row.beginning(sum(probe.chunks)) for row in rows]
        try:
            outputs = self._outputs(probe, chunked)
            problems = list(faults(outputs, rows[0].probe, self.config, self.runner))
        except RunError as error:
            problems = [f"the runtime refused to run it: {error}"]
        for group in groups:
            group.problems += [p for p in problems if p not in group.problems]
            group.probes += [probe] if not chunked and probe not in group.probes else []
        if problems:
            return
        for row in rows:
            self._count(row, outputs, groups[row.row])
        output = next(iter(SHAPES[self.config.task]))
        if not chunked and probe.is_prompt and not is_pooled(self.config, output):
            self.prompts.append((rows[0], outputs.named[output].reshape(len(rows[0].new), -1)[:AT_ONCE].copy()))
        if not chunked and probe.is_prompt and probe.tokens == 1:
            self.first = probe, outputs

    def _outputs(self, probe: Probe, chunked: bool) -> Outputs:
        """What the candidate gives, unless it is known."""
        if not chunked:
            return self.answers.get(probe) or whole(self.runner, probe, self.config)
        start = probe.beginning(1)
        known = self.first is not None and np.array_equal(self.first[0].input_ids, start.input_ids)
        return in_chunks(self.runner, probe, self.config, self.first[1] if self.first and known else None)

    def _count(self, row: Row, outputs: Outputs, group: Group) -> None:
        """Count one row's real tokens in."""
        n, probe = len(row.new), row.probe
        group.tokens += n
        for name, array in outputs.named.items():
            if is_pooled(self.config, name):
                place = np.flatnonzero(row.new == pooled_tokens(self.config, probe)[row.row])
                values = array.reshape(len(probe.input_ids), 1, -1)[row.row][: len(place)]  # (0 or 1, width)
                self._measure(group, name, row, values, place)
            else:
                values = array.reshape(*probe.input_ids.shape, -1)[row.row][row.new]  # (n, width)
                self._measure(group, name, row, values)
        for i, pair in enumerate(outputs.presents):
            for part, present in zip(("key", "value"), pair, strict=True):
                new = present[row.row][:, probe.past_length + row.new]  # (H, n, hd)
                self._measure(group, f"present.{i}.{part}", row, new.transpose(1, 0, 2).reshape(n, -1))

    def _measure(self, group: Group, name: str, row: Row, values: Array, only: Array | slice = slice(None)) -> None:
        """Count values [n, width] of a row in; ``only`` picks the tokens they belong to."""
        truth, noise = self.truth.values[name][row.tokens][only], self.truth.noise[name]
        if not len(truth):
            return
        epsilon = EPSILON[self.runner.compute]
        measure = group.measures.setdefault(name, Measure(name, epsilon))
        typical, usual_rmse, usual_max = self._over_all(name)
        measure.typical = max(measure.typical, typical)
        measure.usual_rmse = max(measure.usual_rmse, usual_rmse)
        measure.usual_max = max(measure.usual_max, usual_max)
        square, largest = noise.square[row.tokens][only], noise.largest[row.tokens][only]
        for start in range(0, len(truth), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            candidate, exact = tensor_of(np.ascontiguousarray(values[some])), truth[some]
            measure.add(Errors.of(candidate, exact), Errors(square[some], largest[some]), exact)
            if name == "logits" and exact.shape[1] > 1:
                group.likeness.add(candidate, exact, float(largest.max()))

    def _over_all(self, name: str) -> tuple[float, float, float]:
        """Root mean square of a tensor's truth, rmse and largest error of the yardstick, over all these probes."""
        if name not in self.over_all:
            values, noise = self.truth.values[name], self.truth.noise[name]
            rms, rmse = (math.sqrt(float(x) / values.numel()) for x in (values.square().sum(), noise.square.sum()))
            self.over_all[name] = rms, rmse, float(noise.largest.max())
        return self.over_all[name]

    def _check_causality(self, a: Row, first: Array, b: Row, second: Array) -> None:
        """Two prompts that begin alike: outputs must be alike up to where the ids differ, and not from there on."""
        n = min(len(first), len(second))
        differ = np.flatnonzero(a.probe.input_ids[0, :n] != b.probe.input_ids[0, :n])
        start = int(differ[0]) if len(differ) else n
        name = next(iter(SHAPES[self.config.task]))
        groups = [self.groups[row.probe.groups[0]] for row in (a, b)]
        noise = sum(group.measures[name].most for group in groups)
        changes = np.abs(np.subtract(first[:n], second[:n], dtype=np.float64)).max(1)  # (n)
        exact = [self.truth.values[name][row.tokens][:n] for row in (a, b)]
        must_change = (exact[0] - exact[1]).abs().amax(1).numpy() > 100 * noise  # (n)
        if changes[:start].max(initial=0) > noise:
            groups[1].problems.append("a token changes the outputs before it")
        if (changes <= noise)[must_change].any():
            groups[1].problems.append("the output does not depend on the input")


def feeds_of(probe: Probe, config: GPTConfig) -> Feeds:
    """The arrays of a probe."""
    past = [probe.past(i, config) for i in range(config.n_layer)] if probe.past_length else []
    chosen = pooled_tokens(config, probe) if config.task == "multiple-choice" else None
    return Feeds(probe.input_ids, probe.attention_mask, probe.position_ids, past, chosen)


def whole(runner: Runner, probe: Probe, config: GPTConfig) -> Outputs:
    """Run a probe as it is."""
    return runner.run(feeds_of(probe, config), runner.kv_cache and probe.compare_presents)


def in_chunks(runner: Runner, probe: Probe, config: GPTConfig, first: Outputs | None = None) -> Outputs:
    """Run a probe piece by piece, each with the keys and values the candidate itself returned before.

    ``first`` is what it gave for the first token, if known.
    """
    feeds, start = feeds_of(probe, config), 0
    pieces: list[Outputs] = []
    if first is not None and first.presents and probe.chunks[0] == 1:
        pieces, start = [first], 1
    for size in probe.chunks[len(pieces) :]:
        stop = start + size
        now = slice(start, stop)
        past = pieces[-1].presents if pieces else ()
        mask = feeds.attention_mask[:, :stop]
        pieces.append(runner.run(Feeds(feeds.input_ids[:, now], mask, feeds.position_ids[:, now], past), True))
        start = stop
    named = {name: np.concatenate([piece.named[name] for piece in pieces], 1) for name in pieces[0].named}
    return Outputs(named, pieces[-1].presents if probe.compare_presents else ())


def faults(outputs: Outputs, probe: Probe, config: GPTConfig, runner: Runner) -> Iterator[str]:
    """What is wrong with a run's outputs before any figure is taken."""
    batch, new_tokens = probe.input_ids.shape
    total = probe.past_length + new_tokens
    shapes = {name: shape_of(config, name, batch, new_tokens) for name in outputs.named}
    arrays = dict(outputs.named)
    for i, pair in enumerate(outputs.presents):
        for part, array in zip(("key", "value"), pair, strict=True):
            arrays[f"present.{i}.{part}"] = array
            shapes[f"present.{i}.{part}"] = (batch, config.n_head, total, config.head_dim)
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            yield f"{name} has shape {list(array.shape)}, expected {list(shapes[name])}"
        elif array.dtype.name != runner.compute:
            yield f"{name} has type {array.dtype}, expected {runner.compute}"
        elif not np.isfinite(array).all():
            yield f"{name} has NaN or infinite values"
        elif name in outputs.named and array.size > 1 and np.ptp(array) == 0:
            yield f"{name} is constant"
        elif name.startswith("present.") and not _passed_through(name, array, probe, config):
            yield f"{name} does not begin with the past"


def _passed_through(name: str, array: Array, probe: Probe, config: GPTConfig) -> bool:
    """Whether the first P tokens of a present are the past, bit for bit."""
    if not probe.past_length:
        return True
    _, layer, part = name.split(".")
    past = probe.past(int(layer), config)[part == "value"]
    return bool(np.array_equal(array[:, :, : probe.past_length], past.astype(array.dtype)))
