"""Refuses LiteRT files that hold more than a model's mathematics. LiteRT itself runs in a confined process."""

from __future__ import annotations

from gptconvert.containers.tflite import TfliteModel
from gptconvert.targets.calls import refuse

#: Numbers of built-in operators that run other graphs, keep state, or are not built in (schema.fbs, BuiltinOperator).
REFUSED = {
    31: "CALL",
    32: "an operator that is not built in",
    51: "DELEGATE",
    118: "IF",
    119: "WHILE",
    129: "CALL_ONCE",
    136: "HASHTABLE",
    137: "HASHTABLE_FIND",
    138: "HASHTABLE_IMPORT",
    139: "HASHTABLE_SIZE",
    142: "VAR_HANDLE",
    143: "READ_VARIABLE",
    144: "ASSIGN_VARIABLE",
    173: "STABLEHLO_CUSTOM_CALL",
    200: "STABLEHLO_WHILE",
    206: "STABLEHLO_COMPOSITE",
}


def check_model(model: TfliteModel) -> int:
    """The bytes of the graphs of a file of unknown origin, without the constants.

    Raises:
        UnsafeInputError: it has operators that other models do not need.
    """
    found = {operator for graph in model.graphs for operator in graph.operators if operator in REFUSED}
    refuse([f"operator {operator}: {REFUSED[operator]}" for operator in sorted(found)], model.path, "LiteRT")
    return model.nbytes - model.constant_bytes
