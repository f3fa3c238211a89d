"""Rule 3: how far a lossy export is from the source model, in the distributions that it predicts.

The measures are those of llama.cpp's ``--kl-divergence``: mean, 99.9 % and largest Kullback-Leibler divergence
KL(source ‖ export) in nats, agreement of the most likely token, and the perplexity of both. Perplexity alone says
little: it can improve while a quarter of the most likely tokens change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.errors import UnsupportedError
from gptconvert.model.tensors import CHUNK_BYTES, Array, LazyTensor
from gptconvert.verify.evaluation import Evaluation
from gptconvert.verify.probes import Integers, Probe
from gptconvert.verify.runners import RunError
from gptconvert.verify.tasks import shape_of
from reference_model.config import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor

#: Tasks whose output ``logits`` is a distribution over tokens or labels.
MEASURED_TASKS = ("text-generation", "text-classification", "token-classification")
#: How many layers, and how many weights, a failure names.
MOST_NAMED = 5


@dataclass(frozen=True)
class Figures:
    """How far an export is from its source.

    Attributes:
        kl_mean: mean KL divergence in nats.
        kl_high: 99.9 % of the positions have at most this.
        kl_max: largest.
        top1: share of positions where both find the same token most likely.
        top5: share where the source's most likely token is among the export's five.
        perplexity: (source, export), on the text; None for classifiers.
        positions: figures by position, in ranges that double; empty for pooled outputs.
    """

    kl_mean: float
    kl_high: float
    kl_max: float
    top1: float
    top5: float
    perplexity: tuple[float, float] | None
    positions: tuple[Position, ...] = ()


@dataclass(frozen=True)
class Position:
    """Figures of the predictions at a range of positions in the windows of text.

    Attributes:
        first: the first position.
        last: the last position.
        tokens: predictions compared.
        kl_mean: mean KL divergence in nats.
        top1: share of predictions where both find the same token most likely.
    """

    first: int
    last: int
    tokens: int
    kl_mean: float
    top1: float


@dataclass(frozen=True)
class Quality:
    """The quality of one export.

    Attributes:
        about: the text.
        tokens: positions compared.
        limit: largest mean KL divergence that passes; None for no limit.
        figures: what was measured; None if a run failed.
        problem: why a run failed; empty otherwise.
        layers: (layer or table, error relative to its rms), largest first, if the limit is missed.
        weights: the same per weight.
    """

    about: str
    tokens: int
    limit: float | None
    figures: Figures | None
    problem: str = ""
    layers: tuple[tuple[str, float], ...] = ()
    weights: tuple[tuple[str, float], ...] = ()

    @property
    def ok(self) -> bool:
        """The gate."""
        return self.figures is not None and (self.limit is None or self.figures.kl_mean <= self.limit)

    @property
    def verdict(self) -> str:
        """The figures on one line."""
        if self.figures is None:
            return f"not measured: {self.problem}"
        return f"mean KL {self.figures.kl_mean:.2g}, top-1 {self.figures.top1:.1%}{'' if self.ok else ', FAILED'}"

    def __repr__(self) -> str:
        return f"<Quality: {self.verdict}>"

    def as_dict(self, figures: bool) -> dict[str, object]:
        """Plain values; the figures differ in their last digits between machines, the rest does not."""
        rule: dict[str, object] = {"ok": self.ok, "max_kl": self.limit}
        if not figures:
            return rule
        measured = self.figures
        source, export = (measured and measured.perplexity) or (None, None)
        return {
            **rule,
            "text": self.about,
            "tokens": self.tokens,
            "problem": self.problem or None,
            "kl_mean": measured and measured.kl_mean,
            "kl_99_9": measured and measured.kl_high,
            "kl_max": measured and measured.kl_max,
            "top1": measured and measured.top1,
            "top1_in_top5": measured and measured.top5,
            "perplexity_source": source,
            "perplexity": export,
            "by_position": [dict(vars(each)) for each in measured.positions] if measured else [],
            "worst_layers": dict(self.layers),
            "worst_weights": dict(self.weights),
        }

    def lines(self) -> list[str]:
        """Lines of a table."""
        found = self.figures
        if found is None:
            return [f"  quality: not measured, because {self.problem}  FAIL"]
        limit = "" if self.limit is None else f" (limit {self.limit:g})"
        perplexity = "" if found.perplexity is None else ", perplexity {:.4g} → {:.4g}".format(*found.perplexity)
        divergence = f"mean KL {found.kl_mean:.2g}{limit}, 99.9 % {found.kl_high:.2g}, largest {found.kl_max:.2g}"
        lines = [
            f"  quality: {divergence}{'' if self.ok else '  FAIL'}",
            f"    top-1 {found.top1:.1%}, within top-5 {found.top5:.1%}{perplexity}",
            f"    on {self.tokens} tokens: {self.about}",
        ]
        for title, worst in (("worst layers", self.layers), ("worst weights", self.weights)):
            shares = ", ".join(f"{name} {error:.2%}" for name, error in worst)
            lines += [f"    {title}, by rms error: {shares}"] * bool(worst)
        return lines


def measurable(config: GPTConfig) -> bool:
    """Whether the output is a distribution that can be compared. A classifier with one label is a regression."""
    is_regression = config.task == "text-classification" and config.n_labels < 2
    return config.task in MEASURED_TASKS and not is_regression


def require_measurable(config: GPTConfig) -> None:
    """Raise UnsupportedError unless the output can be compared."""
    if not measurable(config):
        raise UnsupportedError(
            f"the quality of {config.task} is not measured",
            expected=f"{', '.join(MEASURED_TASKS)}, with two labels or more",
            found=f"{config.task}, {config.n_labels} label{'s' * (config.n_labels != 1)}",
        )


def measure(
    evaluation: Evaluation,
    run: Callable[[Probe], Array],
    limit: float | None,
    decoded: Mapping[str, LazyTensor],
    advance: Callable[[int], None] | None = None,
) -> Quality:
    """Compare an export with its source.

    Args:
        evaluation: the text and the source.
        run: returns the export's ``logits`` on a window, [1, S, V], or [1, K] if the task pools them;
            raises RunError.
        limit: largest mean KL divergence that passes, unless ``evaluation`` sets another.
        decoded: canonical name → weight as the export decodes it; to name the worst if the limit is missed.
        advance: called with 1 after each window.

    Raises:
        InputError: the checkpoint itself computes NaN.
    """
    if evaluation.max_kl is not None:
        limit = evaluation.max_kl
    columns: list[Columns] = []
    for window in evaluation.windows:
        try:
            logits = run(window)
        except RunError as error:
            return Quality(evaluation.about, 0, limit, None, f"the run failed: {error}")
        if problem := _problem(logits, evaluation.checkpoint.config, window):
            return Quality(evaluation.about, 0, limit, None, problem)
        columns.append(_columns(evaluation, window, logits))
        if advance is not None:
            advance(1)
    figures = _figures(columns)
    quality = Quality(evaluation.about, sum(len(each[0]) for each in columns), limit, figures)
    if quality.ok or not decoded:
        return quality
    layers, weights = worst(evaluation.checkpoint.weights, decoded)
    return replace(quality, layers=layers, weights=weights)


#: Per position: KL divergence, same top-1, top-1 within top-5; and of all but the last, both surprisals.
Columns = tuple[Array, ...]


def _problem(logits: Array, config: GPTConfig, window: Probe) -> str:
    """Why logits cannot be compared; empty if they can."""
    expected = shape_of(config, "logits", *window.input_ids.shape)
    if logits.shape != expected:
        return f"logits have shape {list(logits.shape)}, expected {list(expected)}"
    return "" if np.isfinite(logits).all() else "logits have NaN or infinite values"


def _columns(evaluation: Evaluation, window: Probe, logits: Array) -> Columns:
    """The comparison of one window."""
    import torch

    export = torch.from_numpy(np.ascontiguousarray(logits, np.float32).reshape(-1, logits.shape[-1]))  # (n, V)
    generates = evaluation.checkpoint.config.task == "text-generation"
    following = window.input_ids[0, 1:] if generates else window.input_ids[0, :0]
    parts = [_compared(source, export[i], following[i]) for i, source in evaluation.source.logits(window)]
    return tuple(torch.cat(column).double().numpy() for column in zip(*parts, strict=True))


def _compared(source: Tensor, export: Tensor, following: Integers) -> tuple[Tensor, ...]:
    """:data:`Columns` of logits [n, V] each; ``following`` are the tokens that follow the first positions."""
    import torch

    p, q = source.double().log_softmax(-1), export.double().log_softmax(-1)  # (n, V)
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)  # (n)
    best = p.argmax(-1, keepdim=True)  # (n, 1)
    within = (q.topk(min(5, q.shape[-1])).indices == best).any(-1)  # (n)
    known = torch.arange(len(following))
    own, other = (-each[known, torch.from_numpy(following)] for each in (p, q))
    return divergence, q.argmax(-1) == best[:, 0], within, own, other


def _figures(columns: list[Columns]) -> Figures:
    divergence, same, within, own, other = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Figures(
        kl_mean=float(divergence.mean()),
        kl_high=float(np.quantile(divergence, 0.999)),
        kl_max=float(divergence.max()),
        top1=float(same.mean()),
        top5=float(within.mean()),
        perplexity=(_perplexity(own), _perplexity(other)) if len(own) else None,
        positions=_by_position(columns),
    )


def _by_position(columns: list[Columns]) -> tuple[Position, ...]:
    """Figures of positions 0, 1, 2–3, 4–7 and so on; none if no window has more than one position."""
    longest, found, first = max(len(column[0]) for column in columns), [], 0
    while first < longest and longest > 1:
        some = slice(first, max(1, 2 * first))
        divergence, same = (np.concatenate([column[i][some] for column in columns]) for i in (0, 1))
        last = min(some.stop, longest) - 1
        found.append(Position(first, last, len(divergence), float(divergence.mean()), float(same.mean())))
        first = some.stop
    return tuple(found)


def _perplexity(surprisals: Array) -> float:
    return math.exp(min(float(surprisals.mean()), 700.0))  # the largest finite float is about e^709


def worst(
    source: Mapping[str, LazyTensor], decoded: Mapping[str, LazyTensor]
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """The layers, and the weights, that lose most: (name, rms of the error over rms of the weights)."""
    sums = {name: _squares(source[name], weight) for name, weight in decoded.items()}
    named = sorted((_layer(name), *squares) for name, squares in sums.items())
    layers = {
        layer: tuple(map(sum, zip(*(row[1:] for row in rows), strict=True)))
        for layer, rows in itertools.groupby(named, key=lambda row: row[0])
    }
    return tuple(_largest(each) for each in (layers, sums))


def _layer(weight: str) -> str:
    """``h.3`` of ``h.3.mlp.c_fc.weight``; the tables of the vocabulary count as layers."""
    return ".".join(weight.split(".")[: 2 if weight.startswith("h.") else 1])


def _largest(sums: Mapping[str, tuple[float, ...]]) -> tuple[tuple[str, float], ...]:
    errors = [(name, math.sqrt(error / size) if size else 0.0) for name, (error, size) in sums.items()]
    return tuple(sorted(errors, key=lambda item: -item[1])[:MOST_NAMED])


def _squares(exact: LazyTensor, rounded: LazyTensor) -> tuple[float, float]:
    """Sums of squares: of the error, of the weight."""
    error = size = 0.0
    step = max(1, CHUNK_BYTES // (8 * max(1, exact.size // max(1, exact.shape[0]))))
    for start in range(0, exact.shape[0], step):
        box = (slice(start, min(start + step, exact.shape[0])), *(slice(0, n) for n in exact.shape[1:]))
        wide = exact.read(box).astype(np.float64)
        error += float(((rounded.read(box).astype(np.float64) - wide) ** 2).sum())
        size += float((wide**2).sum())
    return error, size
