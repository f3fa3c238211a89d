"""Choosing the next token: greedy, or sampling with temperature, top-k and top-p (Holtzman et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import InputError, UsageError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """Options for choosing tokens.

    Attributes:
        max_new_tokens: most tokens to add.
        temperature: divides the logits; 0 is greedy.
        top_k: keep this many best tokens; None for all.
        top_p: keep the smallest set of best tokens whose probabilities add up to this; None for all.
        seed: of the random generator.

    Raises:
        UsageError: the temperature is negative or not finite, or ``top_p`` is outside (0, 1].
    """

    max_new_tokens: int = 50
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError("invalid", item="--temperature", expected="a number from 0 on", found=self.temperature)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError("invalid", item="--top-p", expected="a number above 0, up to 1", found=self.top_p)


def choose(logits: Floats, sampling: Sampling, random: np.random.Generator) -> int:
    """Choose the next token from logits [V].

    Raises:
        InputError: the largest is NaN or infinite.
    """
    largest = logits.max(initial=-math.inf)
    if not math.isfinite(largest):
        raise InputError("the model computes logits that are not numbers", found=largest)
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The largest becomes 0: a tiny temperature must not overflow.
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - float(largest)) / sampling.temperature  # [V]
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k]  # best first
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    if sampling.top_p is not None:
        keep = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order, weights = order[:keep], weights[:keep] / weights[:keep].sum()
    return int(random.choice(order, p=weights))
