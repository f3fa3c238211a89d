"""Generation from the safetensors of an export, with the reference model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families.registry import understand
from gptconvert.model.options import Options
from gptconvert.sources.hf import format as hf
from gptconvert.sources.hf.files import could_be_weights
from gptconvert.verify.background import half_the_cores, torch_threads

Floats = NDArray[np.float32]


class TorchRuntime:
    """The safetensors of an export, loaded in the reference model."""

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        from gptconvert.verify.truth import tensor_of
        from reference_model.model import GPT, KeyValue

        if not any(map(could_be_weights, os.listdir(directory))):
            hint = "convert with --to safetensors, or choose another --runtime"
            raise InputError("no weights here", path=directory, expected="model.safetensors", hint=hint)
        checkpoint = understand(hf.FORMAT.open(directory, Options()), Options())
        if checkpoint.config.task != "text-generation":
            raise UnsupportedError(f"a model for {checkpoint.config.task} cannot generate", path=directory)
        weights = {name: tensor_of(weight.read()).float() for name, weight in checkpoint.weights.items()}
        self.model = GPT.from_weights(checkpoint.config, weights)
        self.n_ctx: int = checkpoint.config.n_ctx
        self.vocab_size: int | None = checkpoint.config.vocab_size
        self.past: list[KeyValue] = []

    def close(self) -> None:
        """Do nothing; the model needs no cleanup."""

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Floats:
        import torch

        chosen = list(parents)
        past = [(keys[chosen], values[chosen]) for keys, values in self.past]
        # Threads wait for each other at every layer: one that has no core would stop the others.
        with torch.no_grad(), torch_threads() as use:
            use(half_the_cores())
            logits, self.past = self.model(torch.tensor([list(row) for row in rows]), past=past)
        last: Floats = logits[:, -1].numpy()
        return last

    def reset(self, most: int | None = None) -> None:
        self.past = []
