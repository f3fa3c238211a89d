"""The client of :mod:`.worker`: one TensorFlow process."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptconvert.errors import UnsupportedError, install_hint
from gptconvert.model.tensors import Array
from gptconvert.publish.scratch import Scratch
from gptconvert.targets.child.client import ChildError, ChildProcess, Limits


class TensorFlowError(ChildError):
    """TensorFlow failed, or its process died; the message is one line."""


def require_tensorflow() -> None:
    """Raise :class:`UnsupportedError` unless TensorFlow is installed; do not import it."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UnsupportedError(
            "TensorFlow is not installed, but is needed to build and run SavedModels",
            hint=install_hint("tf"),
        )


class TensorFlowProcess(ChildProcess):
    """A TensorFlow process; use as a context manager.

    Args:
        limits: for a SavedModel of unknown origin; None to build our own, or to run what was just built.

    Attributes:
        directory: for the files that it builds; removed at the end.
    """

    module, program, error = "gptconvert.targets.saved_model.worker", "TensorFlow", TensorFlowError

    def __init__(self, limits: Limits | None = None) -> None:
        require_tensorflow()
        self._scratch = Scratch()
        self.directory = self._scratch.path
        # Keras's settings, the list of fonts of matplotlib (which Keras imports) and AutoGraph's generated code would
        # be left in the user's home and temporary directory.
        try:
            super().__init__(limits, dict.fromkeys(("KERAS_HOME", "MPLCONFIGDIR", "TMPDIR"), self.directory))
        except BaseException:
            self._scratch.remove()
            raise

    def close(self) -> None:
        """Kill the process and remove its directory."""
        super().close()
        self._scratch.remove()

    def ask(self, command: str, stop: threading.Event | None = None, **request: object) -> dict[str, Any]:
        """The answer to a request without arrays.

        Raises:
            TensorFlowError: the request failed, or was cancelled by setting ``stop``.
            UnsafeInputError: a confined process exceeded its time, or died.
        """
        return self.call(command, stop, **request)[0]  # type: ignore[arg-type]

    def run(self, signature: str, inputs: Mapping[str, Array], wanted: tuple[str, ...] = ()) -> dict[str, Array]:
        """Run a signature of the loaded model; return the outputs in ``wanted``, or all.

        Raises:
            TensorFlowError: the run failed.
            UnsafeInputError: a confined process exceeded its time, or died.
        """
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        tokens = sum(array.size for array in arrays.values() if array.dtype.kind == "i")
        return self.call("run", None, arrays, tokens, signature=signature, wanted=wanted)[1]

    def assign(self, name: str, values: Array) -> None:
        """Give a variable of the loaded model other values, in float32.

        Raises:
            TensorFlowError: there is no such variable, or it has another shape.
            UnsafeInputError: a confined process exceeded its time, or died.
        """
        self.call("assign", None, {"values": values}, name=name)

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Array:
        """Logits [B, V] after new ids, which continue the rows ``parents`` of the step before.

        Raises:
            TensorFlowError: the run failed.
            UnsafeInputError: a confined process exceeded its time, or died.
        """
        rows, parents = [list(row) for row in rows], list(parents)
        return self.call("step", tokens=sum(map(len, rows)), rows=rows, parents=parents)[1]["logits"]
