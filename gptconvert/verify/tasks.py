"""Shapes of each task's outputs, and the token that a pooled output is taken from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gptconvert.verify.probes import Integers, Probe
from reference_model.config import GPTConfig

#: Shape of every output, in symbols: B batch, S new tokens, V, D, K as in ``reference_model/config.py``.
SHAPES: Mapping[str, Mapping[str, str]] = {
    "text-generation": {"logits": "B S V"},
    "feature-extraction": {"last_hidden_state": "B S D"},
    "text-classification": {"logits": "B K"},
    "token-classification": {"logits": "B S K"},
    "question-answering": {"start_logits": "B S", "end_logits": "B S"},
    "multiple-choice": {"logits": "1 B S V", "mc_logits": "1 B"},  # one question with B choices
}


def shape_of(config: GPTConfig, output: str, batch: int, new_tokens: int) -> tuple[int, ...]:
    """The expected shape of an output."""
    sizes = {"B": batch, "S": new_tokens, "V": config.vocab_size, "D": config.n_embd, "K": config.n_labels, "1": 1}
    if config.last_token:
        sizes["S"] = 1
    return tuple(sizes[symbol] for symbol in SHAPES[config.task][output].split())


def is_pooled(config: GPTConfig, output: str) -> bool:
    """Whether an output has one row per sequence instead of one per token."""
    return config.last_token or "S" not in SHAPES[config.task][output].split()


def pooled_tokens(config: GPTConfig, probe: Probe) -> Integers:
    """Index [B], among the S new tokens, of the token that each row's pooled output is taken from.

    In multiple choice the caller chooses it, here the last real token, which ``last_token`` returns too.
    Classification takes the last token that does not have the padding id, which probes have at padding and nowhere
    else: the very last one if no token has that id.
    """
    new_tokens = probe.input_ids.shape[1]
    if config.task == "text-classification":
        real = probe.input_ids != (-1 if config.padding_id is None else config.padding_id)
    else:
        real = probe.attention_mask[:, probe.past_length :] != 0
    return np.asarray((np.arange(new_tokens) * real).argmax(1), np.int64)
