"""Runs a LiteRT file token by token."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.tflite import TfliteModel, read_tflite
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.targets.child.client import Limits
from gptconvert.targets.context import context_length
from gptconvert.targets.interface import check_interface
from gptconvert.targets.tflite.forms import FILES
from gptconvert.targets.tflite.process import LiteError, LiteProcess, require_litert
from gptconvert.targets.tflite.safety import check_model
from gptconvert.verify.background import half_the_cores

Floats = NDArray[np.float32]


class LiteRuntime:
    """A LiteRT file in a confined process of its own, run through its ``decode`` signature."""

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        path = self.path = find_tflite(directory)
        self.n_ctx = context_length(config)
        require_litert()
        model = read_tflite(path)
        limits = Limits.of(path, model.constant_bytes, check_model(model), None, self.n_ctx)
        self.process = LiteProcess(limits)
        try:
            # XNNPACK converts float16 weights anew whenever a length changes, which is at every token.
            signatures = self.process.load(path, 2 * half_the_cores(), delegates=not _has_halves(model))
            self.vocab_size = self._check(signatures)
        except LiteError as error:
            self.close()
            raise InputError("LiteRT cannot load the file", path=path, found=error) from error
        except BaseException:
            self.close()
            raise

    def _check(self, signatures: Mapping[str, Any]) -> int | None:
        """The size of the vocabulary that ``decode`` states."""
        if "decode" not in signatures:
            raise UnsupportedError("the file has no signature `decode`, so it cannot generate text", path=self.path)
        inputs, outputs = (
            {name: (str(dtype), tuple(shape)) for name, (dtype, shape) in signatures["decode"][side].items()}
            for side in ("inputs", "outputs")
        )
        return check_interface(inputs, outputs, self.path)

    def close(self) -> None:
        self.process.close()

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Floats:
        try:
            logits: Any = self.process.step(rows, parents)
        except LiteError as error:
            raise InputError("LiteRT cannot run the file", path=self.path, found=error) from error
        return logits  # type: ignore[no-any-return]

    def reset(self, most: int | None = None) -> None:
        self.process.call("reset")


def _has_halves(model: TfliteModel) -> bool:
    return any(t.dtype == np.float16 and t.stored is not None for graph in model.graphs for t in graph.tensors)


def find_tflite(directory: str) -> str:
    """The file of an export with the most exact weights.

    Raises:
        InputError: there is none.
    """
    for name in FILES.values():
        if os.path.isfile(path := os.path.join(directory, name)):
            return path
    raise InputError(
        "no LiteRT file here",
        path=directory,
        expected=" or ".join(FILES.values()),
        hint="convert with --to tflite, or choose another --runtime",
    )
