"""The signatures of a SavedModel: names, types and shapes that clients rely on (docs/serving.md). No TensorFlow here.

All integers are int64, except in the int32 twin. ``decode`` uses the names of the ONNX graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from reference_model.config import CACHED_TASKS, COUNTED_TASKS, INPUTS, OUTPUTS, GPTConfig

#: A size; None for any.
Size = int | None
#: Name → (type, shape).
Table = Mapping[str, tuple[str, tuple[Size, ...]]]
#: Batch size, number of new tokens, number of past and new tokens.
Lengths = tuple[Size, Size, Size]

ANY: Lengths = (None, None, None)
INT32 = "serving_int32"
#: ``serving_default`` with ``position_ids``; language models have ``decode``, which takes them.
POSITIONS = "serving_positions"
XLA = "_xla"


def signature_names(config: GPTConfig, xla: bool = False) -> tuple[str, ...]:
    """Names of a task's signatures; with ``xla`` also of their compiled twins."""
    cached = ("decode",) if config.task in CACHED_TASKS else ()
    generating = ("last_logits", "generate") if config.task == "text-generation" else ()
    positioned = () if config.task in COUNTED_TASKS else (POSITIONS,)
    names = ("serving_default", INT32, *positioned, *cached, *generating)
    return (*names, *(name + XLA for name in names if name not in (INT32, POSITIONS))) if xla else names


def lengths_of(config: GPTConfig, name: str) -> Lengths:
    """Any, except for compiled twins: one sequence as long as the context; ``decode_xla`` takes its last token."""
    if not name.endswith(XLA):
        return ANY
    return 1, 1 if name.startswith("decode") else config.n_ctx, config.n_ctx


def inputs_of(config: GPTConfig, name: str) -> Table:
    """Inputs of a signature."""
    batch, new, total = lengths_of(config, name)
    rows = (batch, None) if config.task == "multiple-choice" else (batch,)
    integer = "int32" if name == INT32 else "int64"
    table: dict[str, tuple[str, tuple[Size, ...]]] = {
        "input_ids": (integer, (*rows, new)),
        "attention_mask": (integer, (*rows, total)),
    }
    if name == POSITIONS:
        table["position_ids"] = integer, (*rows, new)
    if "mc_token_ids" in INPUTS[config.task]:
        table["mc_token_ids"] = integer, rows
    if name.startswith("decode"):
        past = None if total is None or new is None else total - new
        table["position_ids"] = integer, (batch, new)
        table |= _cache(config, "past_key_values", (batch, config.n_head, past, config.head_dim))
    if name.startswith("generate"):
        table |= dict.fromkeys(("max_new_tokens", "top_k", "seed"), (integer, ()))
        table["temperature"] = "float32", ()
    return table


def outputs_of(config: GPTConfig, name: str) -> Table:
    """Outputs of a signature."""
    batch, new, total = lengths_of(config, name)
    if name.startswith("last_logits"):
        return {"logits": ("float32", (batch, config.vocab_size))}
    if name.startswith("generate"):
        return {"sequences": ("int64", (batch, total))}
    rows = (batch, None) if config.task == "multiple-choice" else (batch,)
    shapes: Mapping[str, tuple[tuple[Size, ...], ...]] = {
        "text-generation": ((batch, new, config.vocab_size),),
        "feature-extraction": ((batch, new, config.n_embd),),
        "text-classification": ((batch, config.n_labels),),
        "token-classification": ((batch, new, config.n_labels),),
        "question-answering": ((batch, new), (batch, new)),
        "multiple-choice": ((*rows, new, config.vocab_size), rows),
    }
    named = zip(OUTPUTS[config.task], shapes[config.task], strict=True)
    table = {output: ("float32", shape) for output, shape in named}
    if name.startswith("decode"):
        table |= _cache(config, "present", (batch, config.n_head, total, config.head_dim))
    return table


def cache_names(config: GPTConfig, prefix: str) -> list[tuple[str, str]]:
    """(key, value) names per layer."""
    return [(f"{prefix}.{i}.key", f"{prefix}.{i}.value") for i in range(config.n_layer)]


def _cache(config: GPTConfig, prefix: str, shape: tuple[Size, ...]) -> dict[str, tuple[str, tuple[Size, ...]]]:
    return {name: ("float32", shape) for pair in cache_names(config, prefix) for name in pair}
