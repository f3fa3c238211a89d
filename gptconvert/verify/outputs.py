"""Rule 2: a candidate's outputs are compared with the truth, in units of rounding noise.

Some failures need no figure and are checked first: a run that fails, a wrong shape or type, NaN, a past that is not
passed through, an output that ignores its input or depends on later tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from gptconvert.model.tensors import Array
from gptconvert.verify.metrics import EPSILON, UNDERFLOW, Errors, LogitSimilarity, Measure, pieces
from gptconvert.verify.packing import Row
from gptconvert.verify.probes import Integers, Probe
from gptconvert.verify.run_probes import ProbeResults
from gptconvert.verify.runners import Outputs, RunError
from gptconvert.verify.tasks import SHAPES, is_pooled, pooled_tokens, shape_of
from gptconvert.verify.truth import Truth, tensor_of
from reference_model.config import GPTConfig

CHUNKED = "chunked prefill"
#: If a group fails, the noise is measured again by this many yardsticks: one alone may be near the truth by chance.
YARDSTICKS = 8
#: The first tokens of each prompt that are compared with those of other prompts.
MOST_SHARED = 64


@dataclass
class Group:
    """Results of one probe group.

    Attributes:
        name: of the probe group.
        tokens: how many tokens were compared.
        measures: tensor name → figures.
        similarity: familiar measures of logits.
        problems: failures that need no figure.
        probes: probes of this group that were run whole.
    """

    name: str
    tokens: int = 0
    measures: dict[str, Measure] = field(default_factory=dict)
    similarity: LogitSimilarity = field(default_factory=LogitSimilarity)
    problems: list[str] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the group passes."""
        return not self.problems and all(measure.ok for measure in self.measures.values())

    def copy(self) -> Group:
        """A copy that can be extended on its own."""
        return dataclasses.replace(
            self,
            measures={name: dataclasses.replace(measure) for name, measure in self.measures.items()},
            similarity=dataclasses.replace(self.similarity),
            problems=[*self.problems],
            probes=[*self.probes],
        )

    def worst(self, *, presents: bool) -> Measure | None:
        """The measure closest to failing, among keys and values or among the task's outputs."""
        chosen = [m for m in self.measures.values() if m.tensor.startswith("present.") == presents]
        return max(chosen, key=lambda m: m.error_ratio, default=None)


def judge(
    answers: ProbeResults,
    compute: str,
    config: GPTConfig,
    groups: dict[str, Group],
    truth: Truth,
    measure_noise: Callable[[int], Truth],
) -> None:
    """Add a candidate's answers to ``groups``. If one fails, measure the noise properly and judge again.

    Args:
        answers: the candidate's results on the probes of ``truth``.
        compute: the candidate's computing type.
        config: the architecture.
        groups: results so far, by name; extended in place.
        truth: with the noise of one yardstick.
        measure_noise: number of yardsticks → the same truth with the noise of them all.
    """
    before = {name: group.copy() for name, group in groups.items()}
    OutputComparison(answers, compute, truth, config, groups).judge()
    earlier = {name for name, group in before.items() if not group.ok}
    if any(group.measures and not group.ok and name not in earlier for name, group in groups.items()):
        groups.clear()
        groups.update(before)
        OutputComparison(answers, compute, measure_noise(YARDSTICKS), config, groups).judge()


class OutputComparison:
    """Compares one candidate's answers with one truth.

    Args:
        answers: the candidate's results on the probes of ``truth``.
        compute: the candidate's computing type.
        truth: for the same probes.
        config: the architecture.
        groups: results so far, by name; extended in place.
    """

    def __init__(
        self, answers: ProbeResults, compute: str, truth: Truth, config: GPTConfig, groups: dict[str, Group]
    ) -> None:
        self.answers, self.compute, self.truth, self.config, self.groups = answers, compute, truth, config, groups
        self.prompts: list[tuple[Row, Array]] = []
        self.over_all: dict[str, tuple[float, float, float]] = {}

    def judge(self) -> None:
        """Add every answer to its groups."""
        for (probe, chunked), answer in self.answers.items():
            self._judge(probe, answer, chunked)
        for (a, first), (b, second) in pairwise(self.prompts):
            self._check_causality(a, first, b, second)

    def _judge(self, probe: Probe, answer: Outputs | RunError, chunked: bool) -> None:
        """Add one answer; row r of the batch counts for the probe's r-th group."""
        names = (CHUNKED,) * len(probe.groups) if chunked else probe.groups
        groups = [self.groups.setdefault(name, Group(name)) for name in names]
        rows = [row for row in self.truth.pack.rows if row.probe is probe]
        if chunked:
            rows = [row.beginning(sum(probe.chunks)) for row in rows]
        if isinstance(answer, RunError):
            problems = [f"the run failed: {answer}"]
        else:
            problems = list(faults(answer, rows[0].probe, self.config, self.compute))
        if not problems and isinstance(answer, Outputs):
            problems += self._constant(rows, answer)
        for group in groups:
            group.problems += [p for p in problems if p not in group.problems]
            group.probes += [probe] if not chunked and probe not in group.probes else []
        if problems or isinstance(answer, RunError):
            return
        output = next(iter(SHAPES[self.config.task]))
        for row in rows:
            self._count(row, answer, groups[row.row])
            if not chunked and probe.is_prompt(row.row) and not is_pooled(self.config, output):
                own = answer.named[output].reshape(*probe.input_ids.shape, -1)[row.row]  # (S, width)
                self.prompts.append((row, own[:MOST_SHARED]))

    def _constant(self, rows: Sequence[Row], answer: Outputs) -> Iterator[str]:
        """Yield the outputs that are constant, although the truth varies by more than noise.

        This names a fault that the figures would only measure.
        """
        for name, array in answer.named.items():
            if array.size > 1 and np.ptp(array) == 0:
                places = [row.tokens[self._places(name, row)] for row in rows]
                exact = self.truth.values[name][np.concatenate(places)]
                rms, _, noise = self._over_all(name)
                noise = max(noise, Measure(name, EPSILON[self.compute], UNDERFLOW[self.compute], rms).floor)
                if exact.numel() and float(exact.max() - exact.min()) > 100 * noise:
                    yield f"{name} is constant"

    def _places(self, name: str, row: Row) -> Integers:
        """Which of a row's real tokens have a row in this output: all, or the one that it is pooled from."""
        if not is_pooled(self.config, name):
            return np.arange(len(row.new))
        return np.flatnonzero(row.new == pooled_tokens(self.config, row.probe)[row.row])

    def _count(self, row: Row, outputs: Outputs, group: Group) -> None:
        """Add one row's real tokens to a group."""
        n, probe = len(row.new), row.probe
        group.tokens += n
        for name, array in outputs.named.items():
            if is_pooled(self.config, name):
                place = self._places(name, row)
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
        """Add a row's values [n, width] to a group; ``only`` selects the tokens they belong to."""
        tokens, truth = row.tokens[only], self.truth.values[name]
        if not len(tokens):
            return
        epsilon = EPSILON[self.compute]
        measure = group.measures.setdefault(name, Measure(name, epsilon, UNDERFLOW[self.compute]))
        typical, usual_rmse, usual_max = self._over_all(name)
        measure.typical = max(measure.typical, typical)
        measure.usual_rmse = max(measure.usual_rmse, usual_rmse)
        measure.usual_max = max(measure.usual_max, usual_max)
        own = self.truth.noise[name].at(tokens)
        noise = float(own.largest.max())
        for some in pieces(len(tokens), truth.shape[1]):
            candidate, exact = tensor_of(np.ascontiguousarray(values[some])), truth[tokens[some]]
            measure.add(Errors.of(candidate, exact), own.at(some), exact)
            if name == "logits" and exact.shape[1] > 1:
                group.similarity.add(candidate, exact, noise)

    def _over_all(self, name: str) -> tuple[float, float, float]:
        """Root mean square of a tensor's truth, rmse and largest error of its yardstick, over all these probes."""
        if name not in self.over_all:
            values, noise = self.truth.values[name], self.truth.noise[name]
            rms, rmse = (math.sqrt(float(x) / values.numel()) for x in (values.square().sum(), noise.square.sum()))
            self.over_all[name] = rms, rmse, float(noise.largest.max())
        return self.over_all[name]

    def _check_causality(self, a: Row, first: Array, b: Row, second: Array) -> None:
        """Outputs of two prompts must agree up to the first id that differs, and differ from there on."""
        n = min(len(first), len(second))
        differ = np.flatnonzero(a.probe.input_ids[a.row, :n] != b.probe.input_ids[b.row, :n])
        start = int(differ[0]) if len(differ) else n
        name = next(iter(SHAPES[self.config.task]))
        groups = [self.groups[row.probe.groups[row.row]] for row in (a, b)]
        noise = sum(group.measures[name].most for group in groups)
        changes, must_change, truth = np.empty(n), np.empty(n, bool), self.truth.values[name]
        for some in pieces(n, truth.shape[1]):
            changes[some] = np.abs(np.subtract(first[some], second[some], dtype=np.float64)).max(1)
            exact = [truth[row.tokens[some]] for row in (a, b)]
            must_change[some] = (exact[0] - exact[1]).abs().amax(1).numpy() > 100 * noise
        if changes[:start].max(initial=0) > noise:
            groups[1].problems.append("a token changes the outputs before it")
        if (changes <= noise)[must_change].any():
            groups[1].problems.append("the output does not depend on the input")


def faults(outputs: Outputs, probe: Probe, config: GPTConfig, compute: str) -> Iterator[str]:
    """Yield the problems of a run's outputs that need no figure."""
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
        elif array.dtype.name != compute:
            yield f"{name} has type {array.dtype}, expected {compute}"
        elif not np.isfinite(array).all():
            yield f"{name} has NaN or infinite values"
        elif name.startswith("present.") and not _passed_through(name, array, probe, config):
            yield f"{name} does not begin with the past"


def _passed_through(name: str, array: Array, probe: Probe, config: GPTConfig) -> bool:
    """Whether the first P tokens of a present equal the past, bit for bit."""
    if not probe.past_length:
        return True
    _, layer, part = name.split(".")
    past = probe.past(int(layer), config)[part == "value"]
    return bool(np.array_equal(array[:, :, : probe.past_length], past.astype(array.dtype)))
