"""Decodes token by token with a graph: keeps its keys and values between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
#: onnxruntime's names of the types of inputs.
TYPES: Mapping[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class Decoding:
    """A sequence that grows, with plain ``session.run``.

    Args:
        session: an InferenceSession.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.outputs = [output.name for output in session.get_outputs()]
        self.inputs = {item.name: item for item in session.get_inputs()}
        self.seen: list[int] = []
        self.past: dict[str, NDArray[np.generic]] = {
            name: np.zeros((1, item.shape[1], 0, item.shape[3]), TYPES[item.type])
            for name, item in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def step(self, ids: Sequence[int]) -> Floats:
        """Logits [V] after ``ids``, which continue the ids of earlier steps."""
        self.seen += ids
        new = ids if self.past else self.seen
        start = len(self.seen) - len(new)
        feed: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, len(self.seen)), np.int64),
            "position_ids": np.arange(start, len(self.seen), dtype=np.int64)[None],
        }
        feed = {name: v.astype(TYPES[self.inputs[name].type]) for name, v in feed.items() if name in self.inputs}
        feed |= self.past
        results = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        self.past = {name: results[name.replace("past_key_values", "present")] for name in self.past}
        logits: Floats = results["logits"][0, -1].astype(np.float32, copy=False)
        return logits
