"""LiteRT files of tiny models, and edits of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Export
from gptconvert.model.options import Options
from gptconvert.targets.tflite.plan import plan
from gptconvert.targets.verification import verify_exports
from gptconvert.verify.report import ArtifactReport, Report
from tests.targets.saved_model.support import write


def written(checkpoint: Checkpoint, directory: Path, *kinds: str) -> tuple[Export, ...]:
    """Write files of these types; returns the exports."""
    exports = plan(checkpoint, Options(targets=("tflite",), tflite_type=kinds))
    write(directory, [file for export in exports for file in export.files])
    return exports


def exported(checkpoint: Checkpoint, directory: Path, *kinds: str) -> Report:
    """Write files of these types; returns the report on them."""
    return verify_exports(written(checkpoint, directory, *kinds), str(directory))


def ratios(report: Report | ArtifactReport) -> list[float]:
    artifacts = report.artifacts if isinstance(report, Report) else [report]
    groups = [group for artifact in artifacts for run in artifact.runs for group in run.groups]
    return [measure.ratio for group in groups for measure in group.measures.values()]


def edited(path: Path, edit: Callable[[Any], None]) -> None:
    """Change a file through the library's own classes."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    edit(model)
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())


def operators(model: Any, name: str) -> list[tuple[Any, Any]]:
    """Every (graph, operator) of a kind."""
    number = getattr(schema.BuiltinOperator, name)
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    return [(g, o) for g in model.subgraphs for o in g.operators if codes[o.opcodeIndex] == number]


def constant(model: Any, graph: Any, values: NDArray[np.int32]) -> int:
    """Add a constant; returns the number of its tensor."""
    tensor, buffer = schema.TensorT(), schema.BufferT()
    tensor.name, tensor.type, tensor.shape = "more", schema.TensorType.INT32, np.array(values.shape, np.int32)
    tensor.buffer, buffer.data = len(model.buffers), values.view(np.uint8)
    model.buffers.append(buffer)
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1
