"""A readable summary of an architecture, for ``gptconvert inspect``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Activations whose formula the name does not tell.
ACTIVATIONS = {
    "gelu_tanh": "GELU (tanh approximation)",
    "gelu_erf": "GELU (exact, erf)",
    "gelu_erf_10": "GELU (exact, erf), clipped to ±10",
    "gelu_sigmoid": "GELU (sigmoid approximation)",
    "relu_squared": "squared ReLU",
    "leaky_relu": "leaky ReLU, slope 0.01",
    "sqrt_softplus": "square root of softplus",
    "linear": "none (linear)",
}
RESIDUALS = {
    "serial": "attention then MLP",
    "parallel": "attention and MLP in parallel",
    "parallel_one_norm": "attention and MLP in parallel, after one norm",
}


def config_summary(config: Mapping[str, Any], special_ids: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(property, description) of an architecture.

    Args:
        config: ``GPTConfig.as_dict()``.
        special_ids: ``bos``, ``eos`` (several) and ``pad``.
    """
    known = {**config, "special_ids": special_ids}
    return [(name, describe(known)) for name, describe in ROWS.items()]


def _width(config: Mapping[str, Any]) -> str:
    heads, width = config["n_head"], config["n_embd"]
    return f"{width}, {heads} heads of {width // heads}, MLP of {config['n_inner']}"


def _vocabulary(config: Mapping[str, Any]) -> str:
    bos, eos, pad = (config["special_ids"][name] for name in ("bos", "eos", "pad"))
    special = {"bos": bos, "eos": " or ".join(map(str, eos)) or None, "pad": pad}
    named = [f"{name} {token}" for name, token in special.items() if token is not None]
    return ", ".join([f"{config['vocab_size']} tokens", *named])


def _positions(config: Mapping[str, Any]) -> str:
    rotary = config["rotary"]
    if rotary is None:
        return "learned"
    pairs = "interleaved pairs" if rotary["interleaved"] else "split in halves"
    head_dim = config["n_embd"] // config["n_head"]
    if not rotary["dim"]:
        return "none (rotary on 0 features)"
    scaling = rotary["scaling"]
    scaled = f", {scaling['kind']} scaling by {scaling['factor']:g}" if scaling else ""
    return f"rotary on {rotary['dim']} of {head_dim} features, {pairs}, base {rotary['base']:g}{scaled}"


def _attention(config: Mapping[str, Any]) -> str:
    reach = _per_layer(config["attn_window"], lambda window: "full" if window is None else f"last {window} tokens")
    return f"{reach}; scores {_scale(config)}"


def _scale(config: Mapping[str, Any]) -> str:
    """The scale of the attention scores."""
    scales, head_dim = config["attn_scale"], config["n_embd"] // config["n_head"]
    usual = head_dim**-0.5
    if all(math.isclose(scale, usual) for scale in scales):
        return f"divided by √{head_dim}"
    if all(math.isclose(scale, usual / (i + 1)) for i, scale in enumerate(scales)):
        return f"divided by √{head_dim} and by the layer number (from 1)"
    return _per_layer(scales, lambda scale: "not scaled" if scale == 1 else f"times {scale:.4g}")


def _per_layer(values: Sequence[Any], describe: Callable[[Any], str]) -> str:
    """A value per layer: one value if constant, the period if short, otherwise the number of layers per value."""
    period = next(p for p in range(1, len(values) + 1) if all(v == values[i % p] for i, v in enumerate(values)))
    if period == 1:
        return describe(values[0])
    if period <= 4:
        return f"{', '.join(map(describe, values[:period]))}, in turn"
    counts = {value: values.count(value) for value in values}
    return ", ".join(f"{describe(value)} in {n} {'layer' if n == 1 else 'layers'}" for value, n in counts.items())


def _norms(config: Mapping[str, Any]) -> str:
    where = "before" if config["norm_position"] == "pre" else "after"
    final = ", and at the end" if config["final_norm"] else ""
    return f"{where} attention and MLP{final}, epsilon {config['norm_eps']:g}"


def _head(config: Mapping[str, Any]) -> str:
    task = config["task"]
    if task not in ("text-generation", "multiple-choice"):
        return (
            f"{config['n_labels']} labels" if config["n_labels"] else "none" if task == "feature-extraction" else task
        )
    bias = ", with bias" if config["head_bias"] else ""
    return ("the token embedding (tied)" if config["tied_head"] else "separate weights") + bias


ROWS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "task": lambda config: config["task"],
    "layers": lambda config: f"{config['n_layer']}, each {RESIDUALS[config['residual']]}",
    "width": _width,
    "context": lambda config: f"{config['n_ctx']} tokens",
    "vocabulary": _vocabulary,
    "activation": lambda config: ACTIVATIONS.get(config["activation"], config["activation"]),
    "positions": _positions,
    "attention": _attention,
    "norms": _norms,
    "head": _head,
}
