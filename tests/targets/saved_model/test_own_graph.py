"""Graphs of our own SavedModels are compared node for node: errors below the noise of the given weights fail too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.cli import run
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.saved_model import plan as model
from gptconvert.targets.saved_model import stress
from gptconvert.targets.saved_model import verify as verifier
from gptconvert.targets.saved_model.own_graph import OwnGraph
from gptconvert.targets.saved_model.plan import plan
from gptconvert.targets.saved_model.process import TensorFlowProcess
from gptconvert.targets.saved_model.verify import SavedModelVerifier
from gptconvert.targets.target import Candidate
from gptconvert.verify.report import ArtifactReport
from gptconvert.version import __version__
from tests.commands import TINY, command
from tests.families.witness import Case
from tests.targets.saved_model.support import Shared, transposed, understood, witness_tensor, write, write_manifest

pytestmark = pytest.mark.tensorflow

SOURCE = TINY / "hf-safetensors"
Edit = Callable[[Any], None]


@pytest.fixture(scope="module")
def converted(tensorflow: TensorFlowProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("own") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "TensorFlowProcess", Shared(tensorflow))
        patch.setattr(verifier, "TensorFlowProcess", Shared(tensorflow))
        assert run(["convert", str(SOURCE), "--to", "tf", "-q", "-o", str(output)]) == 0
    return output


def edited(converted: Path, directory: Path, edit: Edit) -> Path:
    """A copy with a change in its graph, and checksums that agree with it."""
    from tensorflow.core.protobuf import saved_model_pb2

    output = directory / "out"
    shutil.copytree(converted, output)
    path = output / "saved_model" / "saved_model.pb"
    before = path.read_bytes()
    saved = saved_model_pb2.SavedModel.FromString(before)
    edit(saved.meta_graphs[0])
    path.write_bytes(after := saved.SerializeToString(deterministic=True))
    assert before != after
    sums = output / "SHA256SUMS"
    digests = [hashlib.sha256(content).hexdigest() for content in (before, after)]
    sums.write_text(sums.read_text().replace(*digests))
    return output


def function(meta: Any, stem: str) -> Any:
    return next(f for f in meta.graph_def.library.function if f.signature.name.rpartition("_")[0] == stem)


def constants(nodes: Any, value: float) -> Iterator[Any]:
    import tensorflow as tf

    for node in nodes:
        if node.op == "Const" and node.attr["dtype"].type not in (tf.string, tf.bool):
            array = tf.make_ndarray(node.attr["value"].tensor)
            if array.size == 1 and array.item() == value:
                yield node


def set_constant(nodes: Any, value: float, other: float) -> None:
    """Change the first constant of a value."""
    import tensorflow as tf

    node = next(constants(nodes, value))
    kind = tf.make_ndarray(node.attr["value"].tensor)
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.full(kind.shape, other, kind.dtype)))


def small_epsilon(meta: Any) -> None:
    set_constant(function(meta, "__inference_block").node_def, np.float32(1e-5), 1.00001e-5)


def finite_mask(meta: Any) -> None:
    set_constant(function(meta, "__inference_body").node_def, np.finfo(np.float32).min, -10000)


def swapped_input(meta: Any) -> None:
    node = next(n for n in function(meta, "__inference_block").node_def if n.op == "AddV2")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def extra_node(meta: Any) -> None:
    nodes = function(meta, "__inference_serving").node_def
    nodes.add(name="extra", op="NoOp")


def changed_signature(meta: Any) -> None:
    meta.signature_def["serving_default"].method_name = "other"


def other_stop(meta: Any) -> None:
    """``generate`` stops at another id, once it has run longer than verification runs it."""
    set_constant(function(meta, "while_body").node_def, 96, 95)


def other_operator(meta: Any) -> None:
    next(n for n in function(meta, "__inference_block").node_def if n.op == "Tanh").op = "Erf"


def other_version(meta: Any) -> None:
    meta.meta_info_def.tensorflow_version = "2.0.0"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (small_epsilon, ["function __inference_block_", "value: expected float32 1e-05, found float32 1.00001e-05"]),
        (finite_mask, ["function __inference_body_", "expected float32 -3.4028235e+38, found float32 -10000.0"]),
        (swapped_input, ["function __inference_block_", "inputs: expected "]),
        (extra_node, ["function __inference_serving_", "node extra: unexpected"]),
        (
            changed_signature,
            ['signature serving_default: expected method_name: "tensorflow/serving/predict"'],
        ),
        (other_stop, ["function while_body_", "value: expected int64 96, found int64 95"]),
    ],
)
def test_bugs_that_no_output_shows(
    edit: Edit, words: list[str], converted: Path, shared: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command(capsys, "verify", SOURCE, edited(converted, tmp_path, edit), "--json")
    assert done.code == 5
    (artifact,) = done.json["verification"]["artifacts"]
    assert all(run["ok"] for run in artifact["runs"]), "the outputs show the bug too"
    assert done.json["verification"]["package"]["ok"]
    for word in words:
        assert any(word in problem for problem in artifact["problems"]), artifact["problems"]


def test_unmodified_graph_passes(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a confined process of its own."""
    done = command(capsys, "verify", SOURCE, converted, "--json", "--strict")
    assert (done.code, done.json["verification"]["artifacts"][0]["problems"]) == (0, []), done.err


def test_graph_of_another_version_is_noted(
    converted: Path, shared: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = edited(converted, tmp_path, other_version)
    done = command(capsys, "verify", SOURCE, output)
    assert done.code == 0
    assert "its nodes were not compared, because TensorFlow 2.0.0 built it and this is " in done.err
    manifest = output / "manifest.json"
    content = json.loads(manifest.read_text())
    for version, reason in (("0.0.9", "gptconvert 0.0.9 wrote it and this is "), (None, "no manifest.json")):
        content["tool"] = {"name": "gptconvert", "version": version} if version else {"name": "another"}
        manifest.write_text(json.dumps(content))
        done = command(capsys, "verify", SOURCE, output / "saved_model")
        assert "its nodes were not compared, because " + reason in done.err
        assert done.code == 0


def larger_epsilon(meta: Any) -> None:
    set_constant(function(meta, "__inference_block").node_def, np.float32(1e-5), 1.01e-5)


def clipped(meta: Any) -> None:
    """Whatever the first block's MLP computes, at 10⁴."""
    nodes = function(meta, "__inference_block").node_def
    node = next(n for n in reversed(nodes) if n.op == "AddV2")
    limit = nodes.add(name="limit", op="Const")
    limit.CopyFrom(next(constants(nodes, np.float32(1e-5))))
    limit.name = "limit"
    set_constant([limit], np.float32(1e-5), 1e4)
    least = nodes.add(name="least", op="Minimum", input=[node.input[1], "limit:output:0"])
    least.attr["T"].CopyFrom(node.attr["T"])
    node.input[1] = "least:z:0"


@pytest.mark.parametrize("edit", [larger_epsilon, finite_mask, clipped])
def test_bugs_that_only_stress_weights_show(
    edit: Edit, converted: Path, shared: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a graph whose nodes are not compared."""
    output = edited(converted, tmp_path, edit)
    done = command(capsys, "verify", SOURCE, moved(output), "--json")
    assert done.code == 5
    (artifact,) = done.json["verification"]["artifacts"]
    own, *stressed = artifact["runs"]
    assert own["ok"] and not stressed[-1]["ok"] and not artifact["problems"], artifact["runs"]
    assert stressed[-1]["first_bad_block"]
    assert all(run["runtime"].startswith("stress weights: ") for run in stressed)


def moved(output: Path) -> Path:
    """The SavedModel without a manifest beside it."""
    (output / "manifest.json").unlink()
    return output / "saved_model"


def test_a_correct_graph_without_a_manifest_passes(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a confined process of its own."""
    output = Path(shutil.copytree(converted, tmp_path / "out"))
    done = command(capsys, "verify", SOURCE, moved(output), "--json")
    runs = done.json["verification"]["artifacts"][0]["runs"]
    assert (done.code, [run["ok"] for run in runs]) == (0, [True] * 5)


def report_on(checkpoint: Checkpoint, path: Path) -> ArtifactReport:
    candidate = Candidate("tf", str(path), "saved_model", checkpoint)
    return SavedModelVerifier()(candidate, "default", lambda name, total: lambda count: None)


def test_matrices_that_equal_their_transposes(shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    """Stored as in the source, or the other way if another source was converted."""
    plain = understood(Case("gpt2"), saved)
    zeros = {
        n: witness_tensor(np.zeros(w.shape, np.float32)) for n, w in plain.weights.items() if "attn.c_proj.w" in n
    }
    rows = dataclasses.replace(plain, weights={**plain.weights, **zeros})
    columns = transposed(rows)
    path = write(tmp_path, plan(columns, Options())[0].files)
    write_manifest(tmp_path)
    for checkpoint in (rows, columns):
        report = report_on(checkpoint, path)
        assert report.ok, report.problems


def test_differences_of_one_process(shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    """TensorFlow numbers functions anew each time; everything else must be equal, in compiled twins too."""
    checkpoint = understood(Case("gpt2"), saved)
    path = write(tmp_path, plan(checkpoint, Options(xla=True))[0].files)
    stored = {name: model.stored(name, weight) for name, weight in checkpoint.weights.items()}
    flipped = {name: checkpoint.weights[name] is not stored[name] for name in stored}
    own = OwnGraph("saved_model", __version__, checkpoint, stored, flipped)
    assert own.compare(shared, str(path), threading.Event()) == ([], [])


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_stress_weights_take_the_types_and_orientations_of_the_variables(
    dtype: str, shared: TensorFlowProcess, saved: Path, tmp_path: Path
) -> None:
    """Matrices of unknown orientation keep their values, and a note names them."""
    plain = transposed(understood(Case("gpt2"), saved, dtype))
    name = "h.1.attn.c_proj.weight"
    zeros = witness_tensor(np.zeros(plain.weights[name].shape, dtype))
    checkpoint = dataclasses.replace(plain, weights={**plain.weights, name: zeros})
    report = report_on(checkpoint, write(tmp_path, plan(checkpoint, Options())[0].files))
    assert report.ok and [run.stressed for run in report.runs] == [False, *[True] * 4], report.table()
    assert f"1 kept the checkpoint's values ({name}), because they equal" in report.notes[-1]


def test_large_models_run_with_stress_weights_in_a_full_verification(
    converted: Path,
    shared: object,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stress, "MOST_STRESSED", 1 << 10)
    path = moved(edited(converted, tmp_path, finite_mask))
    done = command(capsys, "verify", SOURCE, path)
    assert done.code == 0
    assert "it was not run with stress weights, which takes several times the memory" in done.err
    assert command(capsys, "verify", SOURCE, path, "--full").code == 5
