"""The part of config.json that running an export needs."""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.errors import InputError


def context_length(config: Mapping[str, object]) -> int:
    """The longest sequence that a config.json allows.

    Raises:
        InputError: the config.json has no context length.
    """
    for key in ("n_positions", "n_ctx", "max_position_embeddings"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise InputError("config.json has no context length", expected="n_positions or max_position_embeddings")
