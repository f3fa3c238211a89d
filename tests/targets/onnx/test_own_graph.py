"""Our own graphs are compared node for node: errors below the noise of the given weights fail too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.onnx.file import open_onnx
from gptconvert.targets.onnx.own_graph import graph_differences
from reference_model.config import CACHED_TASKS
from tests.families import witness
from tests.families.witness import BY_TASK, CASES, Case
from tests.verify.exports import attribute, edit, export, insert_after, node, report_on, tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def differences(checkpoint: Checkpoint, path: Path) -> list[str]:
    return list(graph_differences(open_onnx(str(path)), checkpoint))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs_equal_themselves(case: Case, directory: Path, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(case, directory)
    for kv_cache in (True, False) if case.task in CACHED_TASKS else (False,):
        assert differences(checkpoint, export(tmp_path / str(kv_cache), checkpoint, kv_cache=kv_cache)) == []


@pytest.mark.parametrize(
    "options",
    [*({"opset": n} for n in (17, 18, 19, 20)), {"dtype": "fp16"}, {"dtype": "bf16"}, {"single_file": True}],
    ids=str,
)
def test_choices_of_the_conversion_are_no_difference(options: Any, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint, **options)
    assert differences(checkpoint, path) == []
    assert report_on(checkpoint, path).passed


def test_positions_as_an_input(directory: Path, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(BY_TASK[1], directory, Options(task=BY_TASK[1].task))
    assert differences(checkpoint, export(tmp_path, checkpoint, position_ids=True)) == []


def tiny_epsilon(model: Any) -> None:
    attribute(model, "h.1.norm_2", "epsilon").f = 1.00001e-5


def finite_mask(model: Any) -> None:
    lowest = next(t for t in model.graph.initializer if t.name == node(model, "bias").input[2])
    lowest.CopyFrom(numpy_helper.from_array(np.array(-10000, np.float32), lowest.name))


def clipped(model: Any) -> None:
    insert_after(model, "h.1.mlp.active", helper.make_node("Clip", ["h.1.mlp.active", "top"], ["clipped"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(-1e4, np.float32), "top"))
    next(n for n in model.graph.node if "h.1.mlp.active" in n.input and n.op_type != "Clip").input[0] = "clipped"


def other_operator(model: Any) -> None:
    node(model, "h.1.attn.scores").op_type = "Mul"


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        (tiny_epsilon, ["node h.1.norm_2: epsilon is 1.00001e-05, expected 1e-05"]),
        (finite_mask, ["constant constant.", "expected [-3.4028234663852886e+38], found [-10000.0]"]),
        (clipped, ["node clipped: unexpected", "the input is clipped, h.1.mlp.c_proj.weight"]),
    ],
)
def test_bugs_that_no_output_shows(bug: Callable[[Any], None], said: list[str], tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    edit(path, bug)
    report = report_on(checkpoint, path)
    assert all(run.ok for run in report.artifacts[0].runs)
    assert not report.passed
    for words in said:
        assert words in report.table()


def test_further_differences(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    edit(path, other_operator)
    assert differences(checkpoint, path) == ["node h.1.attn.scores: the operator is Mul, expected MatMul"]
    edit(path, lambda model: model.graph.node.remove(node(model, "h.1.attn.scores")))
    assert differences(checkpoint, path) == ["node h.1.attn.scores: missing"]

    def function(model: Any) -> None:
        made = helper.make_function("d", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [])
        model.functions.append(made)

    edit(path, function)
    assert differences(checkpoint, path)[-1] == "the graph has a function"


def by_onnxruntime(path: Path, level: str) -> None:
    """Optimised offline. The result imports every operator domain that onnxruntime knows."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def by_onnxslim(path: Path, _: str) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(str(path)), path.with_name("optimised.onnx"))


def by_onnx(path: Path, _: str) -> None:
    """Converted to a later operator set than ours."""
    from onnx import version_converter

    onnx.save(version_converter.convert_version(onnx.load(path), 22), path.with_name("optimised.onnx"))


def with_other_names(path: Path, _: str) -> None:
    model = onnx.load(path)
    names = {tensor.name: f"renamed_{tensor.name}" for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    for each in model.graph.node:
        each.input[:] = [names.get(name, name) for name in each.input]
    onnx.save(model, path.with_name("optimised.onnx"))


OPTIMISERS = [
    (by_onnxruntime, "BASIC"),
    (by_onnxruntime, "EXTENDED"),
    (by_onnxslim, ""),
    (by_onnx, ""),
    (with_other_names, ""),
]


@pytest.mark.parametrize(("optimise", "level"), OPTIMISERS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("bug", [None, finite_mask], ids=["correct", "wrong"])
def test_optimised_graphs_are_judged_by_their_outputs(
    optimise: Callable[[Path, str], None], level: str, bug: Callable[[Any], None] | None, tmp_path: Path
) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    if bug is not None:
        edit(path, bug)
    optimise(path, level)
    (report,) = report_on(checkpoint, path.with_name("optimised.onnx")).artifacts
    assert report.weights.ok
    assert [note for note in report.notes if "another program rewrote the graph" in note]
    assert report.ok == (bug is None), report.table()
    assert not report.problems  # its outputs decide


def test_graph_of_another_version_is_noted(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)

    def older(model: Any) -> None:
        model.producer_version = "0.0.9"
        finite_mask(model)

    edit(path, older)
    report = report_on(checkpoint, path)
    assert [run.runtime for run in report.artifacts[0].runs if not run.ok] == [report.artifacts[0].runs[-1].runtime]
    assert report.artifacts[0].runs[-1].stressed
    (note,) = report.notes
    assert "its nodes were not compared, because gptconvert 0.0.9 wrote it" in note
