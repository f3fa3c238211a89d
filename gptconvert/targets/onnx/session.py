"""onnxruntime sessions on the CPU, opened alike in this process and in a confined one. Imports no ONNX library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import Array
from gptconvert.targets.onnx.library import import_onnxruntime


@dataclass(frozen=True)
class Settings:
    """How a graph is loaded.

    Attributes:
        threads: number of threads; 0 for one per core.
        prepack: whether weights are copied into the kernels' layout (onnxruntime's default).
        optimise: whether graph optimisation runs (onnxruntime's default).
        skipped: names of optimisers that do not run.
        severity: least severe messages that are logged: 3 for errors, 4 for none but fatal ones.
    """

    threads: int = 0
    prepack: bool = True
    optimise: bool = True
    skipped: Sequence[str] = ()
    severity: int = 4


def open_session(
    path: str,
    content: bytes | None,
    settings: Settings,
    lent: Mapping[str, Any],
    replaced: Mapping[str, Any] | None = None,
) -> Any:
    """An InferenceSession.

    Args:
        path: of the graph file.
        content: another graph to load in its place, whose external data is that of ``path``; None to load the file.
        settings: how to load it.
        lent: initializer → OrtValue of equal content to use instead; the optimiser may have read the file's.
        replaced: initializer → OrtValue of other content, for those that ``content`` declares external.

    Raises:
        Exception: onnxruntime's exceptions share no base class.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = settings.severity
    options.intra_op_num_threads = settings.threads
    options.add_session_config_entry("session.load_model_format", "ONNX")  # not its own, which nothing here checks
    if not settings.prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # an arena keeps the memory of its largest run
    if not settings.optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, value in lent.items():
        options.add_initializer(name, value)
    if replaced:
        options.add_external_initializers(list(replaced), list(replaced.values()))
    if content is not None:
        folder = path.rpartition("/")[0] or "."
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return onnxruntime.InferenceSession(
        path if content is None else content,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(settings.skipped),
    )


def ort_value(array: Array, kind: int) -> Any:
    """onnxruntime's view of an array, without a copy; ``kind`` is ONNX's number of the type."""
    return import_onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)


def kind_of(dtype: np.dtype[np.generic]) -> int:
    """ONNX's number of a type."""
    import onnx

    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def as_numbers(array: Array) -> Array:
    """An array as onnxruntime takes it: bfloat16 as its bits."""
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array
