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
#: ``--variant`` → name of the graph, in order of preference.
VARIANTS: Mapping[str, str] = {
    "fp32": "model",
    "q8": "model_quantized",
    "q4": "model_q4",
    "fp16": "model_fp16",
    "bf16": "model_bf16",
}


class OnnxRuntime:
    """An exported graph in onnxruntime, on the CPU, in a confined process of its own."""

    def __init__(self, directory: str, config: Mapping[str, object], variant: str | None = None) -> None:
        path = self.path = find_onnx(directory, variant)
        file, self.n_ctx = open_onnx(path), context_length(config)
        self.vocab_size = check_interface(described(file.inputs()), described(file.outputs()), path)
        self.process = OnnxProcess(Limits.of(path, file.weight_bytes, file.graph_bytes, None, self.n_ctx))
        try:
            with utf8_path(os.path.abspath(path)) as readable:
                self.process.call("start", path=readable, in_place=file.is_in_place)
        except ChildError as error:
            self.close()
            raise InputError("onnxruntime cannot load the graph", path=path, found=error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self.process.close()

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Floats:
        rows, parents = [list(row) for row in rows], list(parents)
        try:
            logits: Any = self.process.call("step", tokens=sum(map(len, rows)), rows=rows, parents=parents)[1][
                "logits"
            ]
        except ChildError as error:
            raise InputError("onnxruntime cannot run the graph", path=self.path, found=error) from error
        return logits  # type: ignore[no-any-return]

    def reset(self, most: int | None = None) -> None:
        self.process.call("reset")


def find_onnx(directory: str, variant: str | None = None) -> str:
    """The graph of an export that decodes fastest: the one that keeps its cache in place, if there is one.

    Args:
        directory: the export.
        variant: a key of :data:`VARIANTS`; None for the first there is, or any graph in the directory itself.

    Raises:
        InputError: there is none.
    """
    names = VARIANTS.values() if variant is None else (VARIANTS[variant],)
    stems = [stem for name in names for stem in (f"{name}_in_place", name)]
    patterns = [f"{folder}{stem}.onnx" for folder in ("onnx/", "") for stem in stems]
    for pattern in (*patterns, *(("onnx/model*.onnx", "*.onnx") if variant is None else ())):
        found = sorted(glob.glob(os.path.join(glob.escape(directory), pattern)))
        if found:
            return found[0]
    if variant is None:
        hint, expected = "convert with --to onnx, or choose another --runtime", "onnx/model.onnx"
    else:
        hint, expected = _others(directory), f"onnx/{VARIANTS[variant]}.onnx"
    raise InputError("no such ONNX graph here", path=directory, expected=expected, hint=hint)


def _others(directory: str) -> str:
    """What to do without a variant: name those that exist."""
    have = [
        name for name, stem in VARIANTS.items() if os.path.isfile(os.path.join(directory, "onnx", f"{stem}.onnx"))
    ]
    return f"this export has {', '.join(have)}" if have else "convert with --to onnx --quantize"
