"""onnxruntime sessions on the CPU, opened alike in this process and in a confined one. Imports no ONNX library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptconvert.kernels.library import import_onnxruntime
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import Array


@dataclass(frozen=True)
class Settings:
    """How a graph is loaded.

    Attributes:
        threads: number of threads; 0 for one per core.
        prepack: whether weights are copied into the kernels' layout (onnxruntime's default).
        optimise: whether graph optimisation runs (onnxruntime's default).
        skipped: names of optimisers that do not run.
        severity: least severe messages that are logged: 3 for errors, 4 for none but fatal ones.
        buffers: (past, present) names that share one buffer per run; empty for graphs that return new ones.
    """

    threads: int = 0
    prepack: bool = True
    optimise: bool = True
    skipped: Sequence[str] = ()
    severity: int = 4
    buffers: Sequence[tuple[str, str]] = ()


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
    session = onnxruntime.InferenceSession(
        path if content is None else content,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(settings.skipped),
    )
    return BufferedSession(session, settings.buffers) if settings.buffers else session


class BufferedSession:
    """Runs a graph that keeps keys and values in place, as a caller with one buffer per layer does.

    The kernel accepts several new tokens after a past in batches of one only, so other batches run row by row.
    """

    def __init__(self, session: Any, buffers: Sequence[tuple[str, str]]) -> None:
        self.session, self.buffers = session, dict(buffers)

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """As InferenceSession.run."""
        import numpy as np

        batch, new = feeds["input_ids"].shape
        if batch > 1 and new > 1 and feeds["attention_mask"].shape[1] > new:
            rows = [self._run(names, {k: v[i : i + 1] for k, v in feeds.items()}) for i in range(batch)]
            return [np.concatenate(arrays) for arrays in zip(*rows, strict=True)]
        return self._run(names, feeds)

    def _run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        import numpy as np

        binding, total = self.session.io_binding(), feeds["attention_mask"].shape[1]
        kept: dict[str, Array] = {}
        for name, array in feeds.items():
            if name not in self.buffers:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
                continue
            batch, heads, length, width = array.shape
            buffer = np.zeros((batch, heads, total, width), array.dtype)
            buffer[:, :, :length] = array
            kept[self.buffers[name]] = buffer
            value = import_onnxruntime().OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(self.buffers[name], value)
        rest = [name for name in names if name not in kept]
        for name in rest:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        outputs = dict(zip([*kept, *rest], binding.copy_outputs_to_cpu(), strict=True))
        return [outputs[name] for name in names]


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
