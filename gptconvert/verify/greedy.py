"""Greedy continuations: one runtime's tokens, each checked against another runtime's logits.

Each token is judged after the same preceding tokens, so two continuations that pass are the same text except for
ties: where two tokens score alike within rounding noise, either is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptconvert.model.generation import SpecialIds
from gptconvert.model.tensors import Array
from gptconvert.verify.probes import Integers


@dataclass(frozen=True, eq=False)
class Continuation:
    """Prompts and their generated tokens.

    Attributes:
        input_ids: [B, S + n], the new tokens last.
        attention_mask: [B, S + n]; prompts may be padded on either side.
        new: n.
        allowed: how far a token's logit may be below the best one if both runtimes are as exact as this one.
    """

    input_ids: Integers
    attention_mask: Integers
    new: int
    allowed: float

    def last_seen(self, i: int) -> Integers:
        """Index [B] of the last real token before new token ``i``."""
        start = self.input_ids.shape[1] - self.new
        real = self.attention_mask[:, : start + i] != 0
        return np.asarray(real.shape[1] - 1 - real[:, ::-1].argmax(1), np.int64)

    def ended(self, stops: Sequence[int]) -> Array:
        """[B, n + 1]: whether each row had ended before each new token, and after the last."""
        hits = np.isin(self.input_ids[:, -self.new :], np.asarray(stops, np.int64))  # (B, n)
        return np.concatenate((np.zeros_like(hits[:, :1]), hits), 1).cumsum(1) > 0

    def unlikely(self, logits: Array, special: SpecialIds, allowed: float, among: int = 1) -> Iterator[str]:
        """New tokens that ``logits`` [B, S + n, V] rule out; after the end only padding is allowed.

        A token's logit may be ``allowed`` below the best one, or below the one of rank ``among``.
        """
        rows, ended = np.arange(len(self.input_ids)), self.ended(special.eos)
        filler = special.filler(logits.shape[-1])
        for i in range(self.new):
            token = self.input_ids[:, i - self.new]  # (B)
            scores = logits[rows, self.last_seen(i)].astype(np.float64)  # (B, V)
            least = np.sort(scores, 1)[:, -min(among, scores.shape[1])]  # (B)
            behind = least - scores[rows, token]  # (B)
            wrong = np.where(ended[:, i], token != filler, ~(behind <= allowed))
            yield from (f"token {i} of row {row} is {token[row]}" for row in np.flatnonzero(wrong))
