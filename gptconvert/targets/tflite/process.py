"""The client of :mod:`.worker`: LiteRT in a process, through the wheel ``ai-edge-litert``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptconvert.errors import UnsupportedError, install_hint
from gptconvert.model.tensors import Array
from gptconvert.publish.utf8_path import utf8_path
from gptconvert.targets.child.client import ChildError, ChildProcess

PACKAGE = "ai_edge_litert"


class LiteError(ChildError):
    """LiteRT failed, or its process died; the message is one line."""


def is_installed() -> bool:
    """Whether LiteRT can run here; does not import it."""
    return importlib.util.find_spec(PACKAGE) is not None


def require_litert() -> None:
    """Raise :class:`UnsupportedError` unless LiteRT can run here."""
    if not is_installed():
        raise UnsupportedError(
            "running LiteRT files needs the Python package ai-edge-litert, which is not installed",
            hint=install_hint("tflite"),
        )


class LiteProcess(ChildProcess):
    """A LiteRT process; use as a context manager.

    Args:
        limits: for a file of unknown origin; None for one that was just written.
    """

    module, program, subject, error = "gptconvert.targets.tflite.worker", "LiteRT", "LiteRT model", LiteError

    def load(
        self, path: str, threads: int, *, float_products: bool = False, delegates: bool = True
    ) -> Mapping[str, Any]:
        """Load a model; returns its signatures.

        Args:
            path: of the file.
            threads: to compute in.
            float_products: whether to multiply by 8-bit matrices in float32, instead of rounding activations too.
            delegates: whether to use XNNPACK, LiteRT's faster kernels.

        Raises:
            LiteError: LiteRT refuses the file.
            UnsafeInputError: a confined process exceeded its time, or died.
        """
        with utf8_path(os.path.abspath(path)) as readable:
            fields = {"threads": threads, "float_products": float_products, "delegates": delegates}
            signatures: Mapping[str, Any] = self.call("load", path=readable, **fields)[0]["signatures"]  # type: ignore[arg-type]
            return signatures

    def run(self, signature: str, inputs: Mapping[str, Array], wanted: tuple[str, ...] = ()) -> dict[str, Array]:
        """Run a signature of the loaded model; return the outputs in ``wanted``, or all. Raises as :meth:`load`."""
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        tokens = sum(array.size for array in arrays.values() if array.dtype.kind == "i")
        return self.call("run", None, arrays, tokens, signature=signature, wanted=wanted)[1]

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Array:
        """Logits [B, V] after new ids, which continue the rows ``parents`` of the step before. Raises as ``load``."""
        rows, parents = [list(row) for row in rows], list(parents)
        return self.call("step", tokens=sum(map(len, rows)), rows=rows, parents=parents)[1]["logits"]
