"""Probes: seeded token sequences with every kind of mask, position and past, as plain arrays.

A probe is data, independent of how it is run; the truth and every candidate get the same arrays. Shapes:
B batch, S new tokens, P past tokens, T = P + S, H heads, hd head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.model.options import Level
from reference_model.config import COUNTED_TASKS, GPTConfig

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]

#: A model with more weights than this in its blocks is large.
LARGE = 1_000_000_000
#: Longest random sequence, and most rows of a random batch.
MOST_RANDOM, MOST_ROWS = 128, 9
#: The longest prompt repeats the shorter ones except for the id at this index: only outputs from there on may change.
CHANGED = 6


@dataclass(frozen=True)
class Amount:
    """Sizes of the probes at level ``default``.

    Attributes:
        lengths: of the prompts that run alone; the longest is also run in chunks.
        masks: tokens per row in the batch of masks, whose first row is a prompt too.
        chunk: most tokens in the last chunk.
    """

    lengths: tuple[int, ...]
    masks: int
    chunk: int


USUAL = Amount(lengths=(1, 2, 7, 64), masks=5, chunk=5)
#: On a large model every token is costly, and every run is a pass over all weights. So the prompt of 7 runs in the
#: batch of masks; 17 tokens show what 64 do (more rows than a matrix kernel takes at once, and an odd one left over);
#: and several new tokens after a past are run only where the past is random.
OF_LARGE = Amount(lengths=(1, 2, 17), masks=7, chunk=1)


@dataclass(frozen=True, eq=False)
class Probe:
    """One batch of sequences.

    Attributes:
        groups: name of each row's probe group; figures are pooled by group.
        input_ids: [B, S].
        attention_mask: [B, T] of 0 and 1.
        position_ids: [B, S].
        past_length: P.
        past_seed: seed of the random keys and values that serve as the past.
        shared_past: whether all layers get the same keys and values (to save memory on a long past) or each its own
            (which exposes a cache in the wrong order).
        compare_presents: whether returned keys and values are compared too, or only the main output.
        chunks: lengths of the chunks in which the first new tokens are also fed, each with the cache that the chunk
            before returned; empty if they are not.
    """

    groups: tuple[str, ...]
    input_ids: Integers
    attention_mask: Integers
    position_ids: Integers
    past_length: int = 0
    past_seed: int = 0
    shared_past: bool = False
    compare_presents: bool = True
    chunks: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The names of the groups, each once."""
        return ", ".join(dict.fromkeys(self.groups))

    @property
    def tokens(self) -> int:
        """Number of new tokens that are not masked out: the cost of the truth."""
        return int(self.attention_mask[:, self.past_length :].sum())

    def is_prompt(self, row: int = 0) -> bool:
        """Whether a row is a sequence from position 0 on, without a past and without masked tokens."""
        plain = np.arange(self.input_ids.shape[1])
        whole = not self.past_length and bool(self.attention_mask[row].all())
        return whole and np.array_equal(self.position_ids[row], plain)

    def beginning(self, count: int) -> Probe:
        """The probe cut to its first ``count`` new tokens."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[:, :count],
            attention_mask=self.attention_mask[:, : self.past_length + count],
            position_ids=self.position_ids[:, :count],
            chunks=(),
        )

    def past(self, layer: int, config: GPTConfig) -> tuple[Floats, Floats]:
        """Keys and values of the past, [B, H, P, hd] each, of a trained model's magnitude."""
        if not self.shared_past:
            return self._random_past(layer, config)
        if config not in self._shared:
            self._shared[config] = self._random_past(0, config)
        return self._shared[config]

    @functools.cached_property
    def _shared(self) -> dict[GPTConfig, tuple[Floats, Floats]]:
        return {}

    def _random_past(self, layer: int, config: GPTConfig) -> tuple[Floats, Floats]:
        shape = (len(self.input_ids), config.n_head, self.past_length, config.head_dim)
        random = np.random.default_rng([self.past_seed, layer])
        return random.standard_normal(shape, np.float32), random.standard_normal(shape, np.float32)

    def as_dict(self) -> dict[str, object]:
        """Plain values for reports; with the seed and the program's version they determine the probe."""
        return {
            "groups": list(self.groups),
            "batch": len(self.input_ids),
            "new_tokens": self.input_ids.shape[1],
            "past_tokens": self.past_length,
            "chunks": list(self.chunks),
            "presents_compared": self.compare_presents,
        }


def default_positions(task: str, attention_mask: Integers, new_tokens: int) -> Integers:
    """Positions of the new tokens if the caller passes none, as in the reference model: [B, T] → [B, S]."""
    counted = attention_mask if task in COUNTED_TASKS else np.ones_like(attention_mask)
    return np.asarray(np.maximum(counted.cumsum(1) - 1, 0)[:, -new_tokens:], np.int64)


class _Maker:
    """Makes the probes of one model; each probe's ids come from a seeded stream of its own."""

    def __init__(self, config: GPTConfig, seed: int) -> None:
        self.config, self.seed, self.made = config, seed, 0

    def ids(self, batch: int, length: int) -> Integers:
        """Random ids [B, S]."""
        self.made += 1
        return np.random.default_rng([self.seed, self.made]).integers(0, self.config.vocab_size, (batch, length))

    @functools.cached_property
    def prompt(self) -> Integers:
        """A prompt as long as the context, [1, n_ctx], starting with the last and the first id of the vocabulary."""
        prompt, last = self.ids(1, self.config.n_ctx), self.config.vocab_size - 1
        borders = [last, 0, last][: prompt.shape[1]]
        prompt[:, : len(borders)] = borders
        return prompt

    def probe(self, groups: Sequence[str], mask: Sequence[str], past: int = 0, **fields: Any) -> Probe:
        """A probe with its mask given row by row, ``1`` for a token and ``0`` for padding."""
        attention_mask = np.array([[int(c) for c in row] for row in mask], np.int64)
        new = attention_mask.shape[1] - past
        ids = fields.pop("ids", None)
        positions = fields.pop("positions", None)
        positions = default_positions(self.config.task, attention_mask, new) if positions is None else positions
        ids = self.ids(len(mask), new) if ids is None else ids
        return Probe(
            groups=tuple(groups),
            input_ids=self._padded(ids, attention_mask[:, past:]),
            attention_mask=attention_mask,
            position_ids=positions,
            past_length=past,
            past_seed=self.seed + self.made,
            **fields,
        )

    def _padded(self, ids: Integers, mask: Integers) -> Integers:
        """The ids unchanged, masked ones included, unless the head detects padding by its id: then exactly the masked
        tokens get that id.
        """
        pad = self.config.padding_id
        if self.config.task != "text-classification" or pad is None:
            return ids
        return np.where(mask == 0, pad, np.where(ids == pad, (pad + 1) % self.config.vocab_size, ids))


def make_probes(
    config: GPTConfig, *, kv_cache: bool, free_positions: bool = True, level: Level = "default", seed: int = 0
) -> tuple[Probe, ...]:
    """The probes for a model.

    Args:
        config: the architecture; sizes are capped by its n_ctx.
        kv_cache: whether the candidate takes and returns keys and values.
        free_positions: whether the candidate lets its caller choose positions.
        level: ``default``, about 100 tokens, or 55 for a large model; ``full``, sequences as long as the context too,
            and batches of random size, length, mask and past.
        seed: of all random values; any but 0 adds such batches at either level.
    """
    make = _Maker(config, seed)
    amount = USUAL if level == "full" else usual_amount(config)
    probes = [*_prompts(make, amount, kv_cache, level), *_masks(make, amount.masks)]
    if level == "full":
        probes += _masks(make, 64)
    if kv_cache:
        probes += _pasts(make, level)
    if free_positions:
        probes += _chosen_positions(make, kv_cache)
    if seed or level == "full":
        probes += _random(make, kv_cache, 12 if level == "full" else 3)
    return (*probes, *_beyond_windows(make, kv_cache))


def _prompts(make: _Maker, amount: Amount, kv_cache: bool, level: Level) -> Iterator[Probe]:
    """One prompt of each length, without a past."""
    n_ctx = make.config.n_ctx
    changed = make.prompt.copy()
    changed[:, CHANGED : CHANGED + 1] = (changed[:, CHANGED : CHANGED + 1] + 1) % make.config.vocab_size
    lengths = (*amount.lengths, n_ctx - 1, n_ctx) if level == "full" else amount.lengths
    longest = min(max(amount.lengths), n_ctx)
    for length in sorted({min(max(length, 1), n_ctx) for length in lengths}):
        ids = (changed if length > 7 else make.prompt)[:, :length]
        # A prompt of one token, a past of one, a past of two: code that handles these handles longer ones.
        chunks = (1, 1, min(amount.chunk, length - 2)) if kv_cache and 2 < length == longest else ()
        presents = length <= 64  # the whole cache of a large model takes as much memory as its weights
        yield make.probe([f"length {length}"], ["1" * length], ids=ids, chunks=chunks, compare_presents=presents)


def usual_amount(config: GPTConfig) -> Amount:
    """Sizes of a model's probes at level ``default``."""
    weights = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.n_inner)
    return OF_LARGE if weights > LARGE else USUAL


def _masks(make: _Maker, length: int) -> Iterator[Probe]:
    """One batch: no, left and right padding; holes; everything masked out but one token.

    Even rows have the prompt's tokens and odd rows have others, so neighbours differ, and shared tokens are computed
    once.
    """
    n = min(length, make.config.n_ctx)
    short = math.ceil(n / 2)
    pad = "0" * (n - short)
    single = "0" * (n - 1 - n // 3) + "1" + "0" * (n // 3)
    mask = {
        "no padding": "1" * n,
        "left padding": pad + "1" * short,
        "right padding": "1" * short + pad,
        "holes": ("11011" * n)[:n],
        "holes, left padding": (pad[:1] + "1011" * n)[:n],
        "one token": single,
    }
    ids, other = make.ids(len(mask), n), make.ids(1, n)
    for row, pattern in enumerate(mask.values()):
        real = np.array([character == "1" for character in pattern])
        ids[row, real] = (other if row % 2 else make.prompt)[0, : real.sum()]
    yield make.probe(tuple(mask), tuple(mask.values()), ids=ids)


def _pasts(make: _Maker, level: Level) -> Iterator[Probe]:
    """New tokens after a random past: of one token, of several in every mask pattern, up to the last position."""
    n_ctx = make.config.n_ctx
    if 2 <= n_ctx < 8:  # in longer contexts the chunked prompt has a past of one
        yield make.probe(["past 1"], ["11"], past=1)
    if n_ctx >= 8:
        rows = ["1" * 8, "00011111", "01011" + "101"]
        yield make.probe(["past 5", "past 5, left padding", "past 5, holes"], rows, past=5)
    if level == "full":
        for past, new in [(1, 4), (7, 1), (7, 4)]:
            if past + new <= n_ctx:
                yield make.probe([f"past {past}, {new} new"], ["1" * (past + new)], past=past)
    for new in (1, 4) if level == "full" else (1,):
        if n_ctx - new > 5:
            fields = {"shared_past": True, "compare_presents": False}
            yield make.probe([f"past {n_ctx - new}"], ["1" * n_ctx], past=n_ctx - new, **fields)


def _chosen_positions(make: _Maker, kv_cache: bool) -> Iterator[Probe]:
    """Positions that the caller chooses.

    The last ones of the context in a short sequence, unless a past reaches them; and positions that count the mask's
    ones, unless those of all probes do.
    """
    n, n_ctx = min(4, make.config.n_ctx), make.config.n_ctx
    last = np.arange(n_ctx - n, n_ctx)[None]
    if make.config.task not in COUNTED_TASKS:
        mask = ("1011"[:n], "0111"[:n] if n > 1 else "1")
        counted = np.array([[int(c) for c in row] for row in mask]).cumsum(1).clip(min=1) - 1
        rows = ("1" * n, *mask)
        groups = ["last positions", "holes, counted positions", "left padding, counted positions"]
        yield make.probe(groups, rows, positions=np.concatenate((last, counted)))
    elif not kv_cache:
        yield make.probe(["last positions"], ["1" * n], positions=last)


def _random(make: _Maker, kv_cache: bool, count: int) -> Iterator[Probe]:
    """Batches that an exporter cannot foresee, of every size if ``count`` suffices; each row has a new token."""
    n_ctx, random = make.config.n_ctx, np.random.default_rng([make.seed])
    sizes = random.permutation(MOST_ROWS)
    for number in range(1, count + 1):
        batch, total = int(sizes[number % MOST_ROWS]) + 1, int(random.integers(1, min(n_ctx, MOST_RANDOM) + 1))
        past = int(random.integers(0, total)) if kv_cache and random.random() < 0.5 else 0
        mask = random.random((batch, total)) < random.choice([0.5, 0.9, 1.0], (batch, 1))
        mask[np.arange(batch), random.integers(past, total, batch)] = True
        rows = ["".join("01"[int(seen)] for seen in row) for row in mask]
        yield make.probe([f"random {number}"] * batch, rows, past=past)


def _beyond_windows(make: _Maker, kv_cache: bool) -> Iterator[Probe]:
    """For each attention window, queries that must not see the first keys."""
    windows = {w for w in make.config.attn_window if w is not None and w + 3 <= make.config.n_ctx}
    for window in sorted(windows):
        past = window + 1 if kv_cache else 0
        yield make.probe([f"beyond window {window}"], ["1" * (window + 3)], past=past)


def waves(probes: Iterable[Probe], most_tokens: int = 256) -> Iterator[tuple[Probe, ...]]:
    """Split probes, in order, into waves of at most ``most_tokens`` tokens (or one probe), to bound memory."""
    wave: list[Probe] = []
    for probe in probes:
        if wave and sum(p.tokens for p in wave) + probe.tokens > most_tokens:
            yield tuple(wave)
            wave = []
        wave.append(probe)
    if wave:
        yield tuple(wave)
