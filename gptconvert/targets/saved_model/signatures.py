"""The signatures of the SavedModel: what clients call, all from one traced body. A contract (docs/serving.md).

The body is one TensorFlow function that every signature calls, a run without a past being one whose past has no
tokens. So the graph holds the layers once, however many signatures there are. All integers are int64, but for the
int32 twin. Imported in the TensorFlow process only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

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
)
from reference_model.config import CACHED_TASKS, INPUTS, GPTConfig

Inputs = Mapping[str, Tensor]
Body = Callable[[Tensor, Tensor, Tensor, Sequence[KeyValue]], tuple[Tensor, list[KeyValue]]]
#: Shapes of inputs by (batch, sequence, total) lengths; None: any.
Lengths = tuple[int | None, int | None, int | None]
ANY: Lengths = (None, None, None)
INT32, XLA_SUFFIX = "serving_int32", "_xla"


class Model:
    """A body with its weights, and how its state grows.

    Attributes:
        run: ids [B, S], mask [B, T], positions [B, S], pasts → [N, D], presents.
        drop: columns that leave the front of ids, mask and cache when one is appended: 0, or 1 where shapes are fixed.
    """

    def __init__(self, weights: Weights, config: GPTConfig, run: Body, drop: int = 0) -> None:
        self.weights, self.config, self.run, self.drop = weights, config, run, drop

    def empty(self, batch: Tensor) -> list[KeyValue]:
        """A cache without tokens."""
        nothing = tf.zeros((batch, self.config.n_head, 0, self.config.head_dim))  # (B, H, 0, hd)
        return [(nothing, nothing)] * self.config.n_layer

    def append(self, state: Tensor, column: Tensor) -> Tensor:
        """[B, T] and [B] → [B, T + 1 - drop]."""
        return tf.concat((state[:, self.drop :], tf.expand_dims(column, 1)), 1)


def names(config: GPTConfig) -> tuple[str, ...]:
    """The signatures of a task."""
    cached = ("decode",) if config.task in CACHED_TASKS else ()
    generating = ("last_logits", "generate") if config.task == "text-generation" else ()
    return ("serving_default", INT32, *cached, *generating)


def signatures(weights: Weights, config: GPTConfig, xla: bool) -> dict[str, Any]:
    """Traced functions by signature name; with ``xla`` also their compiled twins of fixed shape."""
    plain = functools.partial(body, weights, config)
    cache = tf.TensorSpec((None, config.n_head, None, config.head_dim), tf.float32)
    ids = tf.TensorSpec((None, None), tf.int64)
    shared = tf.function(plain, input_signature=(ids, ids, ids, [(cache, cache)] * config.n_layer))
    model = Model(weights, config, shared)
    traced = {name: _traced(model, name, ANY) for name in names(config)}
    if xla:
        fixed = Model(weights, config, plain, drop=1)
        for name in names(config):
            if name != INT32:
                new = 1 if name == "decode" else config.n_ctx
                traced[name + XLA_SUFFIX] = _traced(fixed, name, (1, new, config.n_ctx), jit=True)
    return traced


def _traced(model: Model, name: str, lengths: Lengths, *, jit: bool | None = None) -> Any:
    """One signature: a function of a dictionary, by keyword for clients."""
    specs = inputs_of(model.config, name, lengths)
    function = tf.function(
        functools.partial(FUNCTIONS[name], model), input_signature=[specs], jit_compile=jit, autograph=False
    )
    return function.get_concrete_function()


def inputs_of(config: GPTConfig, name: str, lengths: Lengths) -> dict[str, Any]:
    """Input name → TensorSpec."""
    batch, new, total = lengths
    rows = (batch, None) if config.task == "multiple-choice" else (batch,)
    integer = tf.int32 if name == INT32 else tf.int64
    shapes: dict[str, tuple[tuple[int | None, ...], Any]] = {
        "input_ids": ((*rows, new), integer),
        "attention_mask": ((*rows, total), integer),
    }
    if "mc_token_ids" in INPUTS[config.task]:
        shapes["mc_token_ids"] = rows, integer
    if name == "decode":
        past = None if total is None or new is None else total - new
        shapes["position_ids"] = (*rows, new), integer
        cache = (batch, config.n_head, past, config.head_dim), tf.float32
        shapes |= {key: cache for pair in cache_names(config, "past_key_values") for key in pair}
    if name == "generate":
        shapes |= {key: ((), integer) for key in ("max_new_tokens", "top_k", "seed")}
        shapes["temperature"] = (), tf.float32
    return {key: tf.TensorSpec(shape, dtype, key) for key, (shape, dtype) in shapes.items()}


def cache_names(config: GPTConfig, prefix: str) -> list[tuple[str, str]]:
    """(key, value) names per layer."""
    return [(f"{prefix}.{i}.key", f"{prefix}.{i}.value") for i in range(config.n_layer)]


def serving(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """Every output of the task, positions taken from the mask."""
    new = tf.shape(inputs["input_ids"])[-1]
    ids, mask = (tf.reshape(inputs[name], (-1, new)) for name in ("input_ids", "attention_mask"))  # (B, S) each
    x, _ = model.run(ids, mask, default_positions(mask, new), model.empty(tf.shape(ids)[0]))  # (N, D)
    return pooled(model.config, per_token(model.weights, model.config, x), ids, inputs.get("mc_token_ids"))


def serving_int32(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """The same for clients that send int32, which TensorFlow does not convert."""
    return serving(model, {name: tf.cast(value, tf.int64) for name, value in inputs.items()})


def decode(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """Continue a past: outputs of the new tokens and all keys and values, under the names of the ONNX graph."""
    ids, mask, positions = (inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    pasts = [(inputs[key], inputs[value]) for key, value in cache_names(model.config, "past_key_values")]
    x, presents = model.run(ids, mask, positions, pasts)  # (N, D)
    outputs = pooled(model.config, per_token(model.weights, model.config, x), ids, None)
    for names_, pair in zip(cache_names(model.config, "present"), presents, strict=True):
        outputs |= dict(zip(names_, pair, strict=True))
    return outputs


def last_logits(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """Logits [B, V] of each sequence's last real token, as the mask says."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {"logits": _next_logits(model, ids, mask, model.empty(tf.shape(ids)[0]))[0]}


def _next_logits(
    model: Model, ids: Tensor, mask: Tensor, past: Sequence[KeyValue]
) -> tuple[Tensor, list[KeyValue]]:
    """Logits [B, V] of the last real one of the new tokens ``ids`` [B, S], and the cache for the next."""
    batch, new = tf.unstack(tf.shape(ids))
    x, presents = model.run(ids, mask, default_positions(mask, new), past)  # (N, D)
    real = tf.cast(mask[:, tf.shape(mask)[1] - new :] != 0, tf.int32)  # (B, S)
    last = tf.argmax(tf.range(1, new + 1) * real, 1)  # (B)
    x = take(tf.reshape(x, (batch, new, model.config.n_embd)), last)  # (B, D)
    cache = [(k[:, :, model.drop :], v[:, :, model.drop :]) for k, v in presents]
    return per_token(model.weights, model.config, x)["logits"], cache  # (B, V)


def generate(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """The prompt and its continuation [B, S + n]: greedy at temperature 0, else sampled; ends when all rows have.

    A row that has ended, its end-of-text token included, is filled up with padding (or end-of-text) tokens.
    """
    config, ids, mask = model.config, inputs["input_ids"], inputs["attention_mask"]
    room = config.n_ctx - tf.reduce_max(tf.reduce_sum(mask, 1))
    require(room > 0, f"the prompt fills the context of {config.n_ctx} tokens")
    require(inputs["max_new_tokens"] > 0, "max_new_tokens must be at least 1")
    require(inputs["temperature"] >= 0, "temperature must not be negative")
    steps = tf.minimum(inputs["max_new_tokens"], room)
    filler = config.eos_token_id if config.pad_token_id is None else config.pad_token_id

    def extended(step: Tensor, ids: Tensor, mask: Tensor, done: Tensor, logits: Tensor) -> Sequence[Tensor]:
        """One token chosen and appended."""
        token = choose(logits, inputs["temperature"], inputs["top_k"], tf.stack((inputs["seed"], step)))  # (B)
        if config.eos_token_id is not None:
            token = tf.where(done, tf.constant(filler, tf.int64), token)
            done = done | (token == config.eos_token_id)
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
    """The loop's shapes with their lengths left open: axis 1 of ids and mask, axis 2 of the cache."""
    open_axis = {2: 1, 4: 2}

    def shape(value: Tensor) -> Any:
        sizes = value.shape.as_list()
        return tf.TensorShape([None if i == open_axis.get(len(sizes)) else n for i, n in enumerate(sizes)])

    return tf.nest.map_structure(shape, state)


def choose(logits: Tensor, temperature: Tensor, top_k: Tensor, seed: Tensor) -> Tensor:
    """The next token of each row from logits [B, V]; ``top_k`` 0 keeps all; ``seed`` [2] decides the draw."""
    vocabulary = logits.shape[1]

    def sampled() -> Tensor:
        best, ids = tf.math.top_k(logits, vocabulary)  # (B, V) each, best first
        kept = (tf.range(vocabulary, dtype=tf.int64) < top_k) | (top_k <= 0)  # (V)
        weights = tf.where(kept, (best - best[:, :1]) / temperature, tf.float32.min)  # (B, V)
        rank = tf.random.stateless_categorical(weights, 1, seed)  # (B, 1)
        return tf.cast(tf.gather(ids, rank[:, 0], batch_dims=1), tf.int64)  # (B)

    return tf.cond(temperature > 0, sampled, lambda: tf.argmax(logits, 1))


FUNCTIONS: Mapping[str, Callable[[Model, Inputs], dict[str, Tensor]]] = {
    "serving_default": serving,
    "serving_int32": serving_int32,
    "decode": decode,
    "last_logits": last_logits,
    "generate": generate,
}
