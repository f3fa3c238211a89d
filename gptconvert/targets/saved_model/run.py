"""Runs a SavedModel token by token in a TensorFlow process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.tf_bundle import read_bundle
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.publish.utf8_path import utf8_path
from gptconvert.targets.child.client import Limits
from gptconvert.targets.context import context_length
from gptconvert.targets.interface import check_interface
from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess, require_tensorflow
from gptconvert.targets.saved_model.safety import check_saved_model

Floats = NDArray[np.float32]


class TensorFlowRuntime:
    """A SavedModel in a TensorFlow process of its own, run through its ``decode`` signature."""

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        path = self.path = os.path.join(directory, "saved_model")
        if not os.path.isfile(os.path.join(path, "saved_model.pb")):
            raise InputError(
                "no SavedModel here",
                path=directory,
                expected="saved_model/saved_model.pb",
                hint="convert with --to tf, or choose another --runtime",
            )
        self.n_ctx = context_length(config)
        require_tensorflow()
        variables = read_bundle(os.path.join(path, "variables", "variables"))
        weight_bytes = sum(tensor.nbytes for tensor in variables.values())
        self.process = TensorFlowProcess(Limits.of(path, weight_bytes, check_saved_model(path), None, self.n_ctx))
        try:
            with utf8_path(os.path.abspath(path)) as readable:
                loaded = self.process.ask("load", path=readable)
        except TensorFlowError as error:
            self.close()
            raise InputError("TensorFlow cannot load the SavedModel", path=path, found=error) from error
        except BaseException:
            self.close()
            raise
        self.vocab_size = self._check(loaded["signatures"])

    def _check(self, signatures: Mapping[str, Any]) -> int | None:
        """The size of the vocabulary that ``decode`` states."""
        try:
            if "decode" not in signatures:
                message = "the SavedModel has no signature `decode`, so it cannot generate text"
                raise UnsupportedError(message, path=self.path)
            inputs, outputs = (
                {name: (str(dtype), shape) for name, (dtype, shape) in signatures["decode"][part].items()}
                for part in ("inputs", "outputs")
            )
            return check_interface(inputs, outputs, self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.process.close()

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Floats:
        try:
            logits: Any = self.process.step(rows, parents)
        except TensorFlowError as error:
            raise InputError("TensorFlow cannot run the SavedModel", path=self.path, found=error) from error
        return logits  # type: ignore[no-any-return]

    def reset(self, most: int | None = None) -> None:
        self.process.call("reset")
