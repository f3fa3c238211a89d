"""Runs an exported graph token by token in onnxruntime."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.targets.context import context_length
from gptconvert.targets.onnx.library import import_onnxruntime

Floats = NDArray[np.float32]


class OnnxRuntime:
    """An exported graph in onnxruntime, on the CPU, with plain ``session.run``."""

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        onnxruntime, path = import_onnxruntime(), find_onnx(directory)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(f"onnxruntime cannot load the graph: {error}", path=path) from error
        self.n_ctx = context_length(config)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        if "logits" not in self.outputs:
            raise UnsupportedError("the graph has no output `logits`, so it cannot generate text", path=path)
        self.seen: list[int] = []
        self.past: dict[str, Floats] = {
            name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
            for name, item in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def close(self) -> None:
        """Do nothing: the session is freed with the object."""

    def step(self, ids: Sequence[int]) -> Floats:
        self.seen += ids
        new = ids if self.past else self.seen
        start = len(self.seen) - len(new)
        feed: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, len(self.seen)), np.int64),
            "position_ids": np.arange(start, len(self.seen), dtype=np.int64)[None],
        }
        feed = {name: value for name, value in feed.items() if name in self.inputs} | dict(self.past)
        results = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        self.past = {name: results[name.replace("past_key_values", "present")] for name in self.past}
        logits: Floats = results["logits"][0, -1]
        return logits


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
