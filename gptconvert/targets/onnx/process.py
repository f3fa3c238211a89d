"""The client of :mod:`.worker`: one onnxruntime process, confined to what a model needs."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptconvert.model.tensors import Array, LazyTensor
from gptconvert.targets.child.client import ChildProcess
from gptconvert.targets.onnx.session import Settings, as_numbers, kind_of

#: Parts of onnxruntime's messages that say nothing about the graph → what remains of them.
NOISE: Mapping[str, str] = {
    r"\[ONNXRuntimeError\] : \d+ : \w+ : ": "",
    r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: ": r"\1 node '\2': ",
    r"\S+\.(?:cc|cpp|h|hpp):\d+ (?:[^()]*\([^()]*\)(?: const)? )?": "",  # places in its source
}


class OnnxProcess(ChildProcess):
    """An onnxruntime process."""

    module, program = "gptconvert.targets.onnx.worker", "onnxruntime"

    def failure(self, answer: Mapping[str, Any]) -> str:
        """The message without places in onnxruntime's source."""
        message = " ".join(answer["message"].split())[:4000]
        for pattern, rest in NOISE.items():
            message = re.sub(pattern, rest, message)
        return message[:400]


class RemoteSession:
    """The part of an InferenceSession that a runner uses, in another process.

    Args:
        process: runs it.
        path: of the graph file.
        content: another graph to load in its place; None to load the file.
        settings: how to load it.
        lent: initializer → tensor in one piece of a file, to use instead.
        replaced: initializer → its content, for those that ``content`` declares external.

    Raises:
        ChildError: onnxruntime cannot load the graph.
        UnsafeInputError: loading it exceeds a limit.
    """

    def __init__(
        self,
        process: Any,
        path: str,
        content: bytes | None,
        settings: Settings,
        lent: Mapping[str, LazyTensor],
        replaced: Mapping[str, Array] | None = None,
    ) -> None:
        self.process = process
        arrays: dict[str, Array] = {} if content is None else {"content": np.frombuffer(content, np.uint8)}
        kinds: dict[str, tuple[str, int]] = {}
        for number, (name, array) in enumerate((replaced or {}).items()):
            key, kind = f"replaced {number}", kind_of(array.dtype)
            arrays[key], kinds[key] = as_numbers(array), (name, kind)
        fields: dict[str, object] = {
            "path": os.path.abspath(path),
            "settings": dataclasses.asdict(settings),
            "lent": [_described(name, tensor) for name, tensor in lent.items()],
            "replaced": kinds,
        }
        self.number: int = process.call("open", arrays=arrays, **fields)[0]["session"]

    def close(self) -> None:
        """Free the session's memory."""
        self.process.call("close", session=self.number)

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs in ``names``.

        Raises:
            ChildError: the run failed.
            UnsafeInputError: it exceeded a limit.
        """
        tokens = sum(array.size for array in feeds.values() if array.dtype.kind == "i")
        outputs = self.process.call("run", arrays=feeds, tokens=tokens, session=self.number, names=list(names))[1]
        return [outputs[name] for name in names]


def _described(name: str, tensor: LazyTensor) -> tuple[str, str, int, str, tuple[int, ...], int]:
    """Where a tensor is stored, its type as numpy reads it, and ONNX's number of the type."""
    (segment,) = tensor.segments() or ()
    numpy_type = tensor.dtype if tensor.dtype.kind == "f" else np.dtype(np.uint16)  # bfloat16 is opaque to numpy
    kind = kind_of(tensor.dtype)
    return name, os.path.abspath(segment.path), segment.offset, numpy_type.str, tensor.shape, kind
