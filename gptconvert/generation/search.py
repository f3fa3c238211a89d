"""Decoding: the most likely token, sampling, and beam search, with one pass of the model per token for all rows.

Rows have one prompt, which runs once; afterwards the rows are a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import InputError
from gptconvert.generation.processors import Floats, log_probabilities, probabilities, processors
from gptconvert.generation.sampling import Settings
from gptconvert.targets.target import Runtime

#: Whether new ids end the text, besides end tokens.
Ends = Callable[[Sequence[int]], bool]
#: Added to the scores of beams that must not be chosen.
OUT = np.float32(-1e9)


def never(_: Sequence[int]) -> bool:
    """No text ends the continuation."""
    return False


def decode(
    runtime: Runtime, prompt: Sequence[int], settings: Settings, stops: Sequence[int], ends: Ends = never
) -> Iterator[list[tuple[int, int | None]]]:
    """Yield for every step (row, token) of the rows that go on; the token is None if an end token ends the row.

    A row also ends after ``settings.length`` tokens, and when ``ends`` says so.

    Raises:
        InputError: the model returns logits of another shape, or that are not numbers.
    """
    change = processors(settings, len(prompt), stops)
    count = settings.num_return_sequences
    random = [np.random.default_rng((settings.seed, row) if row else settings.seed) for row in range(count)]
    rows, texts, parents = list(range(count)), [list(prompt) for _ in range(count)], [0] * count
    logits = _step(runtime, [prompt], [0])
    while rows:
        ids, scores = np.array([texts[row] for row in rows]), logits[parents]
        for each in change:
            scores = each(ids, scores)
        chosen = [_choose(x, random[row] if settings.samples else None) for row, x in zip(rows, scores, strict=True)]
        yield [(row, None if token in stops else token) for row, token in zip(rows, chosen, strict=True)]
        going, fed = [], []
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            texts[row].append(token)
            if token not in stops and len(texts[row]) < settings.length and not ends(texts[row][len(prompt) :]):
                going.append(place)
                fed.append([token])
        if not going:
            return
        logits = _step(runtime, fed, [parents[place] for place in going])
        rows, parents = [rows[place] for place in going], list(range(len(going)))


def _choose(scores: Floats, random: np.random.Generator | None) -> int:
    if random is None:
        return int(scores.argmax())
    return int(random.choice(len(scores), p=probabilities(scores[None])[0]))


def _step(runtime: Runtime, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Floats:
    """Checked logits [B, V]."""
    logits = runtime.step(rows, parents)
    if logits.ndim != 2 or len(logits) != len(rows) or runtime.vocab_size not in (None, logits.shape[1]):
        expected = "one number for each row and each id of the vocabulary"
        raise InputError("the model returns other logits", expected=expected, found=f"shape {logits.shape}")
    largest = logits.max(axis=1, initial=-math.inf)
    if not np.isfinite(largest).all():
        wrong = largest[~np.isfinite(largest)][0]
        raise InputError("the model computes logits that are not numbers", found=wrong)
    return logits


@dataclass(frozen=True)
class Beam:
    """A result of a beam search.

    Attributes:
        ids: new tokens, without the end token.
        score: sum of log-probabilities over the length to the power of the length penalty.
        ended: whether by an end token or a stop text, not by the length.
    """

    ids: tuple[int, ...]
    score: float
    ended: bool


def beam_search(
    runtime: Runtime, prompt: Sequence[int], settings: Settings, stops: Sequence[int], ends: Ends = never
) -> list[Beam]:
    """The best continuations, best first.

    Of the best candidates, ``num_beams`` that have not ended go on. Those among the first ``num_beams`` that have
    ended are kept, if their score is among the best. The search ends when ``early_stopping`` says so.

    Raises:
        InputError: the model returns logits of another shape, or that are not numbers.
    """
    beams, change = settings.num_beams, processors(settings, len(prompt), stops)
    texts = [list(prompt)] * beams
    scores = np.array([0, *[OUT] * (beams - 1)], np.float32)
    finished: list[Beam] = []
    logits = np.repeat(_step(runtime, [prompt], [0]), beams, axis=0)  # the rows are equal
    parents = [0] * beams
    while True:
        values = log_probabilities(logits)
        for each in change:
            values = each(np.array(texts), values)
        total = (values + scores[:, None]).reshape(-1)  # (beams * V)
        order = _largest(total, max(2, 1 + len(stops)) * beams)
        candidates = [[*texts[place // values.shape[1]], int(place % values.shape[1])] for place in order]
        new = len(candidates[0]) - len(prompt)
        over = np.array([text[-1] in stops or ends(text[len(prompt) :]) for text in candidates])
        full = len(candidates[0]) >= settings.length
        for place in np.flatnonzero((over | full)[:beams]):
            ids = candidates[place][len(prompt) :]
            cut = ids[:-1] if ids[-1] in stops else ids
            score = float(total[order[place]]) / new**settings.length_penalty
            finished.append(Beam(tuple(cut), score, bool(over[place])))
        finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
        going = np.where(over | full, total[order] + OUT, total[order])
        chosen = _largest(going, beams)
        scores = going[chosen]
        if full or over.all() or _is_over(finished, settings, float(scores[0]), new, len(prompt)):
            return finished[: settings.num_return_sequences]
        texts = [candidates[place] for place in chosen]
        origins = [parents[int(order[place]) // values.shape[1]] for place in chosen]
        logits, parents = _step(runtime, [[text[-1]] for text in texts], origins), list(range(beams))


def _is_over(finished: Sequence[Beam], settings: Settings, best: float, new: int, prompt: int) -> bool:
    """Whether no running beam can, or may, become one of the best."""
    if len(finished) < settings.num_beams:
        return False
    if settings.early_stopping == "true":
        return True
    longest = settings.early_stopping == "never" and settings.length_penalty > 0
    length = settings.length - prompt if longest else new
    return bool(best / length**settings.length_penalty <= min(beam.score for beam in finished))


def _largest(values: Floats, count: int) -> NDArray[np.intp]:
    """Indices of the largest values, largest first; the first of equal ones."""
    return np.argsort(-values, kind="stable")[:count]
