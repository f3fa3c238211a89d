"""Activations by exact formula, as nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from gptconvert.targets.onnx.builder import Builder


def gelu_tanh(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    if b.opset >= 20:
        return b.op("Gelu", x, name=name, approximate="tanh")
    square = b.op("Mul", x, x, name=f"{name}.square")
    slope = b.op("Mul", square, b.constant(0.044715 * math.sqrt(2 / math.pi), np.float32), name=f"{name}.slope")
    slope = b.op("Add", slope, b.constant(math.sqrt(2 / math.pi), np.float32), name=f"{name}.slope_1")
    gate = b.op("Tanh", b.op("Mul", x, slope, name=f"{name}.inner"), name=f"{name}.tanh")
    return _half_gated(b, x, gate, name)


def gelu_erf(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """0.5 x (1 + erf(x / √2))."""
    if b.opset >= 20:
        return b.op("Gelu", x, name=name, approximate="none")
    inner = b.op("Mul", x, b.constant(math.sqrt(0.5), np.float32), name=f"{name}.inner")
    return _half_gated(b, x, b.op("Erf", inner, name=f"{name}.erf"), name)


def _half_gated(b: Builder, x: ir.Value, gate: ir.Value, name: str) -> ir.Value:
    """0.5 x (1 + gate)."""
    gate = b.op("Add", gate, b.constant(1.0, np.float32), name=f"{name}.gate")
    half = b.op("Mul", x, b.constant(0.5, np.float32), name=f"{name}.half")
    return b.op("Mul", half, gate, name=name)


def silu(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """X · sigmoid(x)."""
    return b.op("Mul", x, b.op("Sigmoid", x, name=f"{name}.gate"), name=name)


ACTIVATION: Mapping[str, Callable[[Builder, ir.Value, str], ir.Value]] = {
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "relu": lambda b, x, name: b.op("Relu", x, name=name),
    "silu": silu,
    "tanh": lambda b, x, name: b.op("Tanh", x, name=name),
}
