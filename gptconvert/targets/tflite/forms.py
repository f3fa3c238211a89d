"""How each type of file stores the weights: one table for the converter and for the verification."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.encodings import MATRICES, VOCABULARY
from gptconvert.model.int8 import Int8Rows
from gptconvert.model.tensors import LazyTensor, Shape
from gptconvert.model.transforms import cast
from gptconvert.targets.saved_model.contract import POSITIONS, signature_names
from reference_model.config import GPTConfig

Form = Literal["f32", "f16", "int8"]
#: Type → name of its file.
FILES: Mapping[str, str] = {"f32": "model.tflite", "f16": "model_fp16.tflite", "int8": "model_int8.tflite"}
#: Signatures of the SavedModel that a file has.
SIGNATURES = ("serving_default", POSITIONS, "decode")
#: What follows the name of an 8-bit embedding in the names of its codes and scales, by which rows are looked up.
CODES_SUFFIX, SCALES_SUFFIX = "/codes", "/scales"


def signatures_of(config: GPTConfig) -> tuple[str, ...]:
    """Names of the signatures of a model."""
    return tuple(name for name in signature_names(config) if name in SIGNATURES)


def form_of(kind: str, name: str, shape: Shape) -> Form:
    """How a file of type ``kind`` stores a weight: norms and biases in float32, positions in 16 bits or more."""
    if len(shape) != 2 or kind == "f32":
        return "f32"
    if kind == "f16":
        return "f16"
    return "int8" if name in VOCABULARY or name.endswith(_OF_BLOCKS) else "f32"


_OF_BLOCKS = tuple(f".{part}.{name}" for part in ("attn", "mlp") for name in MATRICES)

_STORED: Mapping[Form, Callable[[LazyTensor], LazyTensor]] = {
    "f32": lambda weight: cast(weight, np.dtype(np.float32)),
    "f16": lambda weight: cast(weight, np.dtype(np.float16)),
    "int8": lambda weight: Int8Rows.of(cast(weight, np.dtype(np.float32))),
}


def stored_as(checkpoint: Checkpoint, form: Callable[[str, Shape], Form]) -> Checkpoint:
    """The checkpoint with every weight as the file stores it."""
    weights = {name: _STORED[form(name, weight.shape)](weight) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)
