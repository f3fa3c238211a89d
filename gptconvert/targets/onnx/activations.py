"""Activations by exact formula, as nodes.

Only operators that every build of onnxruntime has; forms that do not cancel where the input is negative.
"""

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


def gelu_erf_10(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """:func:`gelu_erf`, clipped to [-10, 10]."""
    return _clip(b, gelu_erf(b, x, f"{name}.gelu"), -10, 10, name)


def gelu_sigmoid(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """X · sigmoid(1.702 x)."""
    scaled = b.op("Mul", x, b.constant(1.702, np.float32), name=f"{name}.scaled")
    return b.op("Mul", x, b.op("Sigmoid", scaled, name=f"{name}.gate"), name=name)


def relu_squared(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """max(x, 0)²."""
    positive = b.op("Relu", x, name=f"{name}.relu")
    return b.op("Mul", positive, positive, name=name)


def hardswish(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """X · clip(x + 3, 0, 6) / 6."""
    shifted = b.op("Add", x, b.constant(3.0, np.float32), name=f"{name}.shifted")
    product = b.op("Mul", x, _clip(b, shifted, 0, 6, f"{name}.gate"), name=f"{name}.product")
    return b.op("Mul", product, b.constant(1 / 6, np.float32), name=name)


def mish(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """X · tanh(log(1 + eˣ)) as x · n / (n + 2) with n = eˣ (eˣ + 2); from 20 on the factor is 1 in float32."""
    two = b.constant(2.0, np.float32)
    capped = b.op("Min", x, b.constant(20.0, np.float32), name=f"{name}.capped")
    exponential = b.op("Exp", capped, name=f"{name}.exp")
    n = b.op("Mul", exponential, b.op("Add", exponential, two, name=f"{name}.exp_2"), name=f"{name}.n")
    gate = b.op("Div", n, b.op("Add", n, two, name=f"{name}.n_2"), name=f"{name}.gate")
    return b.op("Mul", x, gate, name=name)


def laplace(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """0.5 (1 + erf((x - 0.707107) / (0.282095 √2)))."""
    centred = b.op("Sub", x, b.constant(0.707107, np.float32), name=f"{name}.centred")
    inner = b.op("Mul", centred, b.constant(math.sqrt(0.5) / 0.282095, np.float32), name=f"{name}.inner")
    total = b.op("Add", b.op("Erf", inner, name=f"{name}.erf"), b.constant(1.0, np.float32), name=f"{name}.total")
    return b.op("Mul", total, b.constant(0.5, np.float32), name=name)


def sqrt_softplus(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """√log(1 + eˣ), the logarithm as max(x, 0) + 2 artanh(t / (2 + t)) with t = e^-|x|."""
    small = b.op("Exp", b.op("Neg", b.op("Abs", x, name=f"{name}.abs"), name=f"{name}.neg"), name=f"{name}.exp")
    sum_2 = b.op("Add", small, b.constant(2.0, np.float32), name=f"{name}.exp_2")
    half = b.op("Atanh", b.op("Div", small, sum_2, name=f"{name}.ratio"), name=f"{name}.half")
    log = b.op("Add", half, half, name=f"{name}.log")
    softplus = b.op("Add", b.op("Relu", x, name=f"{name}.relu"), log, name=f"{name}.softplus")
    return b.op("Sqrt", softplus, name=name)


def _clip(b: Builder, x: ir.Value, low: float, high: float, name: str) -> ir.Value:
    return b.op("Clip", x, b.constant(low, np.float32), b.constant(high, np.float32), name=name)


ACTIVATION: Mapping[str, Callable[[Builder, ir.Value, str], ir.Value]] = {
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "gelu_erf_10": gelu_erf_10,
    "gelu_sigmoid": gelu_sigmoid,
    "relu": lambda b, x, name: b.op("Relu", x, name=name),
    "relu_squared": relu_squared,
    "relu6": lambda b, x, name: _clip(b, x, 0, 6, name),
    "leaky_relu": lambda b, x, name: b.op("LeakyRelu", x, name=name, alpha=0.01),
    "silu": silu,
    "hardswish": hardswish,
    "mish": mish,
    "tanh": lambda b, x, name: b.op("Tanh", x, name=name),
    "sigmoid": lambda b, x, name: b.op("Sigmoid", x, name=name),
    "laplace": laplace,
    "sqrt_softplus": sqrt_softplus,
    "linear": lambda b, x, name: x,
}
