"""A thin layer over onnx_ir: named weights, small constants, and one call per node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from gptconvert.model.blocks import CODES, SCALES, Quantised
from gptconvert.model.tensors import LazyTensor
from gptconvert.targets.layout import TABLES, as_stored

Dim = int | str
#: Domain of the operators that only onnxruntime and OpenVINO define.
MICROSOFT = "com.microsoft"


class Builder:
    """Collects the nodes, weights and constants of one graph.

    Attributes:
        nodes: in topological order.
        casts: casts of weights to the computing type. They precede all other nodes: onnxruntime runs a node's inputs
            in the reverse order of the file, so a cast at the top runs last, just before its only use. A cast placed
            beside its use would run before all earlier layers, and the whole model would be in memory in float32.
        stored: initializer → the tensor as stored in the file, in order of first use. A transposed weight keeps
            the source's layout; the node that uses it transposes (``transB``). A quantised weight has an initializer
            for each of its parts.
        parts: initializer → the weight's canonical name and the part of it.

    Args:
        weights: canonical name → weight.
        opset: version of the operators of ai.onnx.
        accuracy_level: of ``MatMulNBits``: 4 rounds activations to 8 bits; 0 leaves the choice to the runtime.
        half: compute in float16 instead of float32, except where that would overflow or lose too much.
    """

    def __init__(
        self, weights: Mapping[str, LazyTensor], opset: int, accuracy_level: int = 0, *, half: bool = False
    ) -> None:
        self.weights, self.opset, self.accuracy_level, self.half = weights, opset, accuracy_level, half
        self.number: np.dtype[np.generic] = np.dtype(np.float16 if half else np.float32)
        self.float_type = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
        self.parts: dict[str, tuple[str, str]] = {}
        self.stored: dict[str, LazyTensor] = {}
        self.nodes: list[ir.Node] = []
        self.casts: list[ir.Node] = []
        self.constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        self._values: dict[str, ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value, name: str, **attributes: ir.SupportedAttrTypes) -> ir.Value:
        """The single output, called ``name``, of a new node."""
        return self.ops(kind, *inputs, names=(name,), **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        names: Sequence[str],
        domain: str = "",
        **attributes: ir.SupportedAttrTypes,
    ) -> Sequence[ir.Value]:
        """The outputs, called ``names``, of a new node. An input that is None is omitted."""
        outputs = [ir.Value(name=name) for name in names]
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        self.nodes.append(ir.Node(domain, kind, inputs, attrs, outputs=outputs, name=f"/{names[0]}"))
        return outputs

    @property
    def domains(self) -> dict[str, int]:
        """Domain → version of every operator set in use."""
        return {"": self.opset, **({MICROSOFT: 1} if any(node.domain == MICROSOFT for node in self.nodes) else {})}

    def constant(self, value: object, dtype: type[np.generic] | np.dtype[np.generic] = np.int64) -> ir.Value:
        """A small constant; equal constants share one initializer."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self.constants:
            name = f"constant.{len(self.constants)}"
            self.constants[key] = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        return self.constants[key]

    def stored_weight(self, name: str) -> tuple[ir.Value, bool]:
        """The initializer that holds a weight, and whether it is the weight's transpose."""
        stored, flipped = as_stored(name, self.weights[name])
        return self._initializer(name, stored, name, ""), flipped

    def _initializer(self, name: str, stored: LazyTensor, weight: str, part: str) -> ir.Value:
        if name not in self._values:
            self.stored[name], self.parts[name] = stored, (weight, part)
            self._values[name] = ir.Value(name=name)
        return self._values[name]

    def quantised(self, name: str) -> tuple[Quantised, ir.Value, ir.Value] | None:
        """A quantised weight with the initializers of its codes and scales; None if it is not quantised."""
        weight = self.weights[name]
        if not isinstance(weight, Quantised):
            return None
        codes, scales = (
            self._initializer(f"{name}.{part}", weight.parts[part], name, part) for part in (CODES, SCALES)
        )
        return weight, codes, scales

    def weight(self, name: str) -> ir.Value:
        """A weight other than a matrix, in the computing type."""
        return self.typed(name, self.stored_weight(name)[0])

    def wide(self, value: ir.Value) -> ir.Value:
        """``value`` in float32, from the computing type."""
        return (
            self.op("Cast", value, name=f"{value.name}.float32", to=ir.DataType.FLOAT.value) if self.half else value
        )

    def narrow(self, value: ir.Value, name: str) -> ir.Value:
        """``value``, in float32, in the computing type; called ``name`` if that is another."""
        return self.op("Cast", value, name=name, to=self.float_type.value) if self.half else value

    def typed(self, name: str, value: ir.Value) -> ir.Value:
        """``value`` (the weight ``name`` or rows of it), cast to the computing type if stored in another."""
        if self.weights[name].dtype == self.number:
            return value
        wide = f"{value.name}.{self.number.name}"
        if wide not in self._values:
            self._values[wide] = self.op("Cast", value, name=wide, to=self.float_type.value)
            if value is self._values[name]:
                self.casts.append(self.nodes.pop())
        return self._values[wide]

    def linear(
        self, x: ir.Value, prefix: str, *, weight: str | None = None, bias: bool = True, name: str
    ) -> ir.Value:
        """``x`` [N, in] times the weight ``prefix.weight`` [out, in] (stored either way) plus bias → [N, out].

        A weight stored as [in, out] has a ``MatMul``, which other programs' quantisers look for, and an ``Add``;
        onnxruntime fuses the two into a ``Gemm``, which the other orientation needs. An ``Identity`` protects a tied
        table from onnxruntime's ``quantize_dynamic``, which transposes the initializer of a ``Gemm`` in place.
        """
        matrix_name = weight or f"{prefix}.weight"
        shift = self.weight(f"{prefix}.bias") if bias else None
        if (found := self.quantised(matrix_name)) is not None:
            return self._block_linear(x, *found, shift, name)
        stored, flipped = self.stored_weight(matrix_name)
        matrix = self.typed(matrix_name, stored)
        if not flipped:
            if matrix_name in TABLES and matrix is stored:
                matrix = self.op("Identity", matrix, name=f"{prefix}.tied")
            return self.op("Gemm", x, matrix, *([] if shift is None else [shift]), name=name, transB=1)
        if shift is None:
            return self.op("MatMul", x, matrix, name=name)
        return self.op("Add", self.op("MatMul", x, matrix, name=f"{name}.product"), shift, name=name)

    def _block_linear(
        self, x: ir.Value, matrix: Quantised, codes: ir.Value, scales: ir.Value, bias: ir.Value | None, name: str
    ) -> ir.Value:
        """``x`` [N, in] times a quantised matrix [out, in] plus bias → [N, out]."""
        operands = [x, codes, scales] if bias is None else [x, codes, scales, None, None, bias]
        out, width = matrix.shape
        sizes = {"K": width, "N": out, "bits": matrix.format.bits, "block_size": matrix.format.block}
        level = {"accuracy_level": self.accuracy_level} if self.accuracy_level else {}
        return self.ops("MatMulNBits", *operands, names=(name,), domain=MICROSOFT, **sizes, **level)[0]

    def initializers(self) -> list[ir.Value]:
        """Constants, then weights sorted by name."""
        return [*self.constants.values(), *(self._values[name] for name in sorted(self.stored))]


def graph_input(name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
    """A typed graph input; strings are symbolic dimensions."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def as_output(value: ir.Value, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
    """``value`` with the type and shape that an output must declare."""
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    return value
