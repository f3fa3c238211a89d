"""Changes to the scores of the next token, in the order in which transformers applies them.

Each takes the ids so far [B, T] and scores [B, V]: logits, or log-probabilities in a beam search. It returns
scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gptconvert.generation.sampling import Settings

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Processor = Callable[[Integers, Floats], Floats]


def processors(settings: Settings, prompt: int, stops: Sequence[int]) -> list[Processor]:
    """Those that the settings need, for a prompt of ``prompt`` tokens and end tokens ``stops``."""
    table: list[tuple[bool, Processor]] = [
        (settings.repetition_penalty != 1, lambda ids, x: penalised(ids, x, settings.repetition_penalty)),
        (settings.no_repeat_ngram_size > 0, lambda ids, x: without_repeats(ids, x, settings.no_repeat_ngram_size)),
        (settings.min_new_tokens > 0, lambda ids, x: unended(ids, x, prompt + settings.min_new_tokens, stops)),
        (settings.samples and settings.temperature != 1, lambda _, x: cooled(x, settings.temperature)),
        (settings.samples and settings.top_k > 0, lambda _, x: best(x, settings.top_k)),
        (settings.samples and settings.top_p < 1, lambda _, x: nucleus(x, settings.top_p)),
    ]
    return [processor for used, processor in table if used]


def needed(settings: Settings) -> int | None:
    """How many of the largest logits decide the next token; None for all.

    A runtime that returns fewer must have those equal to the last of them, too.
    """
    if settings.repetition_penalty != 1 or settings.no_repeat_ngram_size or settings.min_new_tokens:
        return None  # tokens change places
    if settings.samples:
        return settings.top_k or None
    return 1


def penalised(ids: Integers, scores: Floats, penalty: float) -> Floats:
    """Scores of tokens that occurred, divided by the penalty where positive and multiplied where negative."""
    scores = scores.copy()
    for row, seen in zip(scores, ids, strict=True):
        some = np.unique(seen)
        row[some] = np.where(row[some] < 0, row[some] * np.float32(penalty), row[some] / np.float32(penalty))
    return scores


def without_repeats(ids: Integers, scores: Floats, size: int) -> Floats:
    """Without the tokens that would complete a sequence of ``size`` tokens that occurred."""
    if ids.shape[1] + 1 < size:
        return scores
    scores = scores.copy()
    for row, seen in zip(scores, ids, strict=True):
        row[list(_repeats(seen, size))] = -np.inf
    return scores


def _repeats(seen: Integers, size: int) -> Iterator[int]:
    """The tokens that followed the last ``size − 1`` ones before."""
    if len(seen) < size:
        return
    windows = np.lib.stride_tricks.sliding_window_view(seen, size)  # (T − size + 1, size)
    same = (windows[:, :-1] == seen[len(seen) - size + 1 :]).all(axis=1)
    yield from (int(token) for token in windows[same, -1])


def unended(ids: Integers, scores: Floats, shortest: int, stops: Sequence[int]) -> Floats:
    """Without end tokens until the text has ``shortest`` tokens."""
    if ids.shape[1] >= shortest:
        return scores
    scores = scores.copy()
    scores[:, list(stops)] = -np.inf
    return scores


def cooled(scores: Floats, temperature: float) -> Floats:
    """Divided by the temperature, after the largest has become 0: a tiny temperature must not overflow."""
    with np.errstate(over="ignore"):
        return np.asarray((scores - scores.max(1, keepdims=True)) / np.float64(temperature), np.float32)


def best(scores: Floats, count: int) -> Floats:
    """The ``count`` largest, and those equal to the last of them."""
    count = min(count, scores.shape[1])
    least = np.partition(scores, -count, axis=1)[:, -count, None]
    return np.where(scores < least, np.float32(-np.inf), scores)


def nucleus(scores: Floats, share: float) -> Floats:
    """The fewest most likely tokens whose probabilities add up to ``share``."""
    order = np.argsort(-scores, axis=1, kind="stable")
    weights = probabilities(np.take_along_axis(scores, order, 1))
    before = np.cumsum(weights, 1) - weights  # (B, V)
    kept = before < share
    kept[:, 0] = True
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, kept, 1)
    return np.where(mask, scores, np.float32(-np.inf))


def probabilities(scores: Floats) -> NDArray[np.float64]:
    """Softmax of scores [B, V], in float64."""
    weights = np.exp(scores.astype(np.float64) - scores.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def log_probabilities(logits: Floats) -> Floats:
    """Logarithm of the softmax of logits [B, V]."""
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), np.float32)
