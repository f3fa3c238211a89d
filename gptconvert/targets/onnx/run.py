"""Runs an exported graph token by token in onnxruntime."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import InputError
from gptconvert.publish.utf8_path import utf8_path
from gptconvert.targets.child.client import ChildError, Limits
from gptconvert.targets.context import context_length
from gptconvert.targets.interface import check_interface
from gptconvert.targets.onnx.file import described, open_onnx
from gptconvert.targets.onnx.process import OnnxProcess

Floats = NDArray[np.float32]


class OnnxRuntime:
    """An exported graph in onnxruntime, on the CPU, in a confined process of its own."""

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        path = self.path = find_onnx(directory)
        file, self.n_ctx = open_onnx(path), context_length(config)
        self.vocab_size = check_interface(described(file.inputs()), described(file.outputs()), path)
        self.process = OnnxProcess(Limits.of(path, file.weight_bytes, file.graph_bytes, None, self.n_ctx))
        try:
            with utf8_path(os.path.abspath(path)) as readable:
                self.process.call("start", path=readable)
        except ChildError as error:
            self.close()
            raise InputError("onnxruntime cannot load the graph", path=path, found=error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self.process.close()

    def step(self, ids: Sequence[int]) -> Floats:
        try:
            logits: Any = self.process.call("step", tokens=len(ids), ids=list(ids))[1]["logits"]
        except ChildError as error:
            raise InputError("onnxruntime cannot run the graph", path=self.path, found=error) from error
        return logits  # type: ignore[no-any-return]


def find_onnx(directory: str) -> str:
    """The graph of an export: ``onnx/model.onnx``, a variant of it, or a graph in the directory itself.

    Raises:
        InputError: there is none.
    """
    for pattern in ("onnx/model.onnx", "model.onnx", "onnx/model*.onnx", "*.onnx"):
        found = sorted(glob.glob(os.path.join(glob.escape(directory), pattern)))
        if found:
            return found[0]
    raise InputError(
        "no ONNX graph here",
        path=directory,
        expected="onnx/model.onnx",
        hint="convert with --to onnx, or choose another --runtime",
    )
