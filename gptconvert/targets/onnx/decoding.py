"""Decodes token by token with a graph: keeps the keys and values of a batch of rows between steps."""

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
#: Tokens of the first buffers; they double when they are full.
SMALLEST_BUFFER = 256


class Decoding:
    """Rows that grow, with plain ``session.run``.

    Args:
        session: an InferenceSession.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.outputs = [output.name for output in session.get_outputs()]
        self.inputs = {item.name: item for item in session.get_inputs()}
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.seen: list[list[int]] = [[]]
        self.past: dict[str, NDArray[np.generic]] = {
            name: np.zeros((1, item.shape[1], 0, item.shape[3]), TYPES[item.type])
            for name, item in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Floats:
        """Logits [B, V] after new ids: row ``i`` continues row ``parents[i]`` of the step before."""
        if not self.seen[0]:
            parents = [0] * len(rows)  # of nothing
        if list(parents) != list(range(len(self.seen))):
            self._select(np.array(parents))
        self.seen = [[*self.seen[parent], *row] for parent, row in zip(parents, rows, strict=True)]
        new = rows if self.past else self.seen
        total = len(self.seen[0])
        positions = np.arange(total - len(new[0]), total, dtype=np.int64)
        feed: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array(new, np.int64),
            "attention_mask": np.ones((len(new), total), np.int64),
            "position_ids": np.tile(positions, (len(new), 1)),
        }
        feed = {name: v.astype(TYPES[self.inputs[name].type]) for name, v in feed.items() if name in self.inputs}
        logits: Floats = self._logits(feed)[:, -1].astype(np.float32, copy=False)
        return logits

    def _select(self, parents: NDArray[np.int64]) -> None:
        """Let the cache continue these rows."""
        self.past = {name: array[parents] for name, array in self.past.items()}

    def _logits(self, feed: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
        """Run the new tokens and keep the cache; returns logits [1, S, V] or [1, 1, V]."""
        results = dict(zip(self.outputs, self.session.run(None, feed | self.past), strict=True))
        self.past = {name: results[_present(name)] for name in self.past}
        logits: NDArray[np.generic] = results["logits"]
        return logits


class DecodingInPlace(Decoding):
    """Rows whose keys and values stay in buffers that the graph extends: nothing is copied per token."""

    def reset(self) -> None:
        super().reset()
        self.room, self.binding = 0, self.session.io_binding()
        self.values: dict[str, Any] = {}  # name of the past → OrtValue

    def _logits(self, feed: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
        total = len(self.seen[0])
        if total > self.room:
            self._grow(max(total, 2 * self.room, SMALLEST_BUFFER), total - feed["input_ids"].shape[1])
        for name, array in feed.items():
            self.binding.bind_cpu_input(name, array)
        self.binding.bind_output("logits")
        self.session.run_with_iobinding(self.binding)
        logits: NDArray[np.generic] = self.binding.get_outputs()[-1].numpy()
        self.binding.clear_binding_outputs()
        for name, value in self.values.items():
            self.binding.bind_ortvalue_output(_present(name), value)
        return logits

    def _select(self, parents: NDArray[np.int64]) -> None:
        super()._select(parents)
        if self.room:
            self._bind({name: value.numpy()[parents] for name, value in self.values.items()})

    def _grow(self, room: int, used: int) -> None:
        """Move the ``used`` tokens of the cache to buffers for ``room`` tokens."""
        buffers = {}
        for name, empty in self.past.items():
            buffers[name] = np.zeros((*empty.shape[:2], room, empty.shape[3]), empty.dtype)
            if used:
                buffers[name][:, :, :used] = self.values[name].numpy()[:, :, :used]
        self.room = room
        self._bind(buffers)

    def _bind(self, buffers: Mapping[str, NDArray[np.generic]]) -> None:
        """Use these buffers for the cache."""
        from gptconvert.kernels.library import import_onnxruntime

        ort_value = import_onnxruntime().OrtValue
        self.values = {name: ort_value.ortvalue_from_numpy(buffer) for name, buffer in buffers.items()}
        self.binding.clear_binding_inputs()
        self.binding.clear_binding_outputs()
        for name, value in self.values.items():
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(_present(name), value)


def _present(past: str) -> str:
    """Name of the output that continues an input of the cache."""
    return past.replace("past_key_values", "present")
