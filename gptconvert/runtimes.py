"""What runs an export, one token after the other: onnxruntime, TensorFlow or PyTorch, each keeping its own cache."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import InputError, UnsupportedError

Floats = NDArray[np.float32]


class Runtime(Protocol):
    """A loaded model. Keeps its own keys and values."""

    n_ctx: int

    def step(self, ids: Sequence[int]) -> Floats:
        """Logits [V] after ``ids``, which continue what earlier steps were given."""
        ...

    def close(self) -> None:
        """Let go of whatever is held."""
        ...


class OnnxRuntime:
    """An exported graph in onnxruntime, on the CPU, with plain ``session.run``."""

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        import onnxruntime

        path = find_onnx(directory)
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
            raise UnsupportedError("the graph has no output `logits`, so it cannot generate", path=path)
        self.seen: list[int] = []
        self.past: dict[str, Floats] = {
            name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
            for name, item in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def close(self) -> None:
        """Nothing is held that does not go by itself."""

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


class TensorFlowRuntime:
    """A SavedModel in a TensorFlow process of its own, through its ``decode`` signature."""

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess

        path = os.path.join(directory, "saved_model")
        if not os.path.isfile(os.path.join(path, "saved_model.pb")):
            raise InputError("no SavedModel here", path=directory, expected="saved_model/saved_model.pb")
        self.n_ctx = context_length(config)
        self.process = TensorFlowProcess()
        try:
            loaded = self.process.ask("load", path=os.path.abspath(path))
        except TensorFlowError as error:
            self.close()
            raise InputError("TensorFlow cannot load the SavedModel", path=path, found=error) from error
        if "logits" not in loaded["signatures"].get("decode", {}).get("outputs", {}):
            self.close()
            raise UnsupportedError(
                "the SavedModel has no signature `decode` with logits, so it cannot generate", path=path
            )

    def close(self) -> None:
        self.process.close()

    def step(self, ids: Sequence[int]) -> Floats:
        logits: Any = self.process.step(ids)
        return logits  # type: ignore[no-any-return]


class TorchRuntime:
    """The safetensors of an export in the reference model."""

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        from gptconvert.families import Request, understand
        from gptconvert.sources import hf
        from gptconvert.sources.source import OpenOptions
        from gptconvert.verify.truth import tensor_of
        from reference_model.model import GPT, KeyValue

        checkpoint = understand(hf.FORMAT.open(directory, OpenOptions()), Request())
        if checkpoint.config.task != "text-generation":
            raise UnsupportedError(f"a model for {checkpoint.config.task} cannot generate", path=directory)
        weights = {name: tensor_of(weight.read()).float() for name, weight in checkpoint.weights.items()}
        self.model = GPT.from_weights(checkpoint.config, weights)
        self.n_ctx = checkpoint.config.n_ctx
        self.past: list[KeyValue] = []

    def close(self) -> None:
        """Nothing is held that does not go by itself."""

    def step(self, ids: Sequence[int]) -> Floats:
        import torch

        with torch.no_grad():
            logits, self.past = self.model(torch.tensor([list(ids)]), past=self.past)
        last: Floats = logits[0, -1].numpy()
        return last


#: ``--runtime`` → how to load an export.
RUNTIMES: Mapping[str, Callable[[str, Mapping[str, object]], Runtime]] = {
    "onnx": OnnxRuntime,
    "tf": TensorFlowRuntime,
    "torch": TorchRuntime,
}


def find_onnx(directory: str) -> str:
    """The graph of an export: ``onnx/model.onnx``, a variant of it, or a graph at the top.

    Raises:
        InputError: there is none.
    """
    for pattern in ("onnx/model.onnx", "model.onnx", "onnx/model*.onnx", "*.onnx"):
        found = sorted(glob.glob(os.path.join(glob.escape(directory), pattern)))
        if found:
            return found[0]
    raise InputError("no ONNX graph here", path=directory, expected="onnx/model.onnx")


def context_length(config: Mapping[str, object]) -> int:
    """The longest sequence a config.json allows."""
    for key in ("n_positions", "n_ctx", "max_position_embeddings"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise InputError("config.json names no context length", expected="n_positions or max_position_embeddings")
