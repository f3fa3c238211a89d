"""Continues a text with an exported model.

Greedy, or sampling with temperature, top-k and top-p (Holtzman et al. 2020), in that order, from a seeded generator.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from gptconvert.containers.untrusted import no_such_path
from gptconvert.errors import InputError, UsageError
from gptconvert.generate.sampling import Sampling, choose
from gptconvert.model.generation import GENERATION_CONFIG, SpecialIds, special_ids
from gptconvert.targets.context import context_length
from gptconvert.targets.registry import RUNTIMES, target_named
from gptconvert.targets.target import Runtime

DIRECTORY = "pass the directory that gptconvert wrote"


def continuation(
    runtime: Runtime, prompt: Sequence[int], sampling: Sampling, stops: Container[int] = ()
) -> Iterator[int]:
    """Yield new token ids until one of ``stops``, the limit of ``sampling``, or the end of the context."""
    random = np.random.default_rng(sampling.seed)
    ids: Sequence[int] = prompt
    for _ in range(min(sampling.max_new_tokens, runtime.n_ctx - len(prompt))):
        token = choose(runtime.step(ids), sampling, random)
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
    """

    prompt: tuple[int, ...]
    pieces: Iterator[str]
    ids: list[int]
    n_ctx: int
    limit: int

    @property
    def stopped(self) -> str:
        """Why the continuation ended, once ``pieces`` is consumed."""
        if len(self.ids) >= self.limit:
            return "max_new_tokens"
        return "context" if len(self.prompt) + len(self.ids) >= self.n_ctx else "end_of_text"


def generate(directory: str, prompt: str, sampling: Sampling, runtime: str = "onnx") -> Continued:
    """Continue ``prompt`` with the model exported to ``directory``, run by ``runtime``: a key of ``RUNTIMES``.

    Raises:
        InputError: the directory lacks the artifact, config.json or tokenizer.json, or one of its files is broken.
        UnsupportedError: the runtime is not installed, or the model cannot generate.
        UsageError: the prompt is empty, fills the context or is not UTF-8.
    """
    from tokenizers import Tokenizer

    _check(directory, prompt)

    tokenizer_path = os.path.join(directory, "tokenizer.json")
    config = _read_json(os.path.join(directory, "config.json"))
    if not os.path.isfile(tokenizer_path):
        hint = "the checkpoint had no tokenizer that tokenizer.json can express; put one there if you have it"
        raise InputError("no tokenizer.json, so text cannot be tokenized", path=directory, hint=hint)
    try:
        tokenizer = Tokenizer.from_file(tokenizer_path)
    except Exception as error:
        raise InputError(f"not a tokenizer: {error}", path=tokenizer_path) from error
    ids = tokenizer.encode(prompt).ids
    special = _special_ids(directory, config)
    if not ids:  # GPT-2 begins each text after the end of another
        ids = [token for token in (special.bos, *special.eos) if token is not None][:1]
    if not ids:
        raise UsageError("the prompt is empty, and the model has no token to start with")
    n_ctx = context_length(config)
    if len(ids) >= n_ctx:
        raise UsageError("the prompt fills the context", expected=f"fewer than {n_ctx} tokens", found=len(ids))
    loaded = _load(directory, config, runtime)
    new: list[int] = []

    def pieces() -> Iterator[str]:
        shown = text = tokenizer.decode(ids, skip_special_tokens=False)
        with closing(loaded):
            for token in continuation(loaded, ids, sampling, special.eos):
                new.append(token)
                # Decode the prompt too: GPT-1 puts a space before a word unless it begins the text.
                text = tokenizer.decode([*ids, *new], skip_special_tokens=False)
                if not text.endswith("\ufffd"):  # a character may need several tokens
                    yield text[len(shown) :]
                    shown = text
        yield text[len(shown) :]

    return Continued(tuple(ids), pieces(), new, n_ctx, sampling.max_new_tokens)


def _check(directory: str, prompt: str) -> None:
    if not os.path.lexists(directory):
        raise no_such_path(directory, hub=False)
    if not os.path.isdir(directory):
        raise InputError("not a directory", path=directory, hint=DIRECTORY)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8 text", hint="convert it first: iconv -f latin1 -t utf-8") from None


def _load(directory: str, config: Mapping[str, object], runtime: str) -> Runtime:
    """The export in ``directory``, run by ``runtime``: a key of ``RUNTIMES``."""
    if runtime not in RUNTIMES:
        raise UsageError("no such runtime", item="--runtime", expected=f"one of {', '.join(RUNTIMES)}", found=runtime)
    load = target_named(RUNTIMES[runtime]).load
    if load is None:
        raise UsageError(f"{RUNTIMES[runtime]} exports cannot be run", item="--runtime")
    return load(directory, config)


def _special_ids(directory: str, config: Mapping[str, object]) -> SpecialIds:
    """The ids of generation_config.json, if there is one, and of config.json."""
    path = os.path.join(directory, GENERATION_CONFIG)
    own = _read_json(path) if os.path.isfile(path) else {}
    return special_ids((own, path), (config, os.path.join(directory, "config.json")))


def _read_json(path: str) -> Mapping[str, object]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        raise InputError("no such file", path=path, hint=DIRECTORY) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", path=path)
    return value
