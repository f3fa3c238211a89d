"""Rule 3: how far a lossy export is from the source model, in the distributions that it predicts.

The measures are those of llama.cpp's ``--kl-divergence``: mean, 99.9 % and largest Kullback-Leibler divergence
KL(source ‖ export) in nats, agreement of the most likely token, and the perplexity of both. Perplexity alone says
little: it can improve while a quarter of the most likely tokens change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import UnsupportedError
from gptconvert.model.tensors import CHUNK_BYTES, Array, LazyTensor
from gptconvert.verify.evaluation import MEASURED_TASKS, Evaluation
from gptconvert.verify.probes import Probe
from gptconvert.verify.tasks import pooled_tokens

if TYPE_CHECKING:
    from torch import Tensor

#: Worst weights that a failure names.
MOST_NAMED = 5


@dataclass(frozen=True)
class Quality:
    """Figures of one export.

    Attributes:
        tokens: positions compared.
        about: the text.
        kl_mean: mean KL divergence in nats.
        kl_high: 99.9 % of the positions have at most this.
        kl_max: largest.
        top1: share of positions where both find the same token most likely.
        top5: share where the source's most likely token is among the export's five.
        perplexity: (source, export), on the text; None for classifiers.
        limit: most mean KL divergence; None for no limit.
        worst: (weight, error relative to its rms), largest first, if the limit is missed.
    """

    tokens: int
    about: str
    kl_mean: float
    kl_high: float
    kl_max: float
    top1: float
    top5: float
    perplexity: tuple[float, float] | None
    limit: float | None = None
    worst: tuple[tuple[str, float], ...] = field(default=())

    @property
    def ok(self) -> bool:
        """The gate."""
        return math.isfinite(self.kl_mean) and (self.limit is None or self.kl_mean <= self.limit)

    def as_dict(self, figures: bool) -> dict[str, object]:
        """Plain values; the figures differ in their last digits between machines, the rest does not."""
        rule: dict[str, object] = {"ok": self.ok, "max_kl": self.limit}
        if not figures:
            return rule
        source, export = self.perplexity or (None, None)
        return {
            **rule,
            "text": self.about,
            "tokens": self.tokens,
            "kl_mean": self.kl_mean,
            "kl_99_9": self.kl_high,
            "kl_max": self.kl_max,
            "top1": self.top1,
            "top1_in_top5": self.top5,
            "perplexity_source": source,
            "perplexity": export,
            "worst_weights": dict(self.worst),
        }

    def lines(self) -> list[str]:
        """Lines of a table."""
        limit = "" if self.limit is None else f" (limit {self.limit:g})"
        perplexity = "" if self.perplexity is None else ", perplexity {:.4g} → {:.4g}".format(*self.perplexity)
        divergence = f"mean KL {self.kl_mean:.2g}{limit}, 99.9 % {self.kl_high:.2g}, largest {self.kl_max:.2g}"
        agreement = f"top-1 {self.top1:.1%}, within top-5 {self.top5:.1%}{perplexity}"
        lines = [f"  quality: {divergence}{'' if self.ok else '  FAIL'}", f"    {agreement}"]
        lines.append(f"    on {self.tokens} tokens: {self.about}")
        return lines + [f"    {name}: error {error:.2%} of its rms" for name, error in self.worst]


def measurable(task: str) -> bool:
    """Whether a task's output is a distribution that can be compared."""
    return task in MEASURED_TASKS


def require_measurable(task: str) -> None:
    """Raise UnsupportedError unless a task's output can be compared."""
    if not measurable(task):
        raise UnsupportedError(
            f"the quality of {task} is not measured", expected=" or ".join(MEASURED_TASKS), found=task
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
        run: returns the export's ``logits`` on a window: [1, S, V], or [1, K] if the task pools them.
        limit: most mean KL divergence.
        decoded: canonical name → weight as the export decodes it; to name the worst if the limit is missed.
        advance: called with 1 after each window.
    """
    collected = [_window(evaluation, window, run(window)) for window in _counted(evaluation.windows, advance)]
    columns = [np.concatenate(column) for column in zip(*collected, strict=True)]
    divergences, same, within, own, theirs = columns
    perplexity = None
    if evaluation.checkpoint.config.task == "text-generation" and len(own):
        perplexity = math.exp(min(own.mean(), 700.0)), math.exp(min(theirs.mean(), 700.0))
    quality = Quality(
        tokens=len(divergences),
        about=evaluation.about,
        kl_mean=float(divergences.mean()),
        kl_high=float(np.quantile(divergences, 0.999)),
        kl_max=float(divergences.max()),
        top1=float(same.mean()),
        top5=float(within.mean()),
        perplexity=perplexity,
        limit=limit if evaluation.max_kl is None else evaluation.max_kl,
    )
    return quality if quality.ok else replace(quality, worst=worst_weights(evaluation.checkpoint.weights, decoded))


def _counted(windows: Any, advance: Callable[[int], None] | None) -> Any:
    for window in windows:
        yield window
        if advance is not None:
            advance(1)


def _window(evaluation: Evaluation, window: Probe, logits: Array) -> tuple[NDArray[np.float64], ...]:
    """Per position: divergence, same top-1, top-1 within top-5; and of all but the last, both surprisals."""
    import torch

    config = evaluation.checkpoint.config
    pooled = config.task == "text-classification"
    only = int(pooled_tokens(config, window)[0]) if pooled else None
    following = torch.from_numpy(window.input_ids[0, 1:])
    rows: list[tuple[Tensor, ...]] = []
    found = torch.from_numpy(np.ascontiguousarray(logits[0] if not pooled else logits, np.float32))
    for some, source in evaluation.source.logits(window):
        index = range(some.start, some.stop)
        if only is not None:
            if only not in index:
                continue
            source, export = source[[only - some.start]], found
        else:
            export = found[some]
        rows.append(_compared(source, export, following[some] if only is None else following[:0]))
    return tuple(torch.cat(column).double().numpy() for column in zip(*rows, strict=True))


def _compared(source: Tensor, export: Tensor, following: Tensor) -> tuple[Tensor, ...]:
    """Of some positions [n, V]: divergence, agreement [n] each, and surprisals of the tokens that follow."""
    import torch

    p, q = source.double().log_softmax(-1), export.double().log_softmax(-1)  # (n, V)
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)  # (n)
    best = p.argmax(-1, keepdim=True)  # (n, 1)
    within = (q.topk(min(5, q.shape[-1])).indices == best).any(-1)  # (n)
    known = torch.arange(len(following))
    own, theirs = (-each[known, following] for each in (p, q))
    return divergence, q.argmax(-1) == best[:, 0], within, own, theirs


def worst_weights(
    source: Mapping[str, LazyTensor], decoded: Mapping[str, LazyTensor]
) -> tuple[tuple[str, float], ...]:
    """The weights that lose most: (name, rms of the error over rms of the weight), largest first."""
    errors = {name: _relative_error(source[name], weight) for name, weight in decoded.items()}
    return tuple(sorted(errors.items(), key=lambda item: -item[1])[:MOST_NAMED])


def _relative_error(exact: LazyTensor, rounded: LazyTensor) -> float:
    error = size = 0.0
    step = max(1, CHUNK_BYTES // (8 * max(1, exact.size // max(1, exact.shape[0]))))
    for start in range(0, exact.shape[0], step):
        box = (slice(start, min(start + step, exact.shape[0])), *(slice(0, n) for n in exact.shape[1:]))
        wide = exact.read(box).astype(np.float64)
        error += float(((rounded.read(box).astype(np.float64) - wide) ** 2).sum())
        size += float((wide**2).sum())
    return math.sqrt(error / size) if size else 0.0
