"""The SavedModel target: every family and head, run by TensorFlow and compared with transformers and the truth."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.tensors import Box, Computed
from gptconvert.pipeline import open_checkpoint
from gptconvert.publish.writer import copy_of
from gptconvert.targets.saved_model import plan as model
from gptconvert.targets.saved_model.plan import plan
from gptconvert.targets.saved_model.process import TensorFlowProcess
from gptconvert.targets.saved_model.target import TARGET
from gptconvert.verify.report import Report
from reference_model.config import INPUTS
from tests.commands import TRAINED
from tests.families.bugs import BUGS, Bug
from tests.families.witness import CASES, Case, gap, hf_outputs, inputs_of, our_outputs, reference
from tests.helpers import ROOT
from tests.targets.saved_model.support import (
    file_bytes,
    transposed,
    understood,
    witness_tensor,
    write,
    write_manifest,
)
from tests.verify.exports import report_on

pytestmark = pytest.mark.tensorflow

#: Allowed error of a graph: this many times the float32 reference model's, plus this many units in the last place.
TIMES, ULPS = 8, 8 * 2.0**-23
LM = Case("gpt2")
BY_NAME = {str(case): case for case in CASES}
#: Every family, every head, and every configuration option that changes the graph.
CHOSEN = (
    "gpt1-text-generation gpt2-text-generation gpt_neo-text-generation gptj-text-generation gpt_neox-text-generation "
    "gpt2-feature-extraction gpt2-text-classification gpt_neo-text-classification gpt2-token-classification "
    "gptj-question-answering gpt1-multiple-choice gpt2-text-generation-untied gpt_neox-text-generation-serial "
    "gpt2-text-generation-quick-gelu gpt_neo-text-generation-mish gpt_neox-text-generation-odd "
    "gpt_neox-text-generation-no-positions gpt_neox-text-generation-yarn"
).split()
#: Wrong configurations and weights to build a graph with.
PLANTED = (
    "gpt1-text-generation-norm-first gpt1-text-generation-square-transposed gpt2-text-generation-erf "
    "gpt2-text-generation-eps gpt_neo-text-generation-scaled gpt_neo-text-generation-window-one-more "
    "gptj-text-generation-half-split gpt_neox-text-generation-serial gpt_neo-text-generation-q-k-swapped "
    "gptj-question-answering-start-end-swapped gpt2-text-classification-no-padding-token"
).split()


def verdict(checkpoint: Checkpoint, path: Path) -> Report:
    """The report of the gate on a SavedModel."""
    return report_on(checkpoint, path)


@pytest.mark.parametrize("name", CHOSEN)
def test_every_family_and_head(name: str, shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    case = BY_NAME[name]
    checkpoint = understood(case, saved)
    path = write(tmp_path, plan(checkpoint, Options())[0].files)
    write_manifest(tmp_path)
    report = verdict(checkpoint, path)
    assert report.passed and not report.notes, report.table()

    inputs = inputs_of(case.task)
    feeds = {name: inputs[name] for name in INPUTS[case.task] if name != "position_ids"}
    import torch

    expected = hf_outputs(case, inputs)
    actual = shared.run("serving_default", feeds)
    expected = {name: value for name, value in expected.items() if name in actual}
    noise = gap(our_outputs(reference(checkpoint, torch.float32), inputs), expected, inputs["attention_mask"])
    assert gap(actual, expected, inputs["attention_mask"]) <= TIMES * noise + ULPS


@pytest.mark.parametrize("name", ["gpt2-feature-extraction", "gpt_neo-text-classification", "gpt1-multiple-choice"])
def test_positions_of_the_caller(name: str, shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    """``serving_positions`` numbers tokens as the caller does, here without counting padding."""
    case = BY_NAME[name]
    shared.ask("load", path=str(write(tmp_path, plan(understood(case, saved), Options())[0].files)))
    inputs = inputs_of(case.task)
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clip(0)
    actual = shared.run("serving_positions", inputs)
    expected = {name: value for name, value in hf_outputs(case, inputs).items() if name in actual}
    assert gap(actual, expected, mask) < 1e-5
    assert gap(shared.run("serving_default", {n: inputs[n] for n in INPUTS[case.task]}), expected, mask) > 1e-3


def test_signature_that_ignores_positions_is_detected(
    shared: TensorFlowProcess, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("gpt2", "token-classification")
    checkpoint, run = understood(case, saved), shared.run
    path = write(tmp_path, plan(checkpoint, Options())[0].files)

    def ignoring(signature: str, inputs: Any, wanted: tuple[str, ...] = ()) -> Any:
        slots = np.broadcast_to(np.arange(inputs["input_ids"].shape[1]), inputs["input_ids"].shape)
        return run(signature, {**inputs, **({"position_ids": slots} if "position_ids" in inputs else {})}, wanted)

    monkeypatch.setattr(shared, "run", ignoring)
    report = verdict(checkpoint, path)
    assert {group.name for group in report.artifacts[0].runs[0].groups if not group.ok} == {
        "last positions",
        "holes, counted positions",
        "left padding, counted positions",
    }


@pytest.mark.parametrize("keys", [{"n_positions": 1}, {"vocab_size": 1}], ids=str)
def test_smallest_sizes(keys: dict[str, int], shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    checkpoint = understood(Case("gpt2", keys=keys, name=str(keys)), saved)
    report = verdict(checkpoint, write(tmp_path, plan(checkpoint, Options(xla="vocab_size" in keys))[0].files))
    assert report.passed, report.table()


def test_model_whose_output_is_constant(shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    right = understood(Case("gpt2", "question-answering"), saved)
    zeros = {n: witness_tensor(np.zeros(right.weights[n].shape, np.float32)) for n in right.weights if "qa_" in n}
    silent = dataclasses.replace(right, weights={**right.weights, **zeros})
    report = verdict(silent, write(tmp_path, plan(silent, Options())[0].files))
    assert report.passed, report.table()


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
def test_half_width_storage(dtype: Any, shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    checkpoint = transposed(understood(BY_NAME["gptj-text-generation"], saved, dtype))
    files = plan(checkpoint, Options())[0].files
    assert files[0].nbytes < 1.1 * checkpoint.nbytes
    write_manifest(tmp_path)
    report = verdict(checkpoint, write(tmp_path, files))
    assert report.passed, report.table()


def test_compiled_twins(shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    case = Case("gpt_neo", keys={"num_layers": 2, "attention_types": [[["global", "local"], 1]]}, name="xla")
    checkpoint = understood(case, saved)
    path = write(tmp_path, plan(checkpoint, Options(xla=True))[0].files)
    report = verdict(checkpoint, path)
    assert report.passed, report.table()
    answer = shared.ask("load", path=str(path))["signatures"]
    assert {n for n in answer if n.endswith("_xla")} == {
        f"{n}_xla" for n in ("serving_default", "decode", "last_logits", "generate")
    }
    assert answer["decode_xla"]["inputs"]["past_key_values.0.key"] == ["float32", [1, 3, 39, 8]]


@pytest.mark.parametrize("bug", [b for b in BUGS if str(b) in PLANTED], ids=str)
def test_planted_bugs_are_caught(bug: Bug, shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    right = understood(bug.case, saved)
    wrong = bug.plant(right)
    report = verdict(right, write(tmp_path, plan(wrong, Options())[0].files))
    assert not report.passed
    # A square matrix may be stored either way; wrong use shows only in the outputs.
    by_weights = wrong.weights is not right.weights and "square" not in bug.name
    assert bool(report.artifacts[0].weights.problems) == by_weights


def test_all_planted_bugs_exist() -> None:
    assert set(PLANTED) <= {str(bug) for bug in BUGS}


def test_one_flipped_byte_is_named(shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    checkpoint = understood(LM, saved)
    files = plan(checkpoint, Options())[0].files
    path = write(tmp_path, files)
    placed = next(p for p in files[0].tensors if p.weight == "h.1.mlp.c_fc.bias")
    data = path / "variables/variables.data-00000-of-00002"
    raw = bytearray(data.read_bytes())
    raw[placed.offset + 5] ^= 1
    data.write_bytes(raw)
    assert verdict(checkpoint, path).artifacts[0].weights.problems == [
        "h.1.mlp.c_fc.bias: differs from its source, first at element [1]"
    ]


def test_wrong_checksum_is_rejected_by_tensorflow(shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    checkpoint = understood(LM, saved)
    files = plan(checkpoint, Options())[0].files
    path = write(tmp_path, files)
    assert files[2].finish is not None
    index = files[2].finish(lambda placed: 0, threading.Event())
    (path / "variables/variables.index").write_bytes(index)
    with pytest.raises(InputError, match="TensorFlow cannot load") as caught:
        verdict(checkpoint, path)
    assert "checksum" in str(caught.value).lower() or "data loss" in str(caught.value).lower()


def test_layers_in_another_order(shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    checkpoint = understood(LM, saved)
    swapped = {
        n.replace("h.0.", "h.x.").replace("h.1.", "h.0.").replace("h.x.", "h.1."): w
        for n, w in checkpoint.weights.items()
    }
    wrong = dataclasses.replace(checkpoint, weights={n: swapped[n] for n in checkpoint.weights})
    report = verdict(checkpoint, write(tmp_path, plan(wrong, Options())[0].files))
    assert {p.partition(":")[0] for p in report.artifacts[0].weights.problems} == {
        n for n in checkpoint.weights if n.startswith("h.")
    }


def test_first_bad_block_is_named(shared: TensorFlowProcess, saved: Path, tmp_path: Path) -> None:
    checkpoint = understood(LM, saved)
    config = dataclasses.replace(checkpoint.config, attn_scale=(checkpoint.config.attn_scale[0], 1.0))
    wrong = dataclasses.replace(checkpoint, config=config)
    run = verdict(checkpoint, write(tmp_path, plan(wrong, Options())[0].files)).artifacts[0].runs[0]
    assert run.first_bad == "the last block or the head"
    config = dataclasses.replace(checkpoint.config, attn_scale=(1.0, checkpoint.config.attn_scale[1]))
    wrong = dataclasses.replace(checkpoint, config=config)
    run = verdict(checkpoint, write(tmp_path / "b", plan(wrong, Options())[0].files)).artifacts[0].runs[0]
    assert run.first_bad == "block 1, in present.1.key, or block 0 after its keys and values"


def test_planning_reads_no_weight_and_starts_no_tensorflow(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "TensorFlowProcess", lambda: pytest.fail("it was started"))

    def never(box: Box) -> Any:
        raise AssertionError("read")

    checkpoint = understood(LM, saved)
    weights = {n: Computed(never, w.dtype, w.shape) for n, w in checkpoint.weights.items()}
    files = plan(dataclasses.replace(checkpoint, weights=weights), Options())[0].files
    assert [file.path for file in files] == [
        "saved_model/variables/variables.data-00000-of-00002",
        "saved_model/variables/variables.data-00001-of-00002",
        "saved_model/variables/variables.index",
        "saved_model/saved_model.pb",  # last: marks the directory as complete
    ]


def test_weights_are_copied_as_stored(shared: TensorFlowProcess, saved: Path) -> None:
    checkpoint = understood(LM, saved)
    data = plan(checkpoint, Options())[0].files[0]
    assert [p.weight for p in data.tensors] == sorted(checkpoint.weights)
    assert all(p.tensor.segments() is not None and p.offset % 64 == 0 for p in data.tensors)


def test_weights_of_an_openai_checkpoint_equal_its_data_file() -> None:
    data = plan(open_checkpoint(str(TRAINED)), Options())[0].files[0]
    assert copy_of(data) == str(TRAINED / "model.ckpt.data-00000-of-00001")


def test_layers_are_stored_once(shared: TensorFlowProcess, saved: Path) -> None:
    for layers in (2, 5):
        case = Case("gpt2", keys={"n_layer": layers}, name=f"{layers}-layers")
        graph = file_bytes(plan(understood(case, saved), Options())[0].files[-1])
        assert graph.count(b"Gelu/Tanh\x12\x04Tanh") == 1


def test_integer_weights_are_rejected(shared: TensorFlowProcess, saved: Path) -> None:
    checkpoint = understood(LM, saved)
    weights = {
        **checkpoint.weights,
        "ln_f.bias": Computed(lambda box: np.zeros(24, bool)[box], np.dtype(bool), (24,)),
    }
    with pytest.raises(UnsupportedError) as caught:
        plan(dataclasses.replace(checkpoint, weights=weights), Options())
    assert caught.value.item == "ln_f.bias"


@pytest.fixture(scope="module")
def export(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path, list[bytes]]:
    """An export built in a TensorFlow process of its own, as for a user."""
    checkpoint = understood(LM, saved)
    files = plan(checkpoint, Options())[0].files
    path = write(tmp_path_factory.mktemp("export"), files)
    return checkpoint, path, [file_bytes(file) for file in files]


def test_same_bytes_in_any_environment(
    export: tuple[Checkpoint, Path, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _, before = export
    (tmp_path / "another place").mkdir()
    monkeypatch.chdir(tmp_path / "another place")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONHASHSEED", "17")
    assert [file_bytes(file) for file in plan(checkpoint, Options())[0].files] == before
    for part in (str(ROOT), str(tmp_path), "/tmp"):
        assert part.encode() not in before[-1]


CLIENT = """
import json, sys
for name in ("gptconvert", "reference_model", "torch"):
    sys.modules[name] = None
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
bundle = tf.train.load_checkpoint(sys.argv[1] + "/variables/variables")
names = [n for n in bundle.get_variable_to_shape_map() if n != "_CHECKPOINTABLE_OBJECT_GRAPH"]
run = model.signatures["serving_default"]
logits = run(input_ids=tf.constant([[5, 6, 7]], tf.int64), attention_mask=tf.ones((1, 3), tf.int64))["logits"]
print(json.dumps({
    "logits": logits.numpy().tolist(),
    "variables": sorted(model.weights),
    "static": model.weights["wte.weight"].shape.as_list(),
    "in_checkpoint": len(names),
    "same": bool(np.array_equal(bundle.get_tensor(names[0]), next(
        w for n, w in model.weights.items() if n == names[0].split("/")[1].replace("..", ".")).numpy())),
}))
"""


def test_a_client_without_gptconvert(export: tuple[Checkpoint, Path, list[bytes]], tmp_path: Path) -> None:
    import torch

    checkpoint, path, _ = export
    command = [sys.executable, "-I", "-c", CLIENT, str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["variables"] == sorted(checkpoint.weights)
    assert (found["static"], found["same"], found["in_checkpoint"]) == ([97, 24], True, len(checkpoint.weights))
    with torch.no_grad():
        expected, _ = reference(checkpoint)(torch.tensor([[5, 6, 7]]))
    np.testing.assert_allclose(found["logits"], expected.numpy(), atol=1e-5)


def cli(*arguments: str) -> str:
    """Output of ``saved_model_cli``."""
    tool = Path(sys.executable).with_name("saved_model_cli")
    done = subprocess.run([str(tool), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_saved_model_cli(export: tuple[Checkpoint, Path, list[bytes]]) -> None:
    import torch

    checkpoint, path, _ = export
    shown = cli("show", "--dir", str(path), "--all")
    for name in ("serving_default", "serving_int32", "decode", "last_logits", "generate"):
        assert f"signature_def['{name}']" in shown
    assert (
        "inputs['past_key_values.1.value'] tensor_info:\n        dtype: DT_FLOAT\n        shape: (-1, 3, -1, 8)"
        in shown
    )
    inputs = "input_ids=[[5,6,7]];attention_mask=[[1,1,1]];max_new_tokens=4;temperature=0.0;top_k=0;seed=0"
    ran = cli("run", "--dir", str(path), "--tag_set", "serve", "--signature_def", "generate", "--input_exprs", inputs)
    ids = [5, 6, 7]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(reference(checkpoint)(torch.tensor([ids]))[0][0, -1].argmax()))
    assert f"[[{' '.join(f'{i:2d}' for i in ids)}]]" in ran


def test_without_tensorflow(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    with pytest.raises(UnsupportedError) as caught:
        plan(understood(LM, saved), Options())
    assert caught.value.exit_code == 4
    assert "pip install 'tensorflow>=2.18'" in str(caught.value.hint)
    assert TARGET.requires == (("tensorflow", "tf"),)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('libcudart.so.99: cannot open')", "libcudart.so.99: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9"),
    ],
)
def test_broken_tensorflow(
    source: str, message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorflow.py").write_text(source)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    checkpoint = understood(LM, saved)
    with pytest.raises(UnsupportedError, match="could not build the graph") as caught:
        file_bytes(plan(checkpoint, Options())[0].files[-1])
    assert message in str(caught.value)
    assert list((tmp_path / "temporary").iterdir()) == []
