"""The ONNX contract: the names, types and symbolic shapes that other software relies on, checked in our own files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptconvert.model.options import OPSETS
from gptconvert.targets.onnx.file import OnnxFile
from gptconvert.targets.onnx.plan import IR_VERSIONS
from gptconvert.targets.onnx.runner import element_type
from reference_model.config import OUTPUTS, GPTConfig

CHOICES, NEW, PAST = "num_choices", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {NEW}"

Table = dict[str, tuple[str, tuple[int | str, ...]]]


def check_contract(file: OnnxFile, config: GPTConfig, portable: bool = True) -> list[str]:
    """Violations of the contract, one line each. ``portable`` graphs use operators of ai.onnx only."""
    domains = ("", "ai.onnx", *([] if portable else ["com.microsoft"]))
    problems = [f"operator domain {o.domain!r}" for o in file.model.opset_import if o.domain not in domains]
    problems += [
        f"operator {node.domain}.{node.op_type}"
        for node in file.model.graph.node
        if node.domain == "com.microsoft" and node.op_type not in ("MatMulNBits", "GroupQueryAttention")
    ]
    problems += [f"opset {o.version} > {OPSETS[-1]}" for o in file.model.opset_import if o.version > OPSETS[-1]]
    if file.model.ir_version > max(IR_VERSIONS.values()):
        problems.append(f"IR version {file.model.ir_version} > {max(IR_VERSIONS.values())}")
    return [*problems, *check_interface(file, config)]


def check_interface(file: OnnxFile, config: GPTConfig) -> list[str]:
    """Inputs and outputs that differ from the contract's, one line each."""
    cached = any(name.startswith("past_key_values.") for name in file.inputs())
    inputs, outputs = expected_tables(config, cached, cached or "position_ids" in file.inputs(), half=file.is_half)
    return [*_differences("input", inputs, file.inputs()), *_differences("output", outputs, file.outputs())]


def expected_tables(config: GPTConfig, cached: bool, positions: bool, *, half: bool = False) -> tuple[Table, Table]:
    """(inputs, outputs): name → (type, shape), in order.

    Args:
        config: of the model.
        cached: whether the graph has a cache.
        positions: whether a graph that is not a language model's takes ``position_ids``.
        half: whether it computes in float16.
    """
    number = "FLOAT16" if half else "FLOAT"
    batch, total = "batch_size", TOTAL if cached else NEW
    rows: tuple[int | str, ...] = (batch, CHOICES) if config.task == "multiple-choice" else (batch,)
    inputs: Table = {"input_ids": ("INT64", (*rows, NEW)), "attention_mask": ("INT64", (*rows, total))}
    if positions or config.task == "text-generation":
        inputs["position_ids"] = "INT64", (*rows, NEW)
    if config.task == "multiple-choice":
        inputs["mc_token_ids"] = "INT64", rows
    shapes: Mapping[str, tuple[tuple[int | str, ...], ...]] = {
        "text-generation": ((batch, 1 if config.last_token else NEW, config.vocab_size),),
        "feature-extraction": ((batch, NEW, config.n_embd),),
        "text-classification": ((batch, config.n_labels),),
        "token-classification": ((batch, NEW, config.n_labels),),
        "question-answering": ((batch, NEW), (batch, NEW)),
        "multiple-choice": ((*rows, NEW, config.vocab_size), rows),
    }
    named = zip(OUTPUTS[config.task], shapes[config.task], strict=True)
    outputs: Table = {name: (number, shape) for name, shape in named}
    for i in range(config.n_layer if cached else 0):
        for part in ("key", "value"):
            inputs[f"past_key_values.{i}.{part}"] = (number, (batch, config.n_head, PAST, config.head_dim))
            outputs[f"present.{i}.{part}"] = (number, (batch, config.n_head, TOTAL, config.head_dim))
    return inputs, outputs


def _differences(what: str, expected: Table, found: dict[str, Any]) -> list[str]:
    problems = [f"{what} {name} is missing" for name in expected if name not in found]
    problems += [f"{what} {name} is not in the contract" for name in found if name not in expected]
    if not problems and list(found) != list(expected):
        problems.append(f"{what}s are not in the order of the contract")
    for name, (kind, shape) in expected.items():
        if name in found:
            actual = element_type(found[name]), _shape(found[name])
            if actual != (kind, shape):
                problems.append(f"{what} {name} is {actual[0]} {list(actual[1])}, expected {kind} {list(shape)}")
    return problems


def _shape(value: Any) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)
