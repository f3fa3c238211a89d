"""A loaded export that continues texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.untrusted import boundary
from gptconvert.errors import GptConvertError, UsageError
from gptconvert.generation.checks import check_ids, first_ids, notes_on, runtime_of, vocabulary_of
from gptconvert.generation.directory import TOKENIZER, read_exported
from gptconvert.generation.processors import needed
from gptconvert.generation.results import END, STOP, Continuation, Continued, Generated, reason, speed_of
from gptconvert.generation.sampling import Sampling, Settings, settle
from gptconvert.generation.search import beam_search, decode, never
from gptconvert.generation.stop import Stop
from gptconvert.targets.package.tokenizer_process import TokenizerProcess


class Model:
    """A loaded export. It can continue one text after another; use it as a context manager, or close it.

    Args:
        directory: the export.
        runtime: ``onnx``, ``tf`` or ``torch``.
        variant: of the ONNX graph: ``fp32``, ``q8``, ``q4``, ``fp16``, ``bf16``; None for the first there is.

    Attributes:
        n_ctx: context length in tokens.
        vocab_size: number of token ids.
        notes: for the user.

    Raises:
        InputError: the directory lacks the artifact, config.json or tokenizer.json; or its files are damaged, or do
            not fit together.
        UnsafeInputError: a file is not a regular one, or the graph or the tokenizer exceeds its limits.
        UnsupportedError: the runtime is not installed, or the model cannot generate.
        UsageError: no such runtime or variant.
    """

    def __init__(self, directory: str, runtime: str = "onnx", variant: str | None = None) -> None:
        with self._boundary(directory), ExitStack() as stack:
            self._exported = exported = read_exported(directory)
            path = exported.path(TOKENIZER)
            process = stack.enter_context(TokenizerProcess(path, len(exported.tokenizer)))
            self._tokenizer = process.load(exported.tokenizer, path)
            self._runtime = stack.enter_context(closing(runtime_of(exported, runtime, variant)))
            self.vocab_size = vocabulary_of(exported, self._runtime)
            self.n_ctx = self._runtime.n_ctx
            self._stops = exported.special.stops(self.vocab_size)
            self.notes = notes_on(exported.special, self.vocab_size)
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that run the model and the tokenizer."""
        self._resources.close()

    def __repr__(self) -> str:
        return f"<Model {self._exported.directory}: {self.vocab_size} ids, context of {self.n_ctx} tokens>"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            UsageError: it is not UTF-8.
            InputError: the tokenizer gives it an id that the model does not have.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            hint = "convert it first: iconv -f latin1 -t utf-8"
            raise UsageError("the prompt is not UTF-8 text", hint=hint) from None
        with self._boundary():
            ids = self._tokenizer.encode(text)
        check_ids(ids, self._exported, self.vocab_size)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        with self._boundary():
            return self._tokenizer.decode(list(ids))

    def logits(self, prompt: str | Sequence[int]) -> NDArray[np.float32]:
        """Logits [V] of the token that follows a text or token ids. Raises as :meth:`generate`."""
        with self._boundary():
            ids = self._prompt(prompt)
            self._runtime.reset()
            logits: NDArray[np.float32] = self._runtime.step([ids], [0])[0]
            return logits

    def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generated:
        """All continuations of a text or of token ids.

        Raises:
            UsageError: the prompt is empty or fills the context, or options contradict each other.
            InputError: the model computes logits that are not numbers, or of another shape.
        """
        ids, settings = self._settled(prompt, sampling)
        stop = self._stop(ids, settings)
        with self._boundary():
            find = self._beams if settings.num_beams > 1 else self._rows
            found, speed = find(ids, settings, stop)
            start = self.decode(ids)
            return Generated(start if not isinstance(prompt, str) else prompt, tuple(ids), tuple(found), speed)

    def settings(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Settings:
        """What the options come to for a prompt, with the export's defaults. Raises as :meth:`generate`."""
        return self._settled(prompt, sampling)[1]

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Continued:
        """One continuation, in pieces. Raises as :meth:`generate`.

        Raises:
            UsageError: several continuations, or a beam search, which finds its text at the end.
        """
        ids, settings = self._settled(prompt, sampling)
        if settings.num_beams > 1 or settings.num_return_sequences > 1:
            raise UsageError("only a single continuation can be streamed", hint="call generate")
        stop, new, clock = self._stop(ids, settings), list[int](), list[float]()
        return Continued(tuple(ids), self._pieces(ids, settings, stop, new, clock), new, settings, stop, clock)

    @contextmanager
    def _boundary(self, directory: str | None = None) -> Iterator[None]:
        """The boundary of an export; errors that name no file name the directory."""
        where = directory or self._exported.directory
        with boundary(where, "an export"):
            try:
                yield
            except UsageError:
                raise
            except GptConvertError as error:
                error.path = error.path or where
                raise

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        exported = self._exported
        ids = (self.encode(prompt) if isinstance(prompt, str) else [*prompt]) or first_ids(exported)
        if len(ids) >= self.n_ctx:
            expected = f"fewer than {self.n_ctx} tokens"
            raise UsageError("the prompt fills the context", expected=expected, found=len(ids))
        if not isinstance(prompt, str) and not all(0 <= token < self.vocab_size for token in ids):
            raise UsageError("not a token id", item="prompt", expected=f"ids below {self.vocab_size}", found=ids)
        return ids

    def _settled(self, prompt: str | Sequence[int], sampling: Sampling | None) -> tuple[list[int], Settings]:
        ids = self._prompt(prompt)
        return ids, settle(sampling or Sampling(), self._exported.defaults, len(ids), self.n_ctx)

    def _stop(self, ids: Sequence[int], settings: Settings) -> Stop:
        return Stop(settings.stop, lambda new: self._new_text(ids, new))

    def _new_text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Decode the prompt too: GPT-1 puts a space before a word unless it begins the text."""
        return self.decode([*prompt, *new])[len(self.decode(prompt)) :]

    def _rows(self, ids: list[int], settings: Settings, stop: Stop) -> tuple[list[Continuation], float | None]:
        """Greedy or sampled continuations."""
        self._runtime.reset(needed(settings))
        rows = [list[int]() for _ in range(settings.num_return_sequences)]
        ended, clock = set[int](), list[float]()
        for tokens in decode(self._runtime, ids, settings, self._stops, stop.ends if settings.stop else never):
            clock += [time.monotonic()] * sum(token is not None for _, token in tokens)
            for row, token in tokens:
                if token is None:
                    ended.add(row)
                else:
                    rows[row].append(token)
        found = [self._continuation(ids, new, settings, stop, row in ended) for row, new in enumerate(rows)]
        return found, speed_of(clock)

    def _beams(self, ids: list[int], settings: Settings, stop: Stop) -> tuple[list[Continuation], float | None]:
        """Continuations of a beam search."""
        self._runtime.reset()
        begun = time.monotonic()
        beams = beam_search(self._runtime, ids, settings, self._stops, stop.ends if settings.stop else never)
        seconds = max(time.monotonic() - begun, 1e-9)
        found = [self._continuation(ids, list(b.ids), settings, stop, b.ended, b.score) for b in beams]
        return found, max(len(beam.ids) for beam in beams) / seconds

    def _continuation(
        self,
        ids: list[int],
        new: list[int],
        settings: Settings,
        stop: Stop,
        ended: bool,
        score: float | None = None,
    ) -> Continuation:
        text, found = stop.cut(self._new_text(ids, new))
        why = STOP if found else END if ended else reason(settings, len(ids), len(new), stop=False)
        return Continuation(text, tuple(new), why, score)

    def _pieces(
        self, ids: list[int], settings: Settings, stop: Stop, new: list[int], clock: list[float]
    ) -> Iterator[str]:
        """Pieces of the text, each as long as what follows cannot change it."""
        with self._boundary():
            self._runtime.reset(needed(settings))
            shown = 0
            for ((_, token),) in decode(self._runtime, ids, settings, self._stops):
                if token is None:
                    break
                clock.append(time.monotonic())
                new.append(token)
                text, found = stop.cut(self._new_text(ids, new))
                if found:
                    stop.found = True
                    yield text[shown:]
                    return
                sure = stop.certain(text)
                if sure > shown and not text.endswith("\ufffd"):  # a character may need several tokens
                    yield text[shown:sure]
                    shown = sure
            yield self._new_text(ids, new)[shown:]


def load(directory: str, runtime: str = "onnx", variant: str | None = None) -> Model:
    """Load an export; see :class:`Model`."""
    return Model(directory, runtime, variant)


def generate(
    directory: str,
    prompt: str,
    sampling: Sampling | None = None,
    runtime: str = "onnx",
    variant: str | None = None,
) -> Generated:
    """Continue a text with an export: :func:`load` and :meth:`Model.generate`, whose errors it raises."""
    with load(directory, runtime, variant) as model:
        return model.generate(prompt, sampling)
