"""A stranger's graph with an error that the checkpoint's own weights do not show fails with stress weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.targets.onnx.verify import OnnxVerifier
from gptconvert.verify.report import ArtifactReport, Report
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import computed_tensors
from tests.verify.exports import attribute, edit, export, insert_after, node, report_on, tiny
from tests.verify.test_content import rewritten, scaled


@pytest.fixture(scope="module")
def mild(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint that shows no small error: wide activations, small scores, positions of little weight."""
    checkpoint = tiny(tmp_path_factory.mktemp("mild"))
    factors = {"wte.weight": 300.0, "wpe.weight": 1e-4, "h.1.attn.c_attn.weight": 1e-3, "h.1.attn.c_attn.bias": 1e-3}
    arrays = {n: w.read() * np.float32(factors.get(n, 1.0)) for n, w in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=dict(computed_tensors(arrays)))


def small_epsilon(model: Any) -> None:
    attribute(model, "h.1.norm_2", "epsilon").f = 1e-6


def no_epsilon(model: Any) -> None:
    attribute(model, "final_norm", "epsilon").f = 0.0


def masked_with(value: float) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        lowest = next(t for t in model.graph.initializer if t.name == node(model, "bias").input[2])
        lowest.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), lowest.name))

    return plant


def clipped(model: Any) -> None:
    """As the code of a half-precision model does."""
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("low", -1e4), ("high", 1e4))
    )
    insert_after(model, "h.1.mlp.active", helper.make_node("Clip", ["h.1.mlp.active", "low", "high"], ["clipped"]))
    next(n for n in model.graph.node if "h.1.mlp.active" in n.input and n.op_type != "Clip").input[0] = "clipped"


def half_positions(model: Any) -> None:
    half = helper.make_node("Cast", ["positions"], ["half"], to=TensorProto.FLOAT16)
    single = helper.make_node("Cast", ["half"], ["single"], to=TensorProto.FLOAT)
    insert_after(model, "positions", half, single)
    inputs = next(n for n in model.graph.node if "positions" in n.input and n.op_type != "Cast").input
    inputs[list(inputs).index("positions")] = "single"


def other_scale(model: Any) -> None:
    name = node(model, "h.1.attn.q_scaled").input[1]
    scale = next(t for t in model.graph.initializer if t.name == name)
    wrong = numpy_helper.to_array(scale) * np.float32(1.00001)
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(wrong, np.float32), "wrong"))
    node(model, "h.1.attn.q_scaled").input[1] = "wrong"


def disown(model: Any) -> None:
    model.producer_name = "another exporter"


BUGS = {
    "epsilon 1e-6": (small_epsilon, "nearly constant"),
    "epsilon 0": (no_epsilon, "ordinary"),
    "mask value -100": (masked_with(-100), "1e5"),
    "mask value -10000": (masked_with(-1e4), "1e5"),
    "mask value of half precision": (masked_with(-65504), "1e5"),
    "clipping at 1e4": (clipped, "1e5"),
    "positions in half precision": (half_positions, "ordinary"),
    "scale * 1.00001": (other_scale, "outweighs"),
}


def runs(report: Report) -> tuple[list[str], list[str]]:
    """Names of the runs that passed, and of those that failed."""
    (artifact,) = report.artifacts
    return [r.runtime for r in artifact.runs if r.ok], [r.runtime for r in artifact.runs if not r.ok]


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_that_these_weights_do_not_show(mild: Checkpoint, tmp_path: Path, bug: str) -> None:
    plant, setting = BUGS[bug]
    path = export(tmp_path, mild)
    edit(path, disown)
    edit(path, plant)
    report = report_on(mild, path)
    passed, failed = runs(report)
    assert passed[0] == "onnxruntime, default options"  # the checkpoint's own weights
    assert [setting in name for name in failed] == [True]
    assert not report.passed
    assert "though the checkpoint's own weights do not show it" in report.table()


@pytest.mark.parametrize("case", [Case("gpt1"), Case("gptj")], ids=str)
def test_correct_graphs_pass(case: Case, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(case, tmp_path)
    path = export(tmp_path / "out", checkpoint)
    edit(path, disown)
    report = report_on(checkpoint, path)
    assert report.passed, report.table()
    assert report.notes == ()
    assert [run.stressed for run in report.artifacts[0].runs] == [False, True, True, True, True]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Checkpoint, Path]]:
    def make(case: Case) -> tuple[Checkpoint, Path]:
        folder = tmp_path_factory.mktemp(str(case))
        trace(case, folder / "model.onnx")
        return witness.checkpoint(case, folder), folder / "model.onnx"

    return make


def trace(case: Case, path: Path) -> None:
    """transformers' own model, traced by PyTorch's exporter."""
    import torch

    model = witness.hf_model(case)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any) -> Any:
            outputs = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
            return outputs.logits

    ids, names = torch.randint(0, 90, (2, 7)), ["input_ids", "attention_mask", "position_ids"]
    torch.onnx.export(
        Logits().eval(),
        (ids, torch.ones_like(ids), torch.arange(7)[None].repeat(2, 1)),
        str(path),
        input_names=names,
        output_names=["logits"],
        dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*names, "logits")},
        opset_version=17,
        dynamo=False,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [Case("gpt2"), *(pytest.param(Case(f), marks=pytest.mark.slow) for f in ("gpt_neo", "gptj", "gpt_neox"))],
    ids=lambda case: case.family,
)
def test_exports_of_pytorch(
    case: Case, traced: Callable[[Case], tuple[Checkpoint, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pass, and fail with another epsilon."""
    checkpoint, path = traced(case)
    report = report_on(checkpoint, path)
    assert report.passed, report.table()
    assert report.notes == ()
    assert sum(run.stressed for run in report.artifacts[0].runs) == 4
    edit(path, other_epsilon)
    passed, failed = runs(report_on(checkpoint, path))
    assert passed[0] == "onnxruntime, default options" and "nearly constant" in failed[0]


def other_epsilon(model: Any) -> None:
    """A thousandth more in the last norm, whether it is one node or several."""
    fused = [a for n in model.graph.node for a in n.attribute if a.name == "epsilon"]
    if fused:
        fused[-1].f *= 1.001
        return
    for tensor in reversed([*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute)]):
        array = numpy_helper.to_array(tensor) if tensor.dims or tensor.raw_data else np.zeros(0)
        if array.size == 1 and 1e-6 < float(array.reshape(-1)[0]) < 1e-4:
            tensor.CopyFrom(numpy_helper.from_array(array * np.float32(1.001), tensor.name))
            return
    raise AssertionError("no epsilon")


def only(report: Report) -> ArtifactReport:
    (artifact,) = report.artifacts
    return artifact


def test_weights_in_unknown_form_are_kept_and_named(mild: Checkpoint, tmp_path: Path) -> None:
    path = export(tmp_path, mild)
    rewritten(path, {"h.0.mlp.c_fc.weight": scaled}, {})
    report = report_on(mild, path)
    assert report.passed, report.table()
    assert sum(run.stressed for run in only(report).runs) == 4
    kept, unknown = report.notes
    assert "1 weight is found in no stored form (h.0.mlp.c_fc.weight)" in unknown
    assert unknown.endswith("stress weights did not replace it")
    assert "3 kept the checkpoint's values (h.0.mlp.c_proj.weight, h.1.mlp.c_fc.weight, h.1.mlp.c_proj" in kept


def test_derived_copy_is_no_error(mild: Checkpoint, tmp_path: Path) -> None:
    """The head's copy of the embedding is scaled: it does not follow a replaced embedding, which is thus kept."""
    path = export(tmp_path, mild)

    def derive(model: Any) -> None:
        disown(model)
        table = np.ascontiguousarray(mild.weights["wte.weight"].read())
        model.graph.initializer.append(numpy_helper.from_array(table / 2, "halved"))
        model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
        insert_after(model, "embedding", helper.make_node("Mul", ["halved", "two"], ["head"]))
        node(model, "logits_2d").input[1] = "head"

    edit(path, derive)
    report = report_on(mild, path)
    assert report.passed, report.table()
    assert "kept the checkpoint's values (wte.weight)" in " ".join(report.notes)


def test_equal_weights_are_kept(tmp_path: Path) -> None:
    """Untrained norms are ones and zeros, which constants of the graph may be too."""
    checkpoint = tiny(tmp_path)
    plain = {n: np.full(w.shape, float(n.endswith("weight")), np.float32) for n, w in checkpoint.weights.items()}
    norms = {name: array for name, array in plain.items() if ".ln_" in f".{name}"}
    untrained = dataclasses.replace(checkpoint, weights={**checkpoint.weights, **computed_tensors(norms)})
    path = export(tmp_path, untrained)
    edit(path, disown)
    report = report_on(untrained, path)
    assert report.passed, report.table()
    (note,) = report.notes
    assert f"{len(norms)} kept the checkpoint's values" in note


def test_large_models_are_skipped_with_a_note(mild: Checkpoint, tmp_path: Path) -> None:
    path = export(tmp_path, mild)
    edit(path, disown)
    verifiers = {"onnx": OnnxVerifier(small_model=0)}
    report = report_on(mild, path, verifiers=verifiers)
    assert report.passed and len(only(report).runs) == 1
    (note,) = report.notes
    assert "was not run with stress weights" in note and note.endswith("--full does")
    full = report_on(mild, path, "full", verifiers=verifiers)
    assert full.passed, full.table()
    assert full.notes == () and len(only(full).runs) == 5


def test_our_own_graph_is_not_run_again(mild: Checkpoint, tmp_path: Path) -> None:
    """Its nodes have been compared; one of another version has not."""
    path = export(tmp_path, mild)
    assert len(only(report_on(mild, path)).runs) == 1

    def older(model: Any) -> None:
        model.producer_version = "0.0.9"

    edit(path, older)
    assert len(only(report_on(mild, path)).runs) == 5
    edit(path, small_epsilon)
    assert not report_on(mild, path).passed


def test_constants_and_single_file(mild: Checkpoint, tmp_path: Path) -> None:
    """Weights inside the graph, in nodes of their own, are replaced too."""
    path = export(tmp_path, mild)
    model = onnx.load_model(path)
    disown(model)
    for tensor in [t for t in model.graph.initializer if t.name.endswith("c_fc.weight")]:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        model.graph.initializer.remove(tensor)
    path.write_bytes(model.SerializeToString())
    path.with_name("model.onnx_data").unlink()
    report = report_on(mild, path)
    assert report.passed, report.table()
    assert report.notes == () and len(only(report).runs) == 5
    edit(path, clipped)
    assert "1e5" in runs(report_on(mild, path))[1][0]
