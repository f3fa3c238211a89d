"""GPT-Neo's attention: global and local layers, and unscaled scores.

Source: Hugging Face ``GPTNeoConfig`` (``attention_types``, ``attention_layers``) and EleutherAI/gpt-neo, which has
only ``attention_types``.
"""

from __future__ import annotations

from gptconvert.errors import InputError
from gptconvert.model.config_table import MAX_LAYERS, Values, per_layer
from reference_model.config import GPTConfig

#: The released pattern.
DEFAULT = [[["global", "local"], 12]]


def unscaled(values: Values) -> tuple[float, ...]:
    """The score factor of each layer, 1: the usual 1 / √(features per head) went into the initial values of q."""
    return per_layer(1.0, values["n_layer"])


def windows(values: Values, key: str = "window_size") -> tuple[int | None, ...]:
    """The window of each layer (None: global), from ``attention_types``, ``attention_layers`` and ``window``.

    Args:
        values: the values read.
        key: the window's key, used in error messages.

    Raises:
        InputError: a pattern is malformed, does not have one entry per layer, or contradicts the other; or local
            layers have no window.
    """
    types, listed, layers = values["attention_types"], values["attention_layers"], values["n_layer"]
    if types is None and listed is None:
        types = DEFAULT
    kinds = expanded(types, layers) if types is not None else listed
    if listed is not None and listed != kinds:
        raise InputError(
            "attention_types and attention_layers contradict each other",
            hint="if attention_types is right, pass --ignore-key attention_layers",
        )
    if not isinstance(kinds, list) or not all(kind in ("global", "local") for kind in kinds) or len(kinds) != layers:
        raise InputError(
            "wrong attention pattern",
            item="attention_types" if types is not None else "attention_layers",
            expected=f"{layers} layers of 'global' or 'local'",
            found=repr(types if types is not None else listed)[:80],
        )
    if "local" in kinds and values["window"] < 1:
        raise InputError(
            "a local layer with a window below 1 attends to no key; transformers then averages over all tokens, "
            "later ones too, so the model is not autoregressive",
            item=key,
            expected="at least 1",
            found=values["window"],
        )
    return tuple(None if kind == "global" else values["window"] for kind in kinds)


def expanded(types: object, layers: int) -> list[str] | None:
    """[[["global", "local"], 2]] → ["global", "local", "global", "local"]; None if it is malformed or too long."""
    kinds, layers = list[str](), min(layers, MAX_LAYERS)
    for item in types if isinstance(types, list) else [None]:
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], list):
            return None
        pattern, times = item
        if not isinstance(times, int) or len(kinds) + len(pattern) * times > layers:
            return None
        kinds += pattern * times
    return kinds


def attention_layers(config: GPTConfig) -> list[str]:
    """``global`` or ``local`` for every layer."""
    return ["global" if window is None else "local" for window in config.attn_window]


def attention_types(config: GPTConfig) -> list[object]:
    """The same layers as the shortest repeating pattern and its count."""
    kinds = attention_layers(config)
    lengths = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    length = next(n for n in lengths if kinds[:n] * (len(kinds) // n) == kinds)
    return [[kinds[:length], len(kinds) // length]]


def window(config: GPTConfig) -> int:
    """The window of local layers; the released model's if all layers are global."""
    return next((window for window in config.attn_window if window is not None), 256)
