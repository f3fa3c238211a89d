"""The signatures of the SavedModel, which clients call, all built on one traced body.

The body is one TensorFlow function that every signature calls; a run without a past has a past of no tokens. So the
graph holds the layers only once. Names, types and shapes are defined in ``contract.py``. Imported only in the
TensorFlow process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from gptconvert.model.generation import SpecialIds
from gptconvert.targets.saved_model.contract import INT32, POSITIONS, XLA, cache_names, inputs_of
from gptconvert.targets.saved_model.graph import (
    KeyValue,
    Tensor,
    Weights,
    body,
    default_positions,
    per_token,
    pooled,
    require,
    take,
    traceable,
)
from reference_model.config import GPTConfig

Inputs = Mapping[str, Tensor]
Body = Callable[[Tensor, Tensor, Tensor, Sequence[KeyValue]], tuple[Tensor, list[KeyValue]]]


class Model:
    """A body with its weights, and how its state grows.

    Attributes:
        run: ids [B, S], mask [B, T], positions [B, S], pasts → [N, D], presents.
        special: the special ids.
        drop: leading columns dropped from ids, mask and cache when one is appended: 0, or 1 if shapes are fixed.
    """

    def __init__(self, weights: Weights, config: GPTConfig, run: Body, special: SpecialIds, drop: int = 0) -> None:
        self.weights, self.config, self.run, self.special, self.drop = weights, config, run, special, drop

    def empty(self, batch: Tensor) -> list[KeyValue]:
        """A cache without tokens."""
        nothing = tf.zeros((batch, self.config.n_head, 0, self.config.head_dim))  # (B, H, 0, hd)
        return [(nothing, nothing)] * self.config.n_layer

    def carried(self, presents: Sequence[KeyValue]) -> list[KeyValue]:
        """The cache [B, H, T - drop, hd] for the next token."""
        return [(k[:, :, self.drop :], v[:, :, self.drop :]) for k, v in presents] if self.drop else list(presents)

    def append(self, state: Tensor, column: Tensor) -> Tensor:
        """[B, T] and [B] → [B, T + 1 - drop]."""
        return tf.concat((state[:, self.drop :], tf.expand_dims(column, 1)), 1)


def signatures(weights: Weights, config: GPTConfig, special: SpecialIds, names: Sequence[str]) -> dict[str, Any]:
    """Traced functions by signature name; compiled twins have fixed shapes."""
    plain = functools.partial(body, weights, config)
    cache = tf.TensorSpec((None, config.n_head, None, config.head_dim), tf.float32)
    ids = tf.TensorSpec((None, None), tf.int64)
    arguments = (ids, ids, ids, [(cache, cache)] * config.n_layer)
    shared = traceable(body, weights, config, input_signature=arguments)
    model, fixed = Model(weights, config, shared, special), Model(weights, config, plain, special, drop=1)
    return {name: _traced(fixed, name, jit=True) if name.endswith(XLA) else _traced(model, name) for name in names}


def _traced(model: Model, name: str, *, jit: bool | None = None) -> Any:
    """One signature: a function of a dictionary, which clients call by keyword."""
    function = FUNCTIONS[name.removesuffix(XLA)]
    table = inputs_of(model.config, name)
    specs = {key: tf.TensorSpec(shape, tf.as_dtype(kind), key) for key, (kind, shape) in table.items()}
    traced: Any = traceable(function, model, input_signature=[specs], jit_compile=jit)
    return traced.get_concrete_function()


def serving(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """Every output of the task, with default positions if none are given."""
    choices = inputs.get("mc_token_ids")
    rows = {name: value for name, value in inputs.items() if name != "mc_token_ids"}
    if choices is not None:  # [B, choices, S]; B counts choices from here on
        rows = {name: tf.reshape(value, (-1, tf.shape(value)[2])) for name, value in rows.items()}
    ids, mask = rows["input_ids"], rows["attention_mask"]
    batch, new = tf.unstack(tf.shape(ids))  # B, S
    positions = rows.get("position_ids")
    positions = default_positions(model.config.task, mask, new) if positions is None else positions  # (B, S)
    x, _ = model.run(ids, mask, positions, model.empty(batch))  # (N, D)
    return pooled(model.config, per_token(model.weights, model.config, x), ids, choices)


def serving_int32(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """:func:`serving` for clients that send int32, which TensorFlow does not convert."""
    return serving(model, {name: tf.cast(value, tf.int64) for name, value in inputs.items()})


def decode(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """Continue a past: outputs of the new tokens and all keys and values, under the names of the ONNX graph."""
    ids, mask, positions = (inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    pasts = [(inputs[key], inputs[value]) for key, value in cache_names(model.config, "past_key_values")]
    x, presents = model.run(ids, mask, positions, pasts)  # (N, D)
    outputs = pooled(model.config, per_token(model.weights, model.config, x), ids, None)
    for names, pair in zip(cache_names(model.config, "present"), presents, strict=True):
        outputs |= dict(zip(names, pair, strict=True))
    return outputs


def last_logits(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """Logits [B, V] of each sequence's last unmasked token."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {"logits": _next_logits(model, ids, mask, model.empty(tf.shape(ids)[0]))[0]}


def _next_logits(model: Model, ids: Tensor, mask: Tensor, past: Sequence[KeyValue]) -> tuple[Tensor, list[KeyValue]]:
    """Logits [B, V] of the last real token among the new ones ``ids`` [B, S], and the cache for the next step."""
    batch, new = tf.unstack(tf.shape(ids))
    x, presents = model.run(ids, mask, default_positions(model.config.task, mask, new), past)  # (N, D)
    real = tf.cast(mask[:, tf.shape(mask)[1] - new :] != 0, tf.int32)  # (B, S)
    last = tf.argmax(tf.range(1, new + 1) * real, 1)  # (B)
    x = take(tf.reshape(x, (batch, new, model.config.n_embd)), last)  # (B, D)
    return per_token(model.weights, model.config, x)["logits"], model.carried(presents)  # (B, V)


def generate(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """The prompt and its continuation [B, S + n]: greedy at temperature 0, else sampled, until all rows have ended.

    A row ends after any of the end tokens, and is then filled with padding (or the first end token).
    """
    config, ids, mask = model.config, inputs["input_ids"], inputs["attention_mask"]
    room = config.n_ctx - tf.reduce_max(tf.reduce_sum(mask, 1))
    require(room > 0, f"the prompt fills the context of {config.n_ctx} tokens")
    require(inputs["max_new_tokens"] > 0, "max_new_tokens must be at least 1")
    require(inputs["temperature"] >= 0, "temperature must not be negative")
    steps = tf.minimum(inputs["max_new_tokens"], room)
    stops, filler = model.special.stops(config.vocab_size), model.special.filler(config.vocab_size)

    def extended(step: Tensor, ids: Tensor, mask: Tensor, done: Tensor, logits: Tensor) -> Sequence[Tensor]:
        """Choose and append one token."""
        token = choose(logits, inputs["temperature"], inputs["top_k"], tf.stack((inputs["seed"], step)))  # (B)
        if filler is not None:
            token = tf.where(done, tf.constant(filler, tf.int64), token)
            done = done | functools.reduce(tf.logical_or, [token == stop for stop in stops])
        return step + 1, model.append(ids, token), model.append(mask, tf.ones_like(token)), done

    def unfinished(step: Tensor, ids: Tensor, mask: Tensor, done: Tensor, cache: Any) -> Tensor:
        return (step < steps) & ~tf.reduce_all(done)

    def advance(step: Tensor, ids: Tensor, mask: Tensor, done: Tensor, cache: Any) -> Sequence[Any]:
        logits, cache = _next_logits(model, ids[:, -1:], mask, cache)
        return *extended(step, ids, mask, done, logits), cache

    logits, cache = _next_logits(model, ids, mask, model.empty(tf.shape(ids)[0]))
    first = extended(tf.constant(0, tf.int64), ids, mask, tf.zeros_like(ids[:, 0], tf.bool), logits)
    state = (*first, cache)
    final = tf.while_loop(unfinished, advance, state, shape_invariants=None if model.drop else _growing(state))
    return {"sequences": final[1]}


def _growing(state: Sequence[Any]) -> Any:
    """The loop's shapes, with open lengths in axis 1 of ids and mask and axis 2 of the cache."""
    open_axis = {2: 1, 4: 2}

    def shape(value: Tensor) -> Any:
        sizes = value.shape.as_list()
        return tf.TensorShape([None if i == open_axis.get(len(sizes)) else n for i, n in enumerate(sizes)])

    return tf.nest.map_structure(shape, state)


def choose(logits: Tensor, temperature: Tensor, top_k: Tensor, seed: Tensor) -> Tensor:
    """The next token of each row from logits [B, V]; ``top_k`` 0 keeps all; ``seed`` [2] determines the draw."""
    vocabulary = logits.shape[1]

    def sampled() -> Tensor:
        best, ids = tf.math.top_k(logits, vocabulary)  # (B, V) each, best first
        kept = (tf.range(vocabulary, dtype=tf.int64) < top_k) | (top_k <= 0)  # (V)
        weights = tf.exp(tf.cast(best - best[:, :1], tf.float64) / tf.cast(temperature, tf.float64))  # (B, V)
        reached = tf.cumsum(tf.where(kept, weights, 0.0), axis=1)  # (B, V)
        draw = tf.random.stateless_uniform((tf.shape(logits)[0], 1), seed, dtype=tf.float64)  # (B, 1)
        rank = tf.reduce_sum(tf.cast(reached < draw * reached[:, -1:], tf.int32), 1)  # (B)
        return tf.cast(tf.gather(ids, rank, batch_dims=1), tf.int64)  # (B)

    return tf.cond(temperature > 0, sampled, lambda: tf.argmax(logits, 1))


FUNCTIONS: Mapping[str, Callable[[Model, Inputs], dict[str, Tensor]]] = {
    "serving_default": serving,
    INT32: serving_int32,
    POSITIONS: serving,
    "decode": decode,
    "last_logits": last_logits,
    "generate": generate,
}
