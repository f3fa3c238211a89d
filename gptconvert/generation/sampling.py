"""How ``generate`` chooses tokens: options, their defaults, and the settings that result.

Names and meanings are those of transformers' ``GenerationConfig``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from gptconvert.errors import InputError, UsageError
from gptconvert.model.generation import GENERATION_DEFAULTS

EarlyStopping = Literal["false", "true", "never"]
#: New tokens, if neither the options nor the export say how many.
NEW_TOKENS = 50
#: Options that ask for sampling.
SAMPLED = ("temperature", "top_k", "top_p", "seed")


def _positive(value: Any) -> bool:
    return type(value) is int and value >= 1


def _from_zero(value: Any) -> bool:
    return type(value) is int and value >= 0


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


#: Option → what it must be: in words, and as a test.
RULES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": ("a number from 1 on", _positive),
    "temperature": ("a number from 0 on", lambda v: _finite(v) and v >= 0),
    "top_k": ("a number from 1 on", _positive),
    "top_p": ("a number above 0, up to 1", lambda v: _finite(v) and 0 < v <= 1),
    "seed": ("a number from 0 on", _from_zero),
    "max_length": ("a number from 1 on", _positive),
    "min_new_tokens": ("a number from 0 on", _from_zero),
    "repetition_penalty": ("a number above 0", lambda v: _finite(v) and v > 0),
    "no_repeat_ngram_size": ("a number from 0 on", _from_zero),
    "num_return_sequences": ("a number from 1 on", _positive),
    "num_beams": ("a number from 1 on", _positive),
    "length_penalty": ("a number", _finite),
    "early_stopping": ("one of false, true, never", lambda v: v in ("false", "true", "never")),
    "stop": ("texts that are not empty", lambda v: not isinstance(v, str) and all(map(_text, v))),
}


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


@dataclass(frozen=True)
class Sampling:
    """Options for choosing tokens. None stands for the export's ``generation_config.json``, else for the default.

    Attributes:
        max_new_tokens: most tokens to add; 50 by default.
        temperature: divides the logits; 0 takes the most likely token. By default 1 if another of ``top_k``,
            ``top_p`` and ``seed`` is given, and 0 otherwise.
        top_k: sample among this many most likely tokens.
        top_p: sample among the most likely tokens whose probabilities add up to this (Holtzman et al. 2020).
        seed: of the random numbers; 0 by default.
        max_length: most tokens of prompt and continuation.
        min_new_tokens: no end token before this many.
        repetition_penalty: divides positive logits of earlier tokens, multiplies negative ones (Keskar et al. 2019).
        no_repeat_ngram_size: no sequence of this many tokens twice; 0 for no limit.
        num_return_sequences: number of continuations.
        num_beams: beams of a beam search; 1 for none.
        length_penalty: exponent of the length that divides the score of a beam.
        early_stopping: when a beam search ends: ``true``, with as many ended beams as there are beams;
            ``false``, when better ones are unlikely; ``never``, when they are impossible.
        stop: texts that end the continuation, which does not contain them.

    Raises:
        UsageError: a value is outside its range.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    num_return_sequences: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (expected, fits) = getattr(self, field.name), RULES[field.name]
            if value is not None and not fits(value):
                raise UsageError("invalid", item=flag(field.name), expected=expected, found=value)


@dataclass(frozen=True)
class Settings:
    """Complete settings for one prompt.

    Attributes:
        samples: whether tokens are drawn.
        length: most tokens of prompt and continuation.
        limited_by: what limits it: ``max_new_tokens``, ``max_length`` or ``context``.

    The others are those of :class:`Sampling`; ``top_k`` 0 and ``top_p`` 1 stand for all tokens.
    """

    samples: bool
    length: int
    limited_by: str
    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_new_tokens: int
    repetition_penalty: float
    no_repeat_ngram_size: int
    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: str
    stop: tuple[str, ...]


def flag(option: str) -> str:
    """``--top-p`` of ``top_p``."""
    return f"--{option.replace('_', '-')}"


def stated(config: Mapping[str, object], path: str | None) -> dict[str, Any]:
    """The options that a generation_config.json sets.

    Raises:
        InputError: a value is invalid.
    """
    known = {name: value for name, value in config.items() if name in RULES and name not in ("seed", "stop")}
    found: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
    if isinstance(found.get("early_stopping"), bool):
        found["early_stopping"] = str(found["early_stopping"]).lower()
    if found.get("top_k") == 0:  # all tokens
        del found["top_k"]
    for name, value in found.items():
        expected, fits = RULES[name]
        if not fits(value):
            raise InputError(f"invalid {name}", path=path, expected=expected, found=value)
    samples = config.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise InputError("invalid do_sample", path=path, expected="true or false", found=samples)
    if samples:
        found["do_sample"] = True
        if config.get("top_k") is None:
            found["top_k"] = GENERATION_DEFAULTS["top_k"]
    return found


def settle(sampling: Sampling, defaults: Mapping[str, Any], prompt: int, n_ctx: int) -> Settings:
    """The settings for a prompt of ``prompt`` tokens.

    Raises:
        UsageError: options contradict each other, or the prompt leaves no room.
    """
    given = {f.name for f in fields(sampling) if getattr(sampling, f.name) not in (None, ())}
    asked = bool(given.intersection(SAMPLED))
    samples = (asked or (bool(defaults.get("do_sample")) and "num_beams" not in given)) and sampling.temperature != 0
    ignored = set() if samples else set(SAMPLED)  # of generation_config.json
    ignored |= {"num_beams"} if asked else set()

    def value(name: str, otherwise: Any) -> Any:
        own = getattr(sampling, name)
        if own is not None:
            return own
        return otherwise if name in ignored else defaults.get(name, otherwise)

    _check(sampling, given, asked=asked)
    length, limited_by = _length(sampling, defaults, prompt, n_ctx)
    beams, count = value("num_beams", 1), value("num_return_sequences", 1)
    if sampling.num_return_sequences is None and not samples:
        count = min(count, beams)
    if count > 1 and not samples and count > beams:
        raise UsageError(
            "there is one most likely continuation only" if beams == 1 else "more continuations than beams",
            item=flag("num_return_sequences"),
            expected="1" if beams == 1 else f"at most {beams}, as --num-beams",
            found=count,
            hint="sample with --seed or --temperature, or search with --num-beams" if beams == 1 else None,
        )
    return Settings(
        samples,
        length,
        limited_by,
        temperature=value("temperature", 1.0) if samples else 0.0,
        top_k=value("top_k", 0),
        top_p=value("top_p", 1.0),
        seed=sampling.seed or 0,
        min_new_tokens=value("min_new_tokens", 0),
        repetition_penalty=value("repetition_penalty", 1.0),
        no_repeat_ngram_size=value("no_repeat_ngram_size", 0),
        num_return_sequences=count,
        num_beams=1 if samples else beams,
        length_penalty=value("length_penalty", 1.0),
        early_stopping=value("early_stopping", "false"),
        stop=sampling.stop,
    )


def _check(sampling: Sampling, given: set[str], *, asked: bool) -> None:
    """Raise UsageError if options contradict each other."""
    drawn = [name for name in SAMPLED if name in given]
    if (sampling.num_beams or 1) > 1 and asked:
        names = " and ".join(flag(name) for name in drawn)
        raise UsageError(f"--num-beams contradicts {names}: a beam search draws nothing", hint="drop one of them")
    if sampling.temperature == 0 and len(drawn) > 1:
        names = " and ".join(flag(name) for name in drawn if name != "temperature")
        raise UsageError(f"--temperature 0 contradicts {names}: it draws nothing", hint="drop one of them")
    if (sampling.num_beams or 1) == 1:
        for name in ("length_penalty", "early_stopping"):
            if name in given:
                raise UsageError(f"{flag(name)} has no effect without --num-beams", hint="drop it, or search beams")
    if {"max_length", "max_new_tokens"} <= given:
        raise UsageError("--max-length contradicts --max-new-tokens", hint="drop one of them")


def _length(sampling: Sampling, defaults: Mapping[str, Any], prompt: int, n_ctx: int) -> tuple[int, str]:
    """Most tokens of prompt and continuation, and what limits it."""
    for source in (vars(sampling), defaults, {"max_new_tokens": NEW_TOKENS}):
        if source.get("max_new_tokens") is not None:
            length, name = prompt + source["max_new_tokens"], "max_new_tokens"
            break
        if source.get("max_length") is not None:
            length, name = source["max_length"], "max_length"
            break
    if length <= prompt:
        raise UsageError(
            "the prompt is as long as the text may be", item=flag(name), expected=f"above {prompt}", found=length
        )
    shortest = prompt + (sampling.min_new_tokens or 0)
    if shortest > min(length, n_ctx):
        raise UsageError(
            "there is no room for that many tokens",
            item=flag("min_new_tokens"),
            expected=f"at most {min(length, n_ctx) - prompt}",
            found=sampling.min_new_tokens,
        )
    return (length, name) if length <= n_ctx else (n_ctx, "context")
