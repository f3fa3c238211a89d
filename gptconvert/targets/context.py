"""The part of config.json that running an export needs."""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.errors import InputError
from gptconvert.model.config_kinds import wrong

#: Keys of the context length and of the number of ids, in all families.
CONTEXT, VOCABULARY = ("n_positions", "n_ctx", "max_position_embeddings"), "vocab_size"
#: Above any model's, and below what counting tokens could overflow.
MOST = 1 << 31


def context_length(config: Mapping[str, object]) -> int:
    """The longest sequence that a config.json allows.

    Raises:
        InputError: the config.json has no context length, or an impossible one.
    """
    for key in CONTEXT:
        if config.get(key) is not None:
            return _size(key, config[key])
    raise InputError("config.json has no context length", expected="n_positions or max_position_embeddings")


def vocabulary_size(config: Mapping[str, object]) -> int | None:
    """The number of ids that a config.json states; None if it does not. Raises as :func:`context_length`."""
    return None if config.get(VOCABULARY) is None else _size(VOCABULARY, config[VOCABULARY])


def _size(key: str, value: object) -> int:
    if type(value) is not int or not 0 < value < MOST:
        raise wrong(key, f"a whole number from 1 to {MOST - 1}", value)
    return value
