"""Graphs that share another's weights: last-token logits, and keys and values in the caller's buffer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from gptconvert.errors import UnsupportedError, UsageError
from gptconvert.model.options import Options
from gptconvert.targets.onnx.plan import plan
from gptconvert.targets.onnx.variants import HEAD_MULTIPLE
from gptconvert.targets.verification import verify_exports
from tests.families import witness
from tests.families.witness import CASES, Case
from tests.helpers import write_planned
from tests.verify.exports import attribute, edit, node, report_on, tiny

GENERATING = [case for case in CASES if case.task == "text-generation"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def exported(directory: Path, checkpoint: Any, **options: Any) -> Any:
    exports = plan(checkpoint, Options(**options))
    for export in exports:
        write_planned(directory, export.files)
    return exports


@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_every_family(case: Case, directory: Path, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(case, directory)
    runs_in_place = checkpoint.config.head_dim % HEAD_MULTIPLE == 0
    exports = exported(tmp_path, checkpoint, last_token=True, in_place=runs_in_place)
    report = verify_exports(exports, str(tmp_path))
    assert report.passed, report.table()
    assert [artifact.path for artifact in report.artifacts] == [
        "onnx/model.onnx",
        "onnx/model_last_token.onnx",
        *["onnx/model_in_place.onnx"] * runs_in_place,
    ]
    assert report_on(checkpoint, tmp_path).passed


def test_weights_are_stored_once(tmp_path: Path) -> None:
    exported(tmp_path, tiny(tmp_path / "source"), quantize=("q8",), last_token=True, in_place=True)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir() if path.suffix != ".onnx") == [
        "model.onnx_data",
        "model_quantized.onnx_data",
    ]


def test_last_token_without_a_cache(tmp_path: Path) -> None:
    exports = exported(tmp_path, tiny(tmp_path / "source"), kv_cache=False, last_token=True)
    assert verify_exports(exports, str(tmp_path)).passed


def index_minus_one(model: Any) -> None:
    """The last slot instead of the last token that the mask includes."""
    attribute(model, "last", "select_last_index").i = 1
    node(model, "last").input[0] = "last.ones"
    position = next(i for i, n in enumerate(model.graph.node) if "last" in n.output)
    model.graph.node.insert(position, helper.make_node("Equal", ["last.mask", "last.mask"], ["last.same"]))
    model.graph.node.insert(position + 1, helper.make_node("Cast", ["last.same"], ["last.ones"], to=7))


def ignoring_the_mask(model: Any) -> None:
    """Lengths alone, as many exporters pass them: wrong on left padding."""
    for each in model.graph.node:
        if each.op_type == "GroupQueryAttention":
            each.input[10] = ""


def unscaled(model: Any) -> None:
    attribute(model, "h.1.attn.mixed", "scale").f *= 1.001


@pytest.mark.parametrize(
    ("kind", "bug"),
    [("last_token", index_minus_one), ("in_place", ignoring_the_mask), ("in_place", unscaled)],
)
def test_planted_bugs_fail(kind: str, bug: Callable[[Any], None], tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "source")
    exports = exported(tmp_path, checkpoint, **{kind: True})
    path = tmp_path / exports[1].path
    edit(path, bug)
    assert [artifact.ok for artifact in verify_exports(exports, str(tmp_path)).artifacts] == [True, False]
    report = report_on(checkpoint, path)
    assert not report.passed
    assert not all(run.ok for run in report.artifacts[0].runs)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"in_place": True, "kv_cache": False}, {}),
        ({"last_token": True, "single_file": True}, {}),
        ({"last_token": True}, {"architectures": ["GPT2Model"]}),
    ],
    ids=str,
)
def test_contradictions(options: Any, config: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"contradicts|has no effect"):
        plan(tiny(tmp_path, **config), Options(**options))


def test_chunks_of_a_batch_are_refused_by_the_kernel(tmp_path: Path) -> None:
    """Documented; our own session runs such batches row by row."""
    import onnxruntime

    exports = exported(tmp_path, tiny(tmp_path / "source"), in_place=True)
    session = onnxruntime.InferenceSession(tmp_path / exports[1].path)
    ids, mask = np.ones((2, 3), np.int64), np.ones((2, 4), np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.arange(1, 4) + 0 * ids}
    past = {i.name: np.zeros((2, 3, 1, 8), np.float32) for i in session.get_inputs() if "past" in i.name}
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        session.run(None, {**feeds, **past})


def test_head_sizes_that_the_kernel_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot run this model") as caught:
        plan(tiny(tmp_path, n_head=4), Options(in_place=True))
    assert caught.value.found == "6"
