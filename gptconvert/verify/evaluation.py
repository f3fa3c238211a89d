"""What quality is measured on: windows of tokens, and what the source model computes on them. Shared by all exports.

Two kinds of text: prose that the model did not write (by default, the language reference that is part of CPython),
and tokens sampled from the source model, which are typical for it whatever it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.errors import InputError, UsageError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.verify.probes import USUAL, Integers, Probe, usual_amount
from gptconvert.verify.tasks import is_pooled
from gptconvert.verify.text import Encoder, evenly_spaced, reference_text
from reference_model.config import GPTConfig

if TYPE_CHECKING:
    from gptconvert.verify.source_model import SourceModel

#: Text is sampled only if at most this many bytes of weights must be computed instead of mapped from the source.
MOST_COMPUTED = 600 << 20
#: Seed of random tokens.
SEED = 0


@dataclass(frozen=True)
class Amount:
    """How much text. A large model gets a quarter of the windows and rows, and samples only if there is no prose.

    Attributes:
        prose_windows: windows of prose, or of random tokens if there is no text at all.
        prose_tokens: tokens in each.
        sampled_rows: rows of sampled text.
        sampled_tokens: tokens in each.
    """

    prose_windows: int = 6
    prose_tokens: int = 256
    sampled_rows: int = 16
    sampled_tokens: int = 32


#: For tasks with one output per window.
POOLED = Amount(prose_windows=48, prose_tokens=32)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What every lossy export of one source is measured on.

    Attributes:
        checkpoint: the source, with its own weights.
        encode: tokenizes a text, for the checkpoint's vocabulary; None if it has no tokenizer.
        text: of a file; None for the language reference.
        path: of that file, for errors.
        max_kl: limit of the mean KL divergence; None for each quantisation's default.
        amount: how much text; None for the usual amount.
    """

    checkpoint: Checkpoint
    encode: Encoder | None
    text: str | None = None
    path: str | None = None
    max_kl: float | None = None
    amount: Amount | None = None

    @cached_property
    def windows(self) -> tuple[Probe, ...]:
        """Prompts of up to the context length, without padding.

        Raises:
            InputError: the user's text is shorter than one window, or has tokens outside the vocabulary; or the
                checkpoint computes NaN.
            UsageError: there is a text but no tokenizer.
        """
        return tuple(_prompt(ids) for ids in (*self._prose, *self._sampled) or self._random())

    @cached_property
    def about(self) -> str:
        """The text, in a few words."""
        kinds = (
            (len(self._prose), f"windows of {self.path or 'the Python language reference'}"),
            (len(self._sampled), "samples of the source model"),
        )
        return " and ".join(f"{count} {kind}" for count, kind in kinds if count) or "random tokens"

    @cached_property
    def source(self) -> SourceModel:
        """The source model on :attr:`windows`."""
        from gptconvert.verify.source_model import SourceModel

        return SourceModel(self.checkpoint, self.windows)

    @property
    def _config(self) -> GPTConfig:
        return self.checkpoint.config

    @cached_property
    def _amount(self) -> Amount:
        return self.amount or (POOLED if is_pooled(self._config, "logits") else Amount())

    @property
    def _length(self) -> int:
        return min(self._amount.prose_tokens, self._config.n_ctx)

    @property
    def _share(self) -> int:
        """Divides the amount of text of a large model."""
        return 1 if usual_amount(self._config) is USUAL else 4

    @cached_property
    def _prose(self) -> Sequence[Integers]:
        """Evenly spaced windows of prose; none without a tokenizer, or if its ids exceed the model's."""
        if not self._amount.prose_windows:
            return []
        if self.text is not None:
            return self._of_user(self.text)
        try:
            ids = np.zeros(0, np.int64) if self.encode is None else self.encode(reference_text())
        except InputError:
            return []
        return [window for window in self._in_windows(ids) if window.max() < self._config.vocab_size]

    def _of_user(self, text: str) -> Sequence[Integers]:
        if self.encode is None:
            raise UsageError(
                f"{self.path} cannot be tokenized, because the checkpoint has no tokenizer", hint="drop the option"
            )
        ids, vocabulary = self.encode(text), self._config.vocab_size
        if len(ids) < self._length:
            raise InputError(
                "the text is shorter than one window",
                path=self.path,
                expected=f"at least {self._length} tokens",
                found=f"{len(ids)} tokens",
                hint="pass a longer text",
            )
        if ids.max() >= vocabulary:
            raise InputError(
                "the tokenizer gives this text a token that the model does not have",
                path=self.path,
                expected=f"ids below {vocabulary}",
                found=str(ids.max()),
                hint="pass another text, or a checkpoint with its own tokenizer",
            )
        return self._in_windows(ids)

    def _in_windows(self, ids: Integers) -> Sequence[Integers]:
        return evenly_spaced(ids, max(1, self._amount.prose_windows // self._share), self._length)

    @cached_property
    def _sampled(self) -> Sequence[Integers]:
        """Token sequences drawn from the source model; none for other tasks."""
        from gptconvert.verify.source_model import sample

        amount, config, special = self._amount, self._config, self.checkpoint.special_ids
        if not amount.sampled_rows or config.task != "text-generation":
            return []
        if _computed_bytes(self.checkpoint) > MOST_COMPUTED or (self._prose and self._share > 1):
            return []  # every token reads all weights
        start = next((i for i in (special.bos, *special.eos) if i is not None and i < config.vocab_size), 0)
        rows, length = max(1, amount.sampled_rows // self._share), min(amount.sampled_tokens, config.n_ctx)
        return list(sample(self.checkpoint, start, rows, length))

    def _random(self) -> Sequence[Integers]:
        count = max(1, self._amount.prose_windows // self._share)
        return list(np.random.default_rng(SEED).integers(0, self._config.vocab_size, (count, self._length)))


def _computed_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that cannot be mapped from the source's files."""
    weights = checkpoint.weights.values()
    computed = [w for w in weights if w.segments() is None and getattr(w, "base", w).segments() is None]
    return sum(weight.size * 4 for weight in computed)


def _prompt(ids: Integers) -> Probe:
    plain = np.asarray(ids, np.int64)[None]
    return Probe(("text",), plain, np.ones_like(plain), np.arange(plain.shape[1])[None], compare_presents=False)
