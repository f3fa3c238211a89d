"""Stress weights: values that make a graph's constants matter.

A wrong epsilon, mask value or limit changes no output beyond rounding noise unless activations are nearly constant,
attention scores exceed the mask value, or activations exceed the limit. A checkpoint's own weights rarely do that, so
a graph of unknown origin also runs with these in their place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptconvert.model.tensors import Box, Computed, LazyTensor
from reference_model.config import GPTConfig

#: Normally distributed numbers; each row of a weight is a window of them.
POOL = 1 << 18
#: Standard deviation of biases, in units of that of the products that they are added to.
BIAS = 0.3
#: Standard deviation of the scales of norms, in units of their mean.
SPREAD = 0.3
#: Weights of more bytes are replaced only with ``--full``: it takes several times their memory.
MOST_STRESSED = 600 << 20


@dataclass(frozen=True)
class Setting:
    """Magnitudes of a model's activations, as standard deviations.

    Attributes:
        name: what they are, in reports.
        stream: embeddings, and the sum of all MLP outputs.
        scores: attention scores.
        values: attention values.
        attention: the sum of all attention outputs, in units of ``stream``.
        inner: inputs of the MLP's activation.
        outputs: of the head, if it is not tied.
        norms: outputs of norms, if they are what the stream consists of.
    """

    name: str
    stream: float
    scores: float = 3.0
    values: float = 1.0
    attention: float = 1.0
    inner: float = 2.0
    outputs: float = 1.0
    norms: float = 1.0


def settings_of(config: GPTConfig) -> tuple[Setting, ...]:
    """The settings for a model."""
    epsilon = math.sqrt(config.norm_eps or 1e-5)
    return (
        # Every layer contributes as much as every other, and attention is soft: activations, scales, lost precision.
        Setting("activations of ordinary size", stream=1.0),
        # A small error of the scores is not lost among the rounding errors of everything else.
        Setting("attention that outweighs the rest", stream=1.0, attention=10.0),
        # The variance that norms divide by is of the size of their epsilon.
        Setting("nearly constant activations", stream=epsilon, norms=epsilon),
        # Scores exceed the usual finite mask values (1e4, 65504), and activations those of half precision. Attention
        # chooses one key, by rounding if two scores nearly tie; its small share keeps the layers after it exact.
        Setting(
            "attention scores of 1e5, activations of 1e6",
            stream=1e6,
            scores=1e5,
            values=1e6,
            attention=0.03,
            inner=1e6,
            outputs=1e6,
        ),
    )


#: Standard deviation of a weight, by row if it differs.
Deviation = float | NDArray[np.float64]
#: Mean and standard deviation.
Scale = tuple[float, Deviation]


def large_note(path: str, nbytes: int) -> str:
    """A note on a model that is too large to run with stress weights by default."""
    return (
        f"{path}: it was not run with stress weights, which takes several times the memory of its {nbytes} bytes of "
        "weights; --full does"
    )


def stress_weights(
    config: GPTConfig, shapes: Mapping[str, tuple[int, ...]], setting: Setting
) -> dict[str, LazyTensor]:
    """Weights in float32 under canonical names, of the shapes given by name."""
    return {
        name: _random(shape, *_scale(name, config, setting), number)
        for number, (name, shape) in enumerate(shapes.items())
    }


def _scale(name: str, config: GPTConfig, setting: Setting) -> Scale:
    *path, kind = name.split(".")
    of_norm = path[-1].startswith("ln_")
    normed = setting.norms if config.norm_position == "post" else 1.0
    if of_norm:
        return (normed, SPREAD * normed) if kind == "weight" else (0.0, BIAS * normed)
    if path[-1] in ("wte", "wpe"):
        return 0.0, setting.stream
    inputs, outputs = _magnitudes(path, config, setting, normed)
    if kind == "bias":
        return 0.0, BIAS * outputs
    fan_in = config.n_inner if path[-2:] == ["mlp", "c_proj"] else config.n_embd
    return 0.0, outputs / (inputs * math.sqrt(fan_in))


def _magnitudes(path: list[str], config: GPTConfig, setting: Setting, normed: float) -> tuple[float, Deviation]:
    """Magnitudes of a linear layer's inputs and outputs; the latter by row if they differ."""
    share = setting.stream / math.sqrt(config.n_layer)
    if path[-1] == "c_attn":
        scale = config.attn_scale[int(path[1])] or 1.0
        query = math.sqrt(setting.scores / (math.sqrt(config.head_dim) * abs(scale)))
        width = config.n_embd
        return normed, np.repeat((query, query, setting.values), width)
    layers: Mapping[tuple[str, ...], tuple[float, float]] = {
        ("attn", "c_proj"): (setting.values, setting.attention * share),
        ("mlp", "c_fc"): (normed, setting.inner),
        ("mlp", "c_proj"): (setting.inner, share),
    }
    return layers.get(tuple(path[-2:]), (normed, setting.outputs))


def _random(shape: tuple[int, ...], mean: float, deviation: Deviation, number: int) -> LazyTensor:
    """The ``number``-th random tensor; any part of it can be read alone."""
    matrix = len(shape) == 2
    rows, width = shape if matrix else (1, shape[0])
    pool, random = _pool(), np.random.default_rng(number)
    first, step = int(random.integers(POOL)), 2 * int(random.integers(POOL // 8, POOL // 4)) + 1
    by_row = np.broadcast_to(np.asarray(deviation, np.float64), (rows,) if matrix else (width,))

    def read(box: Box) -> NDArray[np.float32]:
        here = np.arange(box[0].start, box[0].stop) if matrix else np.zeros(1, np.int64)
        columns = np.arange(box[-1].start, box[-1].stop)
        starts = (first + here * step) % POOL  # an odd step: rows start in different places
        normal = pool[(starts[:, None] + columns) % POOL]  # (rows, columns)
        scaled = mean + normal * (by_row[here, None] if matrix else by_row[columns])
        shown: NDArray[np.float32] = (scaled if matrix else scaled[0]).astype(np.float32)
        return shown

    return Computed(read, np.dtype(np.float32), shape)


@functools.cache
def _pool() -> NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal(POOL)
