"""The ONNX contract: the names, types and symbolic shapes that other software relies on, checked in our own files."""

from __future__ import annotations

from typing import Any

from gptconvert.model.options import OPSETS
from gptconvert.targets.onnx.file import OnnxFile
from gptconvert.targets.onnx.plan import IR_VERSIONS
from gptconvert.targets.onnx.runner import element_type
from reference_model.config import GPTConfig

NEW, PAST = "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {NEW}"

Table = dict[str, tuple[str, tuple[int | str, ...]]]


def check_contract(file: OnnxFile, config: GPTConfig) -> list[str]:
    """Violations of the contract, one line each. Only two tasks have tables of inputs and outputs."""
    problems = [f"operator domain {o.domain!r}" for o in file.model.opset_import if o.domain not in ("", "ai.onnx")]
    problems += [f"opset {o.version} > {OPSETS[-1]}" for o in file.model.opset_import if o.version > OPSETS[-1]]
    if file.model.ir_version > max(IR_VERSIONS.values()):
        problems.append(f"IR version {file.model.ir_version} > {max(IR_VERSIONS.values())}")
    if config.task not in ("text-generation", "feature-extraction"):
        return problems
    cached = any(name.startswith("past_key_values.") for name in file.inputs())
    inputs, outputs = expected_tables(config, cached)
    return [
        *problems,
        *_differences("input", inputs, file.inputs()),
        *_differences("output", outputs, file.outputs()),
    ]


def expected_tables(config: GPTConfig, cached: bool) -> tuple[Table, Table]:
    """(inputs, outputs): name → (type, shape), in order."""
    batch, total = "batch_size", TOTAL if cached else NEW
    inputs: Table = {
        "input_ids": ("INT64", (batch, NEW)),
        "attention_mask": ("INT64", (batch, total)),
        "position_ids": ("INT64", (batch, NEW)),
    }
    main = ("logits", config.vocab_size) if config.task == "text-generation" else ("last_hidden_state", config.n_embd)
    outputs: Table = {main[0]: ("FLOAT", (batch, NEW, main[1]))}
    for i in range(config.n_layer if cached else 0):
        for part in ("key", "value"):
            inputs[f"past_key_values.{i}.{part}"] = ("FLOAT", (batch, config.n_head, PAST, config.head_dim))
            outputs[f"present.{i}.{part}"] = ("FLOAT", (batch, config.n_head, TOTAL, config.head_dim))
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
