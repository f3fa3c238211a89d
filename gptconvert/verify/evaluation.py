"""The text that quality is measured on, and what the source model computes on it. Shared by all lossy exports.

Two kinds of text: prose that the model did not write (by default, the language reference that is part of CPython),
and tokens sampled from the source model, which are typical for it whatever it was trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.containers.untrusted import read_small
from gptconvert.errors import InputError, UsageError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.verify.probes import USUAL, Integers, Probe, usual_amount
from gptconvert.verify.truth import PrecisionPass, TruthPass, tensor_of
from reference_model.config import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor

#: Text is sampled only if at most this many bytes of weights must be computed instead of mapped from the source.
MOST_COMPUTED = 600 << 20
#: Largest text file.
MAX_TEXT = 64 << 20
#: Tasks whose output ``logits`` is a distribution over tokens or labels.
MEASURED_TASKS = ("text-generation", "text-classification", "token-classification")
#: Seed of sampled text.
SEED = 0


@dataclass(frozen=True)
class Amount:
    """How much text. A large model gets a quarter of the windows and rows.

    Attributes:
        prose_windows: windows of prose.
        prose_tokens: tokens in each.
        sampled_rows: rows of sampled text.
        sampled_tokens: tokens in each.
    """

    prose_windows: int = 6
    prose_tokens: int = 256
    sampled_rows: int = 8
    sampled_tokens: int = 64


def reference_text() -> str:
    """The language reference in CPython's help topics: English prose with code, about 465 kB."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read_text(path: str) -> str:
    """A text file.

    Raises:
        InputError: it cannot be read, is empty, too large or not UTF-8.
    """
    try:
        text = read_small(path, MAX_TEXT, "a text").decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "the text is not UTF-8", path=path, found=str(error), hint="convert it: iconv -f latin1 -t utf-8"
        ) from None
    if not text.strip():
        raise InputError("the text is empty", path=path)
    return text


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What every lossy export of one source is measured on.

    Attributes:
        checkpoint: the source, with its own weights.
        tokenizer: content of tokenizer.json; None if there is none.
        text: of a file; None for the language reference.
        path: of that file, for errors.
        max_kl: limit of the mean KL divergence; None for each quantisation's default.
        amount: how much text.
    """

    checkpoint: Checkpoint
    tokenizer: bytes | None
    text: str | None = None
    path: str | None = None
    max_kl: float | None = None
    amount: Amount = Amount()

    @functools.cached_property
    def windows(self) -> tuple[Probe, ...]:
        """Prompts of up to the context length, without padding."""
        rows = [*self._prose(), *self._sampled()]
        if not rows:
            rows = list(np.random.default_rng(SEED).integers(0, self._config.vocab_size, (4, self._length)))
        return tuple(_prompt(ids) for ids in rows)

    @property
    def about(self) -> str:
        """The text, in a few words."""
        parts = [f"{len(self._prose())} windows of {self.path or 'the Python language reference'}"] * bool(
            self._prose()
        )
        parts += [f"{len(self._sampled())} samples of the source model"] * bool(len(self._sampled()))
        return " and ".join(parts) or "random tokens"

    @functools.cached_property
    def source(self) -> SourceModel:
        """The source model on :attr:`windows`."""
        return SourceModel(self.checkpoint, self.windows)

    @property
    def _config(self) -> GPTConfig:
        return self.checkpoint.config

    @property
    def _length(self) -> int:
        return min(self.amount.prose_tokens, self._config.n_ctx)

    @property
    def _share(self) -> int:
        """Divides the amount of text of a large model."""
        return 1 if usual_amount(self._config) is USUAL else 4

    @functools.cache  # noqa: B019 - as long-lived as the object
    def _prose(self) -> Sequence[Integers]:
        """Evenly spaced windows of prose.

        Raises:
            InputError: the user's text is shorter than one window, or has tokens outside the vocabulary.
            UsageError: there is a text but no tokenizer.
        """
        if not self.amount.prose_windows:
            return []
        if self.tokenizer is None:
            if self.text is not None:
                raise UsageError(
                    f"{self.path} cannot be tokenized, because the checkpoint has no tokenizer",
                    hint="drop the option",
                )
            return []
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer.decode())
        ids = np.asarray(tokenizer.encode(self.text or reference_text(), add_special_tokens=False).ids, np.int64)
        if self.text is not None and len(ids) < self._length:
            raise InputError(
                "the text is shorter than one window",
                path=self.path,
                expected=f"at least {self._length} tokens",
                found=f"{len(ids)} tokens",
            )
        count = max(1, min(self.amount.prose_windows // self._share, len(ids) // self._length))
        starts = np.linspace(0, max(0, len(ids) - self._length), count).astype(int)
        windows = [ids[start : start + self._length] for start in starts]
        return [w for w in windows if len(w) and w.max() < self._config.vocab_size]

    @functools.cache  # noqa: B019
    def _sampled(self) -> Sequence[Integers]:
        """Token sequences drawn from the source model [rows, tokens]; none for other tasks."""
        if not self.amount.sampled_rows:
            return []
        if self._config.task != "text-generation" or _computed_bytes(self.checkpoint) > MOST_COMPUTED:
            return []
        first = self.checkpoint.special_ids.bos
        stops = self.checkpoint.special_ids.eos
        start = first if first is not None else stops[0] if stops else 0
        rows = max(1, self.amount.sampled_rows // self._share)
        return list(
            sample(
                self.checkpoint,
                min(start, self._config.vocab_size - 1),
                rows,
                min(self.amount.sampled_tokens, self._config.n_ctx),
            )
        )


def _computed_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that cannot be mapped from the source's files."""
    computed = [
        w for w in checkpoint.weights.values() if w.segments() is None and getattr(w, "base", w).segments() is None
    ]
    return sum(weight.size * 4 for weight in computed)


def _prompt(ids: Integers) -> Probe:
    plain = np.asarray(ids, np.int64)[None]
    return Probe(("text",), plain, np.ones_like(plain), np.arange(plain.shape[1])[None], compare_presents=False)


def sample(checkpoint: Checkpoint, start: int, rows: int, length: int) -> Integers:
    """Token ids [rows, length] drawn from the model after the id ``start``, which is the first of each row."""
    import torch

    from reference_model.model import GPT

    weights = {name: tensor_of(weight.read()) for name, weight in checkpoint.weights.items()}
    pass_ = PrecisionPass(torch.float32, torch.empty(1 << 19, dtype=torch.float64))
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    pass_.fill(model, weights, checkpoint.config, "")
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.full((rows, 1), start)
    past = None
    with torch.no_grad():
        for position in range(length - 1):
            places = torch.full((rows, 1), position)
            logits, past = model(ids[:, -1:], torch.ones(rows, position + 1), places, past)
            drawn = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, drawn), 1)
    return ids.numpy()


class SourceModel(TruthPass):
    """The source model on some windows, in float32: at most one block of it is in memory, and then its head.

    float32 is enough: its rounding moves a KL divergence by less than 1e-9.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Probe]) -> None:
        super().__init__(checkpoint, windows, "float32", presents=False)
        self.passes = self.passes[1:]
        self.run()

    def _head(self, xs: list[Tensor]) -> None:
        import torch

        from reference_model.model import Head, canonical_name

        self.hidden = xs[0][0]  # (N, D)
        with torch.device("meta"):
            self._module = Head(self.config)
        names = [canonical_name(f"head.{name}", self.config) for name, _ in self._module.named_parameters()]
        stored = {name: tensor_of(self.weights[name].read()) for name in names}
        self.passes[0].fill(self._module, stored, self.config, "head.")

    def logits(self, window: Probe, step: int = 64) -> Iterator[tuple[slice, Tensor]]:
        """(tokens, logits [n, V]) of a window, a few tokens at a time."""
        import torch

        (tokens,) = (row.tokens for row in self.truth.pack.rows if row.probe is window)
        for start in range(0, len(tokens), step):
            some = slice(start, min(start + step, len(tokens)))
            with torch.no_grad():
                yield some, self._module.per_token(self.hidden[None, tokens[some]])["logits"][0]
