"""Runs a candidate on every probe, whole and in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from gptconvert.verify.probes import Probe
from gptconvert.verify.runners import Feeds, Outputs, RunError, Runner
from gptconvert.verify.tasks import pooled_tokens
from reference_model.config import GPTConfig

#: (probe, whether it was fed in chunks) → outputs or error.
ProbeResults = Mapping[tuple[Probe, bool], Outputs | RunError]


def run_probes(
    runner: Runner, probes: Iterable[Probe], config: GPTConfig, advance: Callable[[int], None] | None = None
) -> ProbeResults:
    """Run every probe whole, and in chunks if it has any. ``advance(1)`` is called after each."""
    answers: dict[tuple[Probe, bool], Outputs | RunError] = {}
    firsts: list[tuple[Probe, Outputs]] = []
    for probe in probes:
        answers[probe, False] = answer = _tried(whole, runner, probe, config)
        if isinstance(answer, Outputs) and probe.is_prompt() and probe.tokens == 1:
            firsts.append((probe, answer))
        if probe.chunks:
            start = probe.beginning(1)
            known = [outputs for one, outputs in firsts if np.array_equal(one.input_ids, start.input_ids)]
            first = known[0] if known else None
            answers[probe, True] = _tried(in_chunks, runner, probe, config, first)
        if advance is not None:
            advance(1)
    return answers


def _tried(run: Callable[..., Outputs], *arguments: object) -> Outputs | RunError:
    try:
        return run(*arguments)
    except RunError as error:
        return error


def feeds_of(probe: Probe, config: GPTConfig) -> Feeds:
    """The input arrays of a probe."""
    past = [probe.past(i, config) for i in range(config.n_layer)] if probe.past_length else []
    chosen = pooled_tokens(config, probe) if config.task == "multiple-choice" else None
    return Feeds(probe.input_ids, probe.attention_mask, probe.position_ids, past, chosen)


def whole(runner: Runner, probe: Probe, config: GPTConfig) -> Outputs:
    """Run a probe in one call."""
    return runner.run(feeds_of(probe, config), runner.kv_cache and probe.compare_presents)


def in_chunks(runner: Runner, probe: Probe, config: GPTConfig, first: Outputs | None = None) -> Outputs:
    """Run a probe chunk by chunk, each with the keys and values that the candidate returned for the one before.

    ``first`` is its output for the first token, if known.
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
    if config.last_token:
        return Outputs(pieces[-1].named, pieces[-1].presents if probe.compare_presents else ())
    try:
        named = {name: np.concatenate([piece.named[name] for piece in pieces], 1) for name in pieces[0].named}
    except ValueError as error:  # shapes that depend on more than the number of tokens
        raise RunError(f"the chunks' outputs do not fit together: {error}") from error
    return Outputs(named, pieces[-1].presents if probe.compare_presents else ())
