"""How the graphs store weights that a checkpoint stores in columns."""

from __future__ import annotations

from gptconvert.model.tensors import LazyTensor, Transposed

#: Weights that are looked up by row, and so never stored transposed.
TABLES = ("wte.weight", "wpe.weight")


def as_stored(name: str, weight: LazyTensor) -> tuple[LazyTensor, bool]:
    """The weight as the graph stores it, and whether that is its transpose, which a matrix product undoes."""
    if isinstance(weight, Transposed) and name not in TABLES:
        return weight.base, True
    return weight, False
