"""The TensorFlow graph of a GPT.

Read it beside ``reference_model/model.py`` and ``targets/onnx/graph.py``: the same functions in the same order under
the same names. The hidden state stays 2-D, [N, D] with N = B * S, so that every linear layer is one MatMul that takes
its weight as stored in the checkpoint; masks and angles are computed once per run. Everything is computed in float32,
whatever the storage type of the weights. Imported only in the TensorFlow process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from gptconvert.targets.rotary import BASE, POSITIONS, rotary_tables
from reference_model.config import COUNTED_TASKS, OUTPUTS, GPTConfig, Rotary

#: TensorFlow ships no types.
Tensor = Any
Variable = Any
KeyValue = tuple[Tensor, Tensor]


class Weights:
    """A model's weights by canonical name.

    Attributes:
        values: name → variable or tensor, as stored.
        shapes: name → shape as stored (variables are declared without one).
        flipped: names of matrices stored [in, out]; all others are [out, in].
    """

    def __init__(
        self, values: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], flipped: frozenset[str]
    ) -> None:
        self.values, self.shapes, self.flipped = values, shapes, flipped

    def stored(self, name: str) -> Tensor:
        """The value as stored. Gathering from the variable itself would make every other read of it a copy."""
        value = tf.convert_to_tensor(self.values[name])
        value.set_shape(self.shapes[name])
        return value

    def __call__(self, name: str) -> Tensor:
        return tf.cast(self.stored(name), tf.float32)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of a table in float32; only these rows are cast."""
        return tf.cast(tf.gather(self.stored(name), ids), tf.float32)

    def linear(self, x: Tensor, prefix: str, *, weight: str | None = None, bias: bool = True) -> Tensor:
        """``x`` [N, in] times the weight ``prefix.weight`` [out, in] (stored either way) plus bias → [N, out]."""
        name = weight or f"{prefix}.weight"
        if name in self.flipped:
            # As a batch of one: TensorFlow's kernel for a single row sums all products in one chain, which costs
            # 1.5 bits at 768 inputs, and more with width. The speed is the same.
            x = tf.matmul(tf.expand_dims(x, 0), self(name))[0]  # (N, out)
        else:
            x = tf.matmul(x, self(name), transpose_b=True)  # (N, out)
        return tf.nn.bias_add(x, self(f"{prefix}.bias")) if bias else x

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The values under ``prefix``, by name without it."""
        return {name.removeprefix(prefix): self.stored(name) for name in self.values if name.startswith(prefix)}


ACTIVATION: Mapping[str, Callable[[Tensor], Tensor]] = {
    # TensorFlow's own forms, which its CPU kernels recognise and fuse with the matrix product.
    "gelu_tanh": lambda x: tf.nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: tf.nn.gelu(x, approximate=False),
    "gelu_erf_10": lambda x: tf.clip_by_value(tf.nn.gelu(x, approximate=False), -10.0, 10.0),
    "gelu_sigmoid": lambda x: x * tf.sigmoid(1.702 * x),
    "relu": tf.nn.relu,
    "relu_squared": lambda x: tf.square(tf.nn.relu(x)),
    "relu6": tf.nn.relu6,
    "leaky_relu": lambda x: tf.nn.leaky_relu(x, 0.01),
    "silu": lambda x: x * tf.sigmoid(x),
    "hardswish": lambda x: x * tf.nn.relu6(x + 3) / 6,
    "mish": lambda x: x * tf.tanh(tf.math.softplus(x)),
    "tanh": tf.tanh,
    "sigmoid": tf.sigmoid,
    "laplace": lambda x: 0.5 * (1 + tf.math.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "sqrt_softplus": lambda x: tf.sqrt(tf.math.softplus(x)),
    "linear": tf.identity,
}


def default_positions(task: str, attention_mask: Tensor, new_tokens: Tensor) -> Tensor:
    """Positions of the new tokens if the caller passes none: [B, T] mask → [B, S].

    They count real tokens (leading padding gets 0) or slots, see ``COUNTED_TASKS``.
    """
    counted = attention_mask if task in COUNTED_TASKS else tf.ones_like(attention_mask)  # (B, T)
    positions = tf.maximum(tf.cumsum(counted, axis=1) - 1, 0)  # (B, T)
    return positions[:, tf.shape(attention_mask)[1] - new_tokens :]  # (B, S)


def visible(attention_mask: Tensor, new_tokens: Tensor, window: int | None) -> Tensor:
    """Bias added to scores, [B, 1, S, T]: 0 where a query sees a key, else the lowest float.

    A query at absolute index q sees key k iff k <= q, the mask has k, and q - k < window.
    """
    total = tf.shape(attention_mask)[1]
    key = tf.range(total)  # (T)
    query = tf.expand_dims(tf.range(total - new_tokens, total), 1)  # (S, 1)
    seen = key <= query  # (S, T)
    if window is not None:
        seen = seen & (query - key < window)  # (S, T)
    real = tf.cast(attention_mask, tf.bool)  # (B, T)
    seen = seen & tf.expand_dims(tf.expand_dims(real, 1), 1)  # (B, 1, S, T)
    return tf.where(seen, 0.0, tf.float32.min)  # (B, 1, S, T)


def rotary_angles(rotary: Rotary, position_ids: Tensor) -> KeyValue:
    """(cos, sin), each [B, S, 1, width], laid out for the pairing of ``rotary``.

    The angles of the position's digits, looked up and added (see ``targets/rotary.py``).
    """
    tables, rest = rotary_tables(rotary), tf.cast(position_ids, tf.int32)  # rest: (B, S)
    looked_up = []
    for cos, sin in tables:
        digit = tf.math.floormod(rest, BASE)  # (B, S)
        looked_up.append((tf.gather(cos, digit), tf.gather(sin, digit)))  # (B, S, 1, width) each
        rest = tf.math.floordiv(rest, BASE)  # (B, S)
    return functools.reduce(angle_sum, looked_up)


def angle_sum(x: KeyValue, y: KeyValue) -> KeyValue:
    """(cos, sin) of the sum of two angles given by their (cos, sin)."""
    (cos_x, sin_x), (cos_y, sin_y) = x, y
    return cos_x * cos_y - sin_x * sin_y, sin_x * cos_y + cos_x * sin_y


def rotate(rotary: Rotary, x: Tensor, angles: KeyValue) -> Tensor:
    """Rotate the first ``width`` features of each head: [B, S, H, hd] → [B, S, H, hd]."""
    turned, rest = x[..., : rotary.width], x[..., rotary.width :]  # (B, S, H, width), (B, S, H, hd - width)
    if rotary.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]  # (B, S, H, width/2) each
        other = tf.reshape(tf.stack((-b, a), -1), tf.shape(turned))  # (B, S, H, width)
    else:
        a, b = tf.split(turned, 2, -1)  # (B, S, H, width/2) each
        other = tf.concat((-b, a), -1)  # (B, S, H, width)
    cos, sin = angles
    return tf.concat((turned * cos + other * sin, rest), -1)  # (B, S, H, hd)


def attention(
    w: Weights, config: GPTConfig, i: int, x: Tensor, bias: Tensor, angles: KeyValue | None, past: KeyValue
) -> tuple[Tensor, KeyValue]:
    """[N, D] → [N, D] and this layer's keys and values [B, H, T, hd]."""
    name, width = f"h.{i}.attn", config.n_embd
    batch, _, new, _ = tf.unstack(tf.shape(bias))  # B, 1, S, T
    qkv = w.linear(x, f"{name}.c_attn", bias=config.qkv_bias)  # (N, 3D)
    per_head = (batch, new, config.n_head, config.head_dim)
    q, k, v = (tf.reshape(part, per_head) for part in tf.split(qkv, 3, 1))  # (B, S, H, hd) each
    if config.rotary is not None and angles is not None:
        q, k = rotate(config.rotary, q, angles), rotate(config.rotary, k, angles)
    q, k, v = (tf.transpose(part, (0, 2, 1, 3)) for part in (q, k, v))  # (B, H, S, hd) each
    k, v = tf.concat((past[0], k), 2), tf.concat((past[1], v), 2)  # (B, H, T, hd)
    if config.attn_scale[i] != 1.0:
        q = q * config.attn_scale[i]
    scores = tf.matmul(q, k, transpose_b=True)  # (B, H, S, T)
    mixed = tf.matmul(tf.nn.softmax(scores + bias), v)  # (B, H, S, hd)
    mixed = tf.reshape(tf.transpose(mixed, (0, 2, 1, 3)), (-1, width))  # (N, D)
    return w.linear(mixed, f"{name}.c_proj", bias=config.attn_out_bias), (k, v)


def mlp(w: Weights, config: GPTConfig, i: int, x: Tensor) -> Tensor:
    """[N, D] → [N, D]."""
    inner = ACTIVATION[config.activation](w.linear(x, f"h.{i}.mlp.c_fc"))  # (N, F)
    return w.linear(inner, f"h.{i}.mlp.c_proj")  # (N, D)


def norm(w: Weights, config: GPTConfig, x: Tensor, weight: str) -> Tensor:
    """Layer norm over the last axis."""
    centred = x - tf.reduce_mean(x, -1, keepdims=True)  # (N, D)
    variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)  # (N, 1)
    return centred * tf.math.rsqrt(variance + config.norm_eps) * w(f"{weight}.weight") + w(f"{weight}.bias")


def block(
    w: Weights, config: GPTConfig, i: int, x: Tensor, bias: Tensor, angles: KeyValue | None, past: KeyValue
) -> tuple[Tensor, KeyValue]:
    """One layer: [N, D] and :func:`visible` [B, 1, S, T] → [N, D], and its keys and values [B, H, T, hd]."""
    name = f"h.{i}"
    if config.norm_position == "post":
        a, present = attention(w, config, i, x, bias, angles, past)  # (N, D)
        n = norm(w, config, x + a, f"{name}.ln_1")  # (N, D)
        return norm(w, config, n + mlp(w, config, i, n), f"{name}.ln_2"), present
    n = norm(w, config, x, f"{name}.ln_1")  # (N, D)
    a, present = attention(w, config, i, n, bias, angles, past)  # (N, D)
    after = x + a  # (N, D)
    if config.has_second_norm:
        n = norm(w, config, after if config.residual == "serial" else x, f"{name}.ln_2")  # (N, D)
    return after + mlp(w, config, i, n), present  # (N, D)


def traceable(named: Callable[..., Any], *bound: object, **options: Any) -> Callable[..., Any]:
    """``named``, with its first arguments bound, as a TensorFlow function of the same name."""
    function = functools.partial(named, *bound)
    vars(function)["__name__"] = named.__name__
    traced: Callable[..., Any] = tf.function(function, autograph=False, **options)
    return traced


class Blocks:
    """:func:`block` as a TensorFlow function, shared by layers that differ only in their weights.

    Such layers are traced and stored once; 48 layers are 48 calls, which TensorFlow inlines.
    """

    def __init__(self, w: Weights, config: GPTConfig) -> None:
        self.w, self.config = w, config
        self.traced: dict[Hashable, Callable[..., tuple[Tensor, KeyValue]]] = {}

    def __call__(
        self, i: int, x: Tensor, bias: Tensor, angles: KeyValue | None, past: KeyValue
    ) -> tuple[Tensor, KeyValue]:
        weights = self.w.part(f"h.{i}.")
        flipped = frozenset(name for name in weights if f"h.{i}.{name}" in self.w.flipped)
        layout = tuple((name, value.dtype, tuple(value.shape), name in flipped) for name, value in weights.items())
        kind = self.config.attn_scale[i], self.config.attn_window[i], layout
        if kind not in self.traced:
            self.traced[kind] = traceable(self.block, i)
        return self.traced[kind](weights, x, bias, angles, past)

    def block(self, i: int, weights: Mapping[str, Tensor], *inputs: Any) -> tuple[Tensor, KeyValue]:
        """Layer ``i`` with the given weights."""
        values = {f"h.{i}.{name}": value for name, value in weights.items()}
        return block(Weights(values, self.w.shapes, self.w.flipped), self.config, i, *inputs)


def embedding(w: Weights, config: GPTConfig, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Token vectors, plus position vectors if positions are learned: [N, D]."""
    x = w.rows("wte.weight", input_ids)  # (B, S, D)
    if config.rotary is None:
        x = x + w.rows("wpe.weight", position_ids)  # (B, S, D)
    return tf.reshape(x, (-1, config.n_embd))  # (N, D)


def lm_head(w: Weights, config: GPTConfig, x: Tensor) -> Tensor:
    """[N, D] → logits [N, V]; a tied head is the token embedding."""
    weight = "wte.weight" if config.tied_head else "lm_head.weight"
    return w.linear(x, "lm_head", weight=weight, bias=config.head_bias)  # (N, V)


PROJECTIONS: Mapping[str, Callable[[Weights, GPTConfig, Tensor], Sequence[Tensor]]] = {
    "text-generation": lambda w, config, x: (lm_head(w, config, x),),  # (N, V)
    "feature-extraction": lambda w, config, x: (x,),  # (N, D)
    "text-classification": lambda w, config, x: (w.linear(x, "score", bias=False),),  # (N, K)
    "token-classification": lambda w, config, x: (w.linear(x, "classifier"),),  # (N, K)
    "question-answering": lambda w, config, x: tf.split(w.linear(x, "qa_outputs"), 2, 1),  # 2 x (N, 1)
    "multiple-choice": lambda w, config, x: (lm_head(w, config, x), w.linear(x, "mc_head")),  # (N, V), (N, 1)
}


def per_token(w: Weights, config: GPTConfig, x: Tensor) -> dict[str, Tensor]:
    """Every output of the task, by the names of ``config.OUTPUTS``, for every token: [N, D] → [N, width]."""
    x = norm(w, config, x, "ln_f") if config.final_norm else x  # (N, D)
    return dict(zip(OUTPUTS[config.task], PROJECTIONS[config.task](w, config, x), strict=True))


def pooled(
    config: GPTConfig, values: Mapping[str, Tensor], input_ids: Tensor, mc_token_ids: Tensor | None
) -> dict[str, Tensor]:
    """The task's outputs from :func:`per_token`'s [N, width]; shapes in ``config.OUTPUTS``.

    ``input_ids`` [B, S]; ``mc_token_ids`` [B / choices, choices], only for multiple-choice.
    """
    batch, new = tf.unstack(tf.shape(input_ids))  # B, S
    values = {name: tf.reshape(value, (batch, new, value.shape[-1])) for name, value in values.items()}
    if config.task == "text-classification":
        last = last_real(input_ids, config.pad_token_id)  # (B)
        return {name: take(value, last) for name, value in values.items()}
    if config.task == "question-answering":
        return {name: tf.squeeze(value, 2) for name, value in values.items()}
    if mc_token_ids is not None:
        scores = take(values["mc_logits"], tf.reshape(mc_token_ids, (-1,)))  # (B, 1)
        rows, choices = tf.unstack(tf.shape(mc_token_ids))
        logits = tf.reshape(values["logits"], (rows, choices, new, config.vocab_size))
        return {"logits": logits, "mc_logits": tf.reshape(scores, (rows, choices))}
    return values


def last_real(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """Index of the last token that is not padding: [B, S] → [B].

    Padding is detected by its id. Without a padding id it is the last token; if all tokens are padding, the first.
    """
    batch, new = tf.unstack(tf.shape(input_ids))  # B, S
    if pad_token_id is None:
        return tf.fill([batch], new - 1)
    return tf.argmax(tf.range(new) * tf.cast(input_ids != pad_token_id, tf.int32), 1)  # (B)


def take(x: Tensor, index: Tensor) -> Tensor:
    """One token of each sequence: [B, S, D] and [B] → [B, D]."""
    return tf.gather(x, index, batch_dims=1)


def checks(
    config: GPTConfig, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_tokens: Tensor
) -> list[Tensor]:
    """Run-time checks that reject indices outside a table (a GPU would read zeros) and shapes that would broadcast.

    Compiled graphs (XLA) omit such checks.
    """
    batch, new = tf.unstack(tf.shape(input_ids))  # B, S
    fits = tf.reduce_all(tf.equal(tf.shape(attention_mask), (batch, past_tokens + new)))
    alike = tf.reduce_all(tf.equal(tf.shape(position_ids), (batch, new)))
    found = [
        require(fits, "attention_mask must have the batch of input_ids and a column for every past and new token"),
        require(alike, "position_ids must be shaped as input_ids"),
    ]
    limits = {
        "input_ids": (input_ids, config.vocab_size),
        "position_ids": (position_ids, config.n_ctx if config.rotary is None else POSITIONS),
    }
    for name, (ids, size) in limits.items():
        inside = tf.reduce_all((ids >= 0) & (ids < size))
        found.append(require(inside, f"{name} must lie between 0 and {size - 1}"))
    return found


def require(condition: Tensor, message: str) -> Tensor:
    """Operation that fails the run with ``message`` unless ``condition`` holds."""
    return tf.raw_ops.Assert(condition=condition, data=[message])


def body(
    w: Weights,
    config: GPTConfig,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    pasts: Sequence[KeyValue],
) -> tuple[Tensor, list[KeyValue]]:
    """All blocks: ids [B, S], mask [B, T], positions [B, S] → [N, D] and every layer's keys and values.

    ``pasts`` holds each layer's keys and values, [B, H, P, hd]; P may be 0.
    """
    past_tokens = tf.shape(pasts[0][0])[2]  # P
    with tf.control_dependencies(checks(config, input_ids, attention_mask, position_ids, past_tokens)):
        x = embedding(w, config, input_ids, position_ids)  # (N, D)
    rotary = config.rotary if config.rotary and config.rotary.dim else None
    angles = rotary_angles(rotary, position_ids) if rotary else None  # (B, S, 1, width) each
    new = tf.shape(input_ids)[1]
    bias = {window: visible(attention_mask, new, window) for window in dict.fromkeys(config.attn_window)}
    blocks, presents = Blocks(w, config), []
    for i in range(config.n_layer):
        x, present = blocks(i, x, bias[config.attn_window[i]], angles, pasts[i])  # (N, D)
        presents.append(present)
    return x, presents
