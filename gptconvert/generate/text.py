"""Continues a text with an exported model.

Greedy, or sampling with temperature, top-k and top-p (Holtzman et al. 2020), in that order, from a seeded generator.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import numpy as np

from gptconvert.containers.untrusted import boundary
from gptconvert.errors import GptConvertError, InputError, UsageError
from gptconvert.generate.directory import CONFIG, TOKENIZER, Exported, read_exported
from gptconvert.generate.sampling import Sampling, choose
from gptconvert.model.generation import SpecialIds
from gptconvert.targets.context import MOST
from gptconvert.targets.package.tokenizer_process import RemoteTokenizer, TokenizerProcess
from gptconvert.targets.registry import RUNTIMES, target_named
from gptconvert.targets.target import Runtime


def continuation(
    runtime: Runtime, prompt: Sequence[int], sampling: Sampling, stops: Container[int] = ()
) -> Iterator[int]:
    """Yield new token ids until one of ``stops``, the limit of ``sampling``, or the end of the context.

    Raises:
        InputError: the model returns logits of another shape, or that are not numbers.
    """
    random = np.random.default_rng(sampling.seed)
    ids: Sequence[int] = prompt
    for _ in range(min(sampling.max_new_tokens, runtime.n_ctx - len(prompt))):
        logits = runtime.step(ids)
        if logits.ndim != 1 or runtime.vocab_size not in (None, len(logits)):
            expected = "one number for each id of the vocabulary"
            raise InputError("the model returns other logits", expected=expected, found=f"shape {logits.shape}")
        token = choose(logits, sampling, random)
        if token in stops:
            return
        yield token
        ids = [token]


@dataclass(frozen=True)
class Continued:
    """A running continuation.

    Attributes:
        prompt: the prompt's token ids.
        pieces: pieces of text, generated when consumed; concatenated, they are the continuation.
        ids: new token ids, filled while ``pieces`` is consumed.
        n_ctx: context length of the model.
        limit: most new tokens.
        notes: for the user.
        clock: when each new token was known, in seconds.
    """

    prompt: tuple[int, ...]
    pieces: Iterator[str]
    ids: list[int]
    n_ctx: int
    limit: int
    notes: tuple[str, ...] = ()
    clock: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float | None:
        """New tokens per second after the first, whose time includes the prompt's; None with fewer than two."""
        if len(self.clock) < 2:
            return None
        return (len(self.clock) - 1) / max(self.clock[-1] - self.clock[0], 1e-9)

    @property
    def stopped(self) -> str:
        """Why the continuation ended, once ``pieces`` is consumed."""
        if len(self.ids) >= self.limit:
            return "max_new_tokens"
        return "context" if len(self.prompt) + len(self.ids) >= self.n_ctx else "end_of_text"


def generate(
    directory: str, prompt: str, sampling: Sampling, runtime: str = "onnx", variant: str | None = None
) -> Continued:
    """Continue a text with an exported model.

    Args:
        directory: the export.
        prompt: the text.
        sampling: how tokens are chosen.
        runtime: a key of ``RUNTIMES``.
        variant: of the ONNX graph: ``fp32``, ``q8``, ``q4``, ``fp16``; None for the first there is.

    Raises:
        InputError: the directory lacks the artifact, config.json or tokenizer.json; or its files are damaged, or do
            not fit together.
        UnsafeInputError: a file is not a regular one, or the graph or the tokenizer exceeds its limits.
        UnsupportedError: the runtime is not installed, or the model cannot generate.
        UsageError: the prompt is empty, fills the context or is not UTF-8.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8 text", hint="convert it first: iconv -f latin1 -t utf-8") from None
    with boundary(directory, "an export"), ExitStack() as stack:
        exported = read_exported(directory)
        path = exported.path(TOKENIZER)
        process = stack.enter_context(TokenizerProcess(path, len(exported.tokenizer)))
        tokenizer = process.load(exported.tokenizer, path)
        ids = tokenizer.encode(prompt) or _first(exported)
        if len(ids) >= exported.n_ctx:
            expected = f"fewer than {exported.n_ctx} tokens"
            raise UsageError("the prompt fills the context", expected=expected, found=len(ids))
        _check_ids(ids, exported, exported.vocab_size)
        loaded = stack.enter_context(closing(_load(exported, runtime, variant)))
        vocabulary = _vocabulary(exported, loaded)
        _check_ids(ids, exported, vocabulary)
        stops, new, clock = exported.special.stops(vocabulary), list[int](), list[float]()
        tokens = _timed(continuation(loaded, ids, sampling, stops), clock)
        pieces = _pieces(exported, tokenizer, tokens, ids, new)
        return Continued(
            tuple(ids),
            _closing(pieces, stack.pop_all(), directory),
            new,
            exported.n_ctx,
            sampling.max_new_tokens,
            _notes(exported.special, vocabulary),
            clock,
        )


def _timed(tokens: Iterator[int], clock: list[float]) -> Iterator[int]:
    """The tokens; the time of each is added to ``clock``."""
    for token in tokens:
        clock.append(time.monotonic())
        yield token


def _closing(pieces: Iterator[str], resources: ExitStack, directory: str) -> Iterator[str]:
    """The pieces; the processes end with them."""
    with boundary(directory, "an export"), resources:
        yield from pieces


def _pieces(
    exported: Exported, tokenizer: RemoteTokenizer, tokens: Iterator[int], ids: Sequence[int], new: list[int]
) -> Iterator[str]:
    shown = text = tokenizer.decode(ids)
    try:
        for token in tokens:
            new.append(token)
            # Decode the prompt too: GPT-1 puts a space before a word unless it begins the text.
            text = tokenizer.decode([*ids, *new])
            if not text.endswith("\ufffd"):  # a character may need several tokens
                yield text[len(shown) :]
                shown = text
    except GptConvertError as error:
        error.path = error.path or exported.directory
        raise
    yield text[len(shown) :]


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
    if vocabulary is not None and max(ids) >= vocabulary:
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
