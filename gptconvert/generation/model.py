"""A loaded export that continues texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.untrusted import boundary
from gptconvert.errors import InputError, UsageError
from gptconvert.generation.directory import CONFIG, TOKENIZER, Exported, read_exported
from gptconvert.generation.sampling import Sampling, Settings, settle
from gptconvert.generation.search import beam_search, decode, never
from gptconvert.generation.stop import Stop
from gptconvert.model.generation import SpecialIds
from gptconvert.targets.context import MOST
from gptconvert.targets.package.tokenizer_process import TokenizerProcess
from gptconvert.targets.registry import RUNTIMES, target_named
from gptconvert.targets.target import Runtime

#: Why a continuation ended.
END, STOP = "end_of_text", "stop"


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
        text: without the prompt.
        ids: new token ids, without an end token.
        stopped: ``end_of_text``, ``stop``, ``max_new_tokens``, ``max_length`` or ``context``.
        score: of a beam search: sum of log-probabilities over the length to the power of the length penalty.
    """

    text: str
    ids: tuple[int, ...]
    stopped: str
    score: float | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values."""
        score = {} if self.score is None else {"score": self.score}
        return {"text": self.text, "ids": self.ids, "stopped": self.stopped, **score}


@dataclass(frozen=True)
class Generated:
    """All continuations of a prompt.

    Attributes:
        prompt: the text.
        prompt_ids: its token ids.
        continuations: the best first, if they have scores.
        speed: new tokens per second after the first, in all rows; None with fewer than two.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    continuations: tuple[Continuation, ...]
    speed: float | None

    @property
    def text(self) -> str:
        """The first continuation, without the prompt."""
        return self.continuations[0].text

    def __str__(self) -> str:
        return "\n\n".join(f"{self.prompt}{each.text}" for each in self.continuations)

    def as_dict(self) -> dict[str, object]:
        """Plain values: those of the first continuation, and all."""
        first, rate = self.continuations[0], None if self.speed is None else round(self.speed, 1)
        return {
            "prompt": self.prompt,
            "prompt_ids": self.prompt_ids,
            **first.as_dict(),
            "continuations": [each.as_dict() for each in self.continuations],
            "tokens_per_second": rate,
        }


@dataclass(frozen=True)
class Continued:
    """A running continuation.

    Attributes:
        prompt: the prompt's token ids.
        pieces: pieces of text, generated when consumed; concatenated, they are the continuation.
        ids: new token ids, filled while ``pieces`` is consumed.
        settings: how tokens are chosen.
        stop: the stop texts, and whether one was found.
        clock: when each new token was known, in seconds.
    """

    prompt: tuple[int, ...]
    pieces: Iterator[str]
    ids: list[int]
    settings: Settings
    stop: Stop
    clock: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float | None:
        """New tokens per second after the first, whose time includes the prompt's; None with fewer than two."""
        return _speed(self.clock)

    @property
    def stopped(self) -> str:
        """Why the continuation ended, once ``pieces`` is consumed; see :class:`Continuation`."""
        return _reason(self.settings, len(self.prompt), len(self.ids), stop=self.stop.found)


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
            self._runtime = stack.enter_context(closing(_load(exported, runtime, variant)))
            self.vocab_size = _vocabulary(exported, self._runtime)
            self.n_ctx = self._runtime.n_ctx
            self._stops = exported.special.stops(self.vocab_size)
            self.notes = _notes(exported.special, self.vocab_size)
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
        _check_ids(ids, self._exported, self.vocab_size)
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
            return self._runtime.step([ids], [0])[0]

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
        """What the options come to for a prompt, with the export's own defaults. Raises UsageError as :meth:`generate`."""
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

    def _boundary(self, directory: str | None = None) -> AbstractContextManager[None]:
        return boundary(directory or self._exported.directory, "an export")

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        exported = self._exported
        ids = (self.encode(prompt) if isinstance(prompt, str) else [*prompt]) or _first(exported)
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
        self._runtime.reset()
        rows = [list[int]() for _ in range(settings.num_return_sequences)]
        ended, clock = set[int](), list[float]()
        for tokens in decode(self._runtime, ids, settings, self._stops, stop.ends if settings.stop else never):
            clock += [time.monotonic()] * sum(token is not None for _, token in tokens)
            for row, token in tokens:
                if token is None:
                    ended.add(row)
                else:
                    rows[row].append(token)
        return [self._continuation(ids, new, settings, stop, row in ended) for row, new in enumerate(rows)], _speed(
            clock
        )

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
        reason = STOP if found else END if ended else _reason(settings, len(ids), len(new), stop=False)
        return Continuation(text, tuple(new), reason, score)

    def _pieces(
        self, ids: list[int], settings: Settings, stop: Stop, new: list[int], clock: list[float]
    ) -> Iterator[str]:
        """Pieces of the text, each as long as what follows cannot change it."""
        with self._boundary():
            self._runtime.reset()
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


def _speed(clock: Sequence[float]) -> float | None:
    return None if len(clock) < 2 else (len(clock) - 1) / max(clock[-1] - clock[0], 1e-9)


def _reason(settings: Settings, prompt: int, new: int, *, stop: bool) -> str:
    if stop:
        return STOP
    return settings.limited_by if prompt + new >= settings.length else END


def _first(exported: Exported) -> list[int]:
    """The token that begins a text; GPT-2 begins each after the end of another."""
    special, most = exported.special, exported.vocab_size
    ids = (token for token in (special.bos, *special.eos) if token is not None)
    first = [token for token in ids if token >= 0 and (most is None or token < most)][:1]
    if not first:
        raise UsageError("the prompt is empty, and the model has no token to start with")
    return first


def _check_ids(ids: Sequence[int], exported: Exported, vocabulary: int | None) -> None:
    """Refuse a prompt with ids that the model lacks: its tokenizer is another model's."""
    if ids and vocabulary is not None and max(ids) >= vocabulary:
        raise InputError(
            "the tokenizer gives the prompt an id that the model does not have",
            path=exported.path(TOKENIZER),
            expected=f"ids below {vocabulary}",
            found=max(ids),
            hint="put the tokenizer of this model there",
        )


def _vocabulary(exported: Exported, loaded: Runtime) -> int:
    """The number of ids, on which config.json and the artifact must agree."""
    stated, found = exported.vocab_size, loaded.vocab_size
    if stated is not None and found is not None and stated != found:
        path, hint = exported.path(CONFIG), "config.json and the model belong to different checkpoints"
        raise InputError(
            "vocab_size is not that of the model", path=path, expected=f"{found} ids", found=stated, hint=hint
        )
    return found or stated or MOST


def _notes(special: SpecialIds, vocabulary: int) -> tuple[str, ...]:
    outside = sorted(set(special.eos) - set(special.stops(vocabulary)))
    shown = f"{', '.join(map(str, outside[:5]))}{', …' if len(outside) > 5 else ''}"
    note = f"the text does not end at eos_token_id {shown}: the model has {vocabulary} ids"
    return (note,) if outside else ()


def _load(exported: Exported, runtime: str, variant: str | None) -> Runtime:
    """The artifact, run by ``runtime``: a key of ``RUNTIMES``."""
    if runtime not in RUNTIMES:
        raise UsageError("no such runtime", item="--runtime", expected=f"one of {', '.join(RUNTIMES)}", found=runtime)
    load = target_named(RUNTIMES[runtime]).load
    if load is None:
        raise UsageError(f"{RUNTIMES[runtime]} exports cannot be run", item="--runtime")
    if variant is None:
        return load(exported.directory, exported.config)
    if runtime != "onnx":
        raise UsageError(
            f"--variant has no effect with --runtime {runtime}",
            hint="drop one of the options: variants are ONNX graphs",
        )
    from gptconvert.targets.onnx.run import VARIANTS, OnnxRuntime

    if variant not in VARIANTS:
        raise UsageError("no such variant", item="--variant", expected=f"one of {', '.join(VARIANTS)}", found=variant)
    return OnnxRuntime(exported.directory, exported.config, variant)
