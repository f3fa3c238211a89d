"""The ONNX graph of a GPT, built node by node.

Read it beside ``reference_model/model.py``: the same functions in the same order under the same names.
Only ai.onnx operators, opset 17 to 21. The hidden state stays 2-D, [N, D] with N = B * S, so that every linear
layer is one product that takes its weight as stored in the checkpoint; masks and shapes are computed once per run.

The runtime's Gather rejects ids from vocab_size on and learned positions from n_ctx on. Rotary positions continue
past n_ctx, where the model was never trained, up to the limit of ``targets/rotary.py``. Negative ids and positions
are not rejected: ONNX counts them from the end of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gptconvert.model.tensors import LazyTensor
from gptconvert.targets.onnx.activations import ACTIVATION
from gptconvert.targets.onnx.builder import MICROSOFT, Builder, Dim, as_output, graph_input
from gptconvert.targets.rotary import BASE, rotary_tables
from reference_model.config import INPUTS, OUTPUTS, GPTConfig, Rotary

BATCH, CHOICES, NEW, PAST = "batch_size", "num_choices", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {NEW}"
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
KeyValue = tuple[ir.Value, ir.Value]


def flattened(b: Builder, config: GPTConfig, inputs: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """The inputs with one row per sequence ([B, choices, S] → [B * choices, S]), with positions if not given."""
    rows = dict(inputs)
    if config.task == "multiple-choice":
        new = b.op("Shape", inputs["input_ids"], name="shape.new", start=2)  # [S]
        shape = b.op("Concat", b.constant([-1]), new, name="shape.rows", axis=0)  # [-1, S]
        for name in (name for name in inputs if name != "mc_token_ids"):
            rows[name] = b.op("Reshape", inputs[name], shape, name=f"{name}.rows")  # (B * choices, S)
    if "position_ids" not in inputs:
        rows["position_ids"] = default_positions(b, rows["input_ids"])  # (1, S)
    return rows


def default_positions(b: Builder, input_ids: ir.Value) -> ir.Value:
    """Positions that count slots, padding included: [B, S] ids → [1, S]. Tasks that count tokens have an input."""
    new = b.op("Squeeze", b.op("Shape", input_ids, name="positions.new_1d", start=1), name="positions.new")  # S
    slots = b.op("Range", b.constant(0), new, b.constant(1), name="positions.slots")  # (S)
    return b.op("Unsqueeze", slots, b.constant([0]), name="positions.default")  # (1, S)


def visible(b: Builder, input_ids: ir.Value, attention_mask: ir.Value, window: int | None) -> ir.Value:
    """Bias added to scores, [B, 1, S, T]: 0 where a query sees a key, else the lowest float.

    A query at absolute index q sees key k iff k <= q, the mask includes k, and q - k < window.
    """
    name = "bias" if window is None else f"bias.window_{window}"
    zero, one, axis = b.constant(0), b.constant(1), b.constant([1])
    new = b.op("Squeeze", b.op("Shape", input_ids, name=f"{name}.new_1d", start=1), name=f"{name}.new")  # S
    total = b.op("Squeeze", b.op("Shape", attention_mask, name=f"{name}.total_1d", start=1), name=f"{name}.total")
    key = b.op("Range", zero, total, one, name=f"{name}.key")  # (T)
    query = b.op("Range", b.op("Sub", total, new, name=f"{name}.past"), total, one, name=f"{name}.query_1d")
    query = b.op("Unsqueeze", query, axis, name=f"{name}.query")  # (S, 1)
    seen = b.op("LessOrEqual", key, query, name=f"{name}.causal")  # (S, T)
    if window is not None:
        distance = b.op("Sub", query, key, name=f"{name}.distance")  # (S, T)
        near = b.op("Less", distance, b.constant(window), name=f"{name}.near")  # (S, T)
        seen = b.op("And", seen, near, name=f"{name}.local")  # (S, T)
    real = b.op("Cast", attention_mask, name=f"{name}.real_2d", to=ir.DataType.BOOL.value)  # (B, T)
    real = b.op("Unsqueeze", real, b.constant([1, 2]), name=f"{name}.real")  # (B, 1, 1, T)
    seen = b.op("And", seen, real, name=f"{name}.seen")  # (B, 1, S, T)
    lowest = float(np.finfo(np.float32).min)
    return b.op("Where", seen, b.constant(0.0, np.float32), b.constant(lowest, np.float32), name=name)


def rotary_angles(b: Builder, rotary: Rotary, position_ids: ir.Value) -> KeyValue:
    """(cos, sin), each [B, S, 1, width], laid out for the pairing of ``rotary``.

    The angles of the position's digits, looked up and added (see ``targets/rotary.py``).
    """
    tables, rest = rotary_tables(rotary), position_ids  # rest: (B, S)
    looked_up = []
    for place, (cos, sin) in enumerate(tables):
        name, digit = f"rotary.{place}", rest  # the highest digit has no limit: Gather rejects what is too large
        if place < len(tables) - 1:
            digit = b.op("Mod", rest, b.constant(BASE), name=f"{name}.digit")  # (B, S)
            rest = b.op("Div", rest, b.constant(BASE), name=f"{name}.rest")  # (B, S)
        pair = [
            b.op("Gather", b.constant(table, np.float32), digit, name=f"{name}.{part}")  # (B, S, 1, width)
            for part, table in (("cos", cos), ("sin", sin))
        ]
        looked_up.append((pair[0], pair[1]))
    angle = looked_up[0]
    for place, digit_angle in enumerate(looked_up[1:], 1):
        angle = angle_sum(b, angle, digit_angle, f"rotary.{place}.sum")  # (B, S, 1, width) each
    return b.narrow(angle[0], "rotary.cos"), b.narrow(angle[1], "rotary.sin")


def angle_sum(b: Builder, x: KeyValue, y: KeyValue, name: str) -> KeyValue:
    """(cos, sin) of the sum of two angles given by their (cos, sin)."""
    (cos_x, sin_x), (cos_y, sin_y) = x, y
    cc, ss = b.op("Mul", cos_x, cos_y, name=f"{name}.cc"), b.op("Mul", sin_x, sin_y, name=f"{name}.ss")
    sc, cs = b.op("Mul", sin_x, cos_y, name=f"{name}.sc"), b.op("Mul", cos_x, sin_y, name=f"{name}.cs")
    return b.op("Sub", cc, ss, name=f"{name}.cos"), b.op("Add", sc, cs, name=f"{name}.sin")


def rotate(b: Builder, config: GPTConfig, x: ir.Value, angles: KeyValue, name: str) -> ir.Value:
    """Rotate the first ``width`` features of each head: [B, S, H, hd] → [B, S, H, hd]."""
    rotary = config.rotary
    if rotary is None:
        return x
    dim, rest_dim = rotary.width, config.head_dim - rotary.width
    turned, rest = x, None
    if rest_dim:
        turned, rest = b.ops(
            "Split", x, b.constant([dim, rest_dim]), names=(f"{name}.turned", f"{name}.rest"), axis=3
        )
    if rotary.interleaved:
        paired = b.op("Reshape", turned, b.constant([0, 0, 0, dim // 2, 2]), name=f"{name}.paired")
        first, second = b.ops("Split", paired, b.constant([1, 1]), names=(f"{name}.a", f"{name}.b"), axis=4)
        other = b.op("Concat", b.op("Neg", second, name=f"{name}.neg"), first, name=f"{name}.swapped", axis=4)
        other = b.op("Reshape", other, b.constant([0, 0, 0, dim]), name=f"{name}.other")
    else:
        halves = b.constant([dim // 2, dim // 2])
        first, second = b.ops("Split", turned, halves, names=(f"{name}.a", f"{name}.b"), axis=3)
        other = b.op("Concat", b.op("Neg", second, name=f"{name}.neg"), first, name=f"{name}.other", axis=3)
    cos, sin = angles
    along, across = b.op("Mul", turned, cos, name=f"{name}.cos"), b.op("Mul", other, sin, name=f"{name}.sin")
    sum_name = name if rest is None else f"{name}.sum"
    turned = b.op("Add", along, across, name=sum_name)
    return turned if rest is None else b.op("Concat", turned, rest, name=name, axis=3)


class Once:
    """Values that all layers share, computed once per run."""

    def __init__(self, b: Builder, config: GPTConfig, inputs: Mapping[str, ir.Value], in_place: bool) -> None:
        self.input_ids = ids = inputs["input_ids"]  # (B, S)
        self.bias = {w: visible(b, ids, inputs["attention_mask"], w) for w in dict.fromkeys(config.attn_window)}
        self.batch_and_new = b.op("Shape", ids, name="shape.tokens")  # [B, S]
        heads = b.constant([config.n_head, config.head_dim])
        self.per_head = b.op("Concat", self.batch_and_new, heads, name="shape.heads", axis=0)  # [B, S, H, hd]
        rotary = config.rotary if config.rotary and config.rotary.dim else None
        self.angles = rotary_angles(b, rotary, inputs["position_ids"]) if rotary else None
        self.lengths, self.per_token = None, self.per_head
        if in_place:
            self.lengths = cache_lengths(b, inputs["attention_mask"], ids)
            self.per_token = b.op("Concat", self.batch_and_new, b.constant([-1]), name="shape.rows_of_tokens", axis=0)


def cache_lengths(b: Builder, attention_mask: ir.Value, input_ids: ir.Value) -> KeyValue:
    """What the in-place kernel needs to know of the cache, in int32: index [B] of the last token, and T."""
    total = b.op("Shape", attention_mask, name="cache.total_1d", start=1)  # [T]
    total = b.op("Cast", total, name="cache.total_1d.int32", to=ir.DataType.INT32.value)
    last = b.op("Sub", total, b.constant([1], np.int32), name="cache.last_1d")  # [T - 1]
    batch = b.op("Shape", input_ids, name="cache.batch", end=1)  # [B]
    return b.op("Expand", last, batch, name="cache.last"), b.op("Squeeze", total, name="cache.total")  # (B), T


def attention(
    b: Builder, config: GPTConfig, i: int, x: ir.Value, once: Once, past: KeyValue | None
) -> tuple[ir.Value, KeyValue]:
    """[N, D] → [N, D] and this layer's keys and values [B, H, T, hd]."""
    name, width = f"h.{i}.attn", config.n_embd
    qkv = b.linear(x, f"{name}.c_attn", bias=config.qkv_bias, name=f"{name}.qkv")  # (N, 3D)
    names = [f"{name}.{part}_2d" for part in "qkv"]
    q, k, v = (
        b.op("Reshape", part, once.per_head, name=f"{name}.{letter}_heads")  # (B, S, H, hd)
        for letter, part in zip("qkv", b.ops("Split", qkv, b.constant([width] * 3), names=names, axis=1), strict=True)
    )
    if once.angles is not None:
        q, k = (rotate(b, config, part, once.angles, f"{part.name}.rotated") for part in (q, k))
    q, k, v = (
        b.op("Transpose", part, name=f"{name}.{letter}", perm=[0, 2, 1, 3])  # (B, H, S, hd)
        for letter, part in zip("qkv", (q, k, v), strict=True)
    )
    if past is not None:
        k = b.op("Concat", past[0], k, name=f"present.{i}.key", axis=2)  # (B, H, T, hd)
        v = b.op("Concat", past[1], v, name=f"present.{i}.value", axis=2)  # (B, H, T, hd)
    if config.attn_scale[i] != 1.0:
        q = b.op("Mul", q, b.constant(config.attn_scale[i], b.number), name=f"{name}.q_scaled")
    flipped = b.op("Transpose", k, name=f"{name}.k_flipped", perm=[0, 1, 3, 2])  # (B, H, hd, T)
    if config.attn_scale[i] == 1.0:  # unscaled scores overflow float16
        scores = b.op("MatMul", b.wide(q), b.wide(flipped), name=f"{name}.scores")  # (B, H, S, T)
    else:
        scores = b.wide(b.op("MatMul", q, flipped, name=f"{name}.scores"))  # (B, H, S, T)
    scores = b.op("Add", scores, once.bias[config.attn_window[i]], name=f"{name}.masked")  # (B, H, S, T)
    weights = b.op("Softmax", scores, name=f"{name}.weights", axis=-1)  # (B, H, S, T)
    weights = b.narrow(weights, f"{name}.weights.float16")  # (B, H, S, T)
    mixed = b.op("MatMul", weights, v, name=f"{name}.mixed")  # (B, H, S, hd)
    mixed = b.op("Transpose", mixed, name=f"{name}.mixed_heads", perm=[0, 2, 1, 3])  # (B, S, H, hd)
    mixed = b.op("Reshape", mixed, b.constant([-1, width]), name=f"{name}.mixed_2d")  # (N, D)
    return b.linear(mixed, f"{name}.c_proj", bias=config.attn_out_bias, name=f"{name}.out"), (k, v)


def attention_in_place(
    b: Builder, config: GPTConfig, i: int, x: ir.Value, once: Once, past: KeyValue | None
) -> tuple[ir.Value, KeyValue]:
    """:func:`attention` by onnxruntime's kernel, which writes new keys and values into the caller's buffer.

    The mask, holes and windows come as a bias: by lengths alone the kernel would be wrong on left padding.
    """
    if past is None or once.lengths is None:
        raise ValueError("attention in place needs a cache")
    name, width = f"h.{i}.attn", config.n_embd
    qkv = b.linear(x, f"{name}.c_attn", bias=config.qkv_bias, name=f"{name}.qkv")  # (N, 3D)
    operands: list[ir.Value | None]
    if once.angles is None:
        operands = [b.op("Reshape", qkv, once.per_token, name=f"{name}.packed"), None, None]  # (B, S, 3D)
    else:
        names = [f"{name}.{part}_2d" for part in "qkv"]
        q, k, v = b.ops("Split", qkv, b.constant([width] * 3), names=names, axis=1)  # (N, D) each
        heads = [b.op("Reshape", part, once.per_head, name=f"{part.name}.heads") for part in (q, k)]  # (B, S, H, hd)
        turned = [rotate(b, config, part, once.angles, f"{part.name}.rotated") for part in heads]
        operands = [b.op("Reshape", part, once.per_token, name=f"{part.name}.rows") for part in (*turned, v)]
    mixed, key, value = b.ops(
        "GroupQueryAttention",
        *operands,
        *past,
        *once.lengths,
        None,
        None,
        None,
        once.bias[config.attn_window[i]],
        names=(f"{name}.mixed", f"present.{i}.key", f"present.{i}.value"),
        domain=MICROSOFT,
        num_heads=config.n_head,
        kv_num_heads=config.n_head,
        scale=config.attn_scale[i],
    )  # (B, S, D), (B, H, T, hd) x 2
    mixed = b.op("Reshape", mixed, b.constant([-1, width]), name=f"{name}.mixed_2d")  # (N, D)
    return b.linear(mixed, f"{name}.c_proj", bias=config.attn_out_bias, name=f"{name}.out"), (key, value)


def mlp(b: Builder, config: GPTConfig, i: int, x: ir.Value) -> ir.Value:
    """[N, D] → [N, D]."""
    name = f"h.{i}.mlp"
    inner = b.linear(x, f"{name}.c_fc", name=f"{name}.inner")  # (N, F)
    inner = ACTIVATION[config.activation](b, b.wide(inner), f"{name}.active")  # (N, F)
    inner = b.narrow(inner, f"{name}.active.float16")  # (N, F)
    return b.linear(inner, f"{name}.c_proj", name=f"{name}.out")  # (N, D)


def norm(b: Builder, config: GPTConfig, x: ir.Value, weight: str, name: str) -> ir.Value:
    """Layer norm over the last axis."""
    scale, shift = b.weight(f"{weight}.weight"), b.weight(f"{weight}.bias")
    return b.op("LayerNormalization", x, scale, shift, name=name, axis=-1, epsilon=config.norm_eps)


def block(
    b: Builder, config: GPTConfig, i: int, x: ir.Value, once: Once, past: KeyValue | None
) -> tuple[ir.Value, KeyValue]:
    """One layer: [N, D] → [N, D], named ``h.{i}``, and its keys and values."""
    name = f"h.{i}"
    attend = attention if once.lengths is None else attention_in_place
    if config.norm_position == "post":
        a, present = attend(b, config, i, x, once, past)  # (N, D)
        n = norm(b, config, b.op("Add", x, a, name=f"{name}.sum_1"), f"{name}.ln_1", f"{name}.norm_1")
        m = b.op("Add", n, mlp(b, config, i, n), name=f"{name}.sum_2")  # (N, D)
        return norm(b, config, m, f"{name}.ln_2", name), present
    n = norm(b, config, x, f"{name}.ln_1", f"{name}.norm_1")  # (N, D)
    a, present = attend(b, config, i, n, once, past)  # (N, D)
    after = b.op("Add", x, a, name=f"{name}.sum_1")  # (N, D)
    if config.has_second_norm:
        before = after if config.residual == "serial" else x  # (N, D)
        n = norm(b, config, before, f"{name}.ln_2", f"{name}.norm_2")  # (N, D)
    return b.op("Add", after, mlp(b, config, i, n), name=name), present  # (N, D)


def embedding(b: Builder, config: GPTConfig, inputs: Mapping[str, ir.Value]) -> ir.Value:
    """Token vectors, plus position vectors if positions are learned: [N, D]."""
    x = _rows(b, "wte.weight", inputs["input_ids"], "tokens")  # (B, S, D)
    if config.rotary is None:
        x = b.op("Add", x, _rows(b, "wpe.weight", inputs["position_ids"], "positions"), name="embedded")
    return b.op("Reshape", x, b.constant([-1, config.n_embd]), name="embedding")  # (N, D)


def _rows(b: Builder, weight: str, ids: ir.Value, name: str) -> ir.Value:
    """Rows of a table in the computing type, [..., width]; only these rows are cast or decoded."""
    found = b.quantised(weight)
    if found is None:
        return b.typed(weight, b.op("Gather", b.stored_weight(weight)[0], ids, name=name))
    table, codes, scales = found
    width = table.shape[1]
    # ai.onnx operators on the bytes of the head: GatherBlockQuantized lacks a kernel in browsers and accepts any id
    rows = b.op("Gather", codes, ids, name=f"{name}.codes")  # (B, S, blocks, block)
    rows = b.op("Cast", rows, name=f"{name}.codes.float32", to=FLOAT.value)
    rows = b.op("Sub", rows, b.constant(table.format.zero, np.float32), name=f"{name}.centred")
    steps = b.op(
        "Unsqueeze", b.op("Gather", scales, ids, name=f"{name}.scales"), b.constant([-1]), name=f"{name}.step"
    )
    whole = name if width % table.format.block == 0 else f"{name}.padded"
    rows = b.op("Mul", rows, steps, name=f"{name}.blocks")  # (B, S, blocks, block)
    rows = b.op("Reshape", rows, b.constant([0, 0, -1]), name=whole)  # (B, S, blocks * block)
    if whole == name:
        return rows
    return b.op("Slice", rows, b.constant([0]), b.constant([width]), b.constant([2]), name=name)  # (B, S, width)


def lm_head(b: Builder, config: GPTConfig, x: ir.Value) -> ir.Value:
    """[N, D] → logits [N, V]; a tied head is the token embedding."""
    weight = "wte.weight" if config.tied_head else "lm_head.weight"
    return b.linear(x, "lm_head", weight=weight, bias=config.head_bias, name="logits_2d")


def qa_outputs(b: Builder, x: ir.Value) -> Sequence[ir.Value]:
    """[N, D] → scores [N, 1] of being the answer's first and last token."""
    scores = b.linear(x, "qa_outputs", name="qa_2d")  # (N, 2)
    return b.ops("Split", scores, b.constant([1, 1]), names=("start_2d", "end_2d"), axis=1)


PROJECTIONS: Mapping[str, Callable[[Builder, GPTConfig, ir.Value], Sequence[ir.Value]]] = {
    "text-generation": lambda b, config, x: (lm_head(b, config, x),),  # (N, V)
    "feature-extraction": lambda b, config, x: (x,),  # (N, D)
    "text-classification": lambda b, config, x: (b.linear(x, "score", bias=False, name="logits_2d"),),  # (N, K)
    "token-classification": lambda b, config, x: (b.linear(x, "classifier", name="logits_2d"),),  # (N, K)
    "question-answering": lambda b, config, x: qa_outputs(b, x),  # 2 x (N, 1)
    "multiple-choice": lambda b, config, x: (lm_head(b, config, x), b.linear(x, "mc_head", name="mc_2d")),
}


def per_token(b: Builder, config: GPTConfig, x: ir.Value) -> dict[str, ir.Value]:
    """Every output of the task, by the names of ``config.OUTPUTS``, for every token: [N, D] → [N, width]."""
    if config.final_norm:
        x = norm(b, config, x, "ln_f", "final_norm")  # (N, D)
    return dict(zip(OUTPUTS[config.task], PROJECTIONS[config.task](b, config, x), strict=True))


def pooled(
    b: Builder, config: GPTConfig, values: Mapping[str, ir.Value], inputs: Mapping[str, ir.Value], once: Once
) -> list[ir.Value]:
    """The task's outputs from :func:`per_token`'s [N, width]; shapes in :func:`output_shapes`."""
    rows = once.batch_and_new  # [B, S]
    if config.task == "question-answering":
        return [b.op("Reshape", value, rows, name=name) for name, value in values.items()]  # (B, S)
    if config.task == "multiple-choice":
        chosen = inputs["mc_token_ids"]  # (B, choices)
        scores = b.op("Reshape", values["mc_logits"], rows, name="mc_rows")  # (B * choices, S)
        index = b.op("Reshape", chosen, b.constant([-1, 1]), name="mc_index")  # (B * choices, 1)
        scores = b.op("GatherND", scores, index, name="mc_chosen", batch_dims=1)  # (B * choices)
        scores = b.op("Reshape", scores, b.op("Shape", chosen, name="shape.choices"), name="mc_logits")
        values, rows = {"logits": values["logits"]}, b.op("Shape", inputs["input_ids"], name="shape.ids")
        return [_in_rows(b, values["logits"], rows, config.vocab_size, "logits"), scores]
    ((name, value),) = values.items()
    if config.task == "text-classification":
        scores = _in_rows(b, value, rows, config.n_labels, f"{name}_rows")  # (B, S, K)
        if config.pad_token_id is None:  # padding cannot be detected: take the last token
            return [b.op("Gather", scores, b.constant(-1), name=name, axis=1)]  # (B, K)
        return [b.op("GatherND", scores, last_real(b, config.pad_token_id, once), name=name, batch_dims=1)]  # (B, K)
    widths = {
        "text-generation": config.vocab_size,
        "feature-extraction": config.n_embd,
        "token-classification": config.n_labels,
    }
    return [_in_rows(b, value, rows, widths[config.task], name)]  # (B, S, width)


def last_logits(b: Builder, config: GPTConfig, x: ir.Value, inputs: Mapping[str, ir.Value], once: Once) -> ir.Value:
    """[N, D] → logits [B, 1, V] of each row's last token that the mask includes.

    Not of index -1: onnxruntime-genai pads batches on the right.
    """
    rows = b.op("Concat", once.batch_and_new, b.constant([config.n_embd]), name="last.rows_shape", axis=0)
    new = b.op("Shape", inputs["input_ids"], name="last.new_1d", start=1)  # [S]
    start, end = b.op("Neg", new, name="last.start"), b.constant([np.iinfo(np.int64).max])
    mask = b.op("Slice", inputs["attention_mask"], start, end, b.constant([1]), name="last.mask")  # (B, S)
    index = b.op("ArgMax", mask, name="last", axis=1, keepdims=1, select_last_index=1)  # (B, 1)
    x = b.op("GatherND", b.op("Reshape", x, rows, name="last.all"), index, name="last.row", batch_dims=1)  # (B, D)
    (logits,) = per_token(b, config, x).values()  # (B, V)
    return b.op("Unsqueeze", logits, b.constant([1]), name="logits")  # (B, 1, V)


def _in_rows(b: Builder, value: ir.Value, rows: ir.Value, width: int, name: str) -> ir.Value:
    """[N, width] → [*rows, width]."""
    shape = b.op("Concat", rows, b.constant([width]), name="shape.output", axis=0)
    return b.op("Reshape", value, shape, name=name)


def last_real(b: Builder, pad_token_id: int, once: Once) -> ir.Value:
    """Index [B, 1] of the last token whose id is not the padding id; the first token if there is none."""
    new = b.op("Squeeze", b.op("Shape", once.input_ids, name="last.new_1d", start=1), name="last.new")  # S
    index = b.op("Range", b.constant(0), new, b.constant(1), name="last.index")  # (S)
    padding = b.op("Equal", once.input_ids, b.constant(pad_token_id), name="last.padding")  # (B, S)
    real = b.op("Cast", b.op("Not", padding, name="last.real"), name="last.real_01", to=INT64.value)  # (B, S)
    places = b.op("Mul", index, real, name="last.places")  # (B, S)
    return b.op("ArgMax", places, name="last", axis=1, keepdims=1)  # (B, 1)


def output_shapes(config: GPTConfig) -> list[tuple[Dim, ...]]:
    """The shape of each of ``config.OUTPUTS``."""
    shapes: Mapping[str, list[tuple[Dim, ...]]] = {
        "text-generation": [(BATCH, 1 if config.last_token else NEW, config.vocab_size)],
        "feature-extraction": [(BATCH, NEW, config.n_embd)],
        "text-classification": [(BATCH, config.n_labels)],
        "token-classification": [(BATCH, NEW, config.n_labels)],
        "question-answering": [(BATCH, NEW), (BATCH, NEW)],
        "multiple-choice": [(BATCH, CHOICES, NEW, config.vocab_size), (BATCH, CHOICES)],
    }
    return shapes[config.task]


def input_shapes(config: GPTConfig, kv_cache: bool, position_ids: bool) -> dict[str, tuple[Dim, ...]]:
    """The shape of each input but the cache: ``config.INPUTS``, and ``position_ids`` if the graph takes them."""
    rows: tuple[Dim, ...] = (BATCH, CHOICES) if config.task == "multiple-choice" else (BATCH,)
    shapes: Mapping[str, tuple[Dim, ...]] = {
        "input_ids": (*rows, NEW),
        "attention_mask": (*rows, TOTAL if kv_cache else NEW),
        "position_ids": (*rows, NEW),
        "mc_token_ids": rows,
    }
    names = {*INPUTS[config.task], *(["position_ids"] if position_ids else [])}
    return {name: shape for name, shape in shapes.items() if name in names}


@dataclass(frozen=True)
class Form:
    """What distinguishes two graphs of one model.

    Attributes:
        opset: version of the operators of ai.onnx.
        kv_cache: takes and returns cached keys and values.
        position_ids: takes ``position_ids`` for every task.
        accuracy_level: of ``MatMulNBits``, if the weights are quantised.
        half: computes in float16, and takes and returns it.
        in_place: writes keys and values into the caller's buffer, by onnxruntime's GroupQueryAttention.
    """

    opset: int
    kv_cache: bool
    position_ids: bool
    accuracy_level: int = 0
    in_place: bool = False
    half: bool = False


def build(config: GPTConfig, weights: Mapping[str, LazyTensor], form: Form) -> tuple[ir.Graph, Builder]:
    """The whole graph, without its weights attached.

    Names, order, types and symbolic dimensions of inputs and outputs are a contract (docs/onnx.md).
    """
    b = Builder(weights, form.opset, form.accuracy_level, half=form.half)
    shapes = input_shapes(config, form.kv_cache, form.position_ids)
    inputs = {name: graph_input(name, INT64, shape) for name, shape in shapes.items()}
    pasts: list[KeyValue | None] = [None] * config.n_layer
    cache_shape = (BATCH, config.n_head, PAST, config.head_dim)
    if form.kv_cache:
        pasts = [
            (
                graph_input(f"past_key_values.{i}.key", b.float_type, cache_shape),
                graph_input(f"past_key_values.{i}.value", b.float_type, cache_shape),
            )
            for i in range(config.n_layer)
        ]
    rows = flattened(b, config, inputs)
    once = Once(b, config, rows, form.in_place)
    x = embedding(b, config, rows)  # (N, D)
    presents = []
    for i in range(config.n_layer):
        x, present = block(b, config, i, x, once, pasts[i])  # (N, D)
        presents += [as_output(p, b.float_type, (BATCH, config.n_head, TOTAL, config.head_dim)) for p in present]
    if config.last_token:
        outputs = [last_logits(b, config, x, rows, once)]
    else:
        outputs = pooled(b, config, per_token(b, config, x), inputs, once)
    outputs = [as_output(o, b.float_type, shape) for o, shape in zip(outputs, output_shapes(config), strict=True)]
    graph = ir.Graph(
        [*inputs.values(), *(p for pair in pasts if pair for p in pair)],
        [*outputs, *(presents if form.kv_cache else [])],
        nodes=[*b.casts, *b.nodes],
        initializers=b.initializers(),
        opset_imports=b.domains,
        name="gpt",
    )
    return graph, b
