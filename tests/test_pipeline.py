"""Conversion end to end: checkpoints written by the original tools, compared with independent implementations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptconvert import errors, pipeline
from gptconvert.model.options import Options
from tests.commands import SHARED, TINY, TRAINED, command, tree
from tests.helpers import NO_RELEASED_FILES

#: Allowed difference of float32 logits of size ~10 from the float64 truth; the verification gate is tighter.
NOISE = 2e-5
SAME_WEIGHTS = [
    ("openai-tf", "logits"),
    ("openai-tf-sharded", "logits"),
    ("openai-tf-partitioned", "logits"),
    ("openai-tf-adam", "logits"),
    ("openai-tf-bf16", "logits_bf16"),
    ("openai-tf-f16", "logits_f16"),
    ("hf-safetensors", "logits"),
    ("hf-safetensors-sharded", "logits"),
    ("hf-bf16", "logits_bf16"),
    ("hf-variant", "logits_variant"),
    ("hf-bare", "logits"),
    ("hf-bin", "logits"),
    ("hf-bin-legacy", "logits"),
    ("hf-bin-sharded", "logits"),
]


def onnx_logits(graph: Path, ids: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    batch, new = ids.shape
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(new), (batch, 1)),
    }
    for item in session.get_inputs():
        if item.name.startswith("past"):
            feed[item.name] = np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float32)
    result: np.ndarray = session.run(["logits"], feed)[0]
    return result


@pytest.mark.parametrize(("name", "golden"), SAME_WEIGHTS)
def test_every_source_becomes_verified_onnx_and_safetensors(name: str, golden: str, tmp_path: Path) -> None:
    witness = np.load(TINY / "golden.npz")
    checkpoint = pipeline.open_checkpoint(str(TINY / name))
    options = pipeline.Options(targets=("onnx", "safetensors"))
    result = pipeline.convert(checkpoint, str(tmp_path / "out"), options)
    assert result.report is not None
    assert result.report.passed
    found = onnx_logits(tmp_path / "out/onnx/model.onnx", witness["ids"])
    assert np.abs(found - witness[golden]).max() < NOISE


def test_exports_of_the_same_weights_are_identical(tmp_path: Path) -> None:
    outputs = []
    for name in ("openai-tf", "openai-tf-sharded", "hf-safetensors", "hf-bin", "hf-bare"):
        checkpoint = pipeline.open_checkpoint(str(TINY / name))
        pipeline.convert(checkpoint, str(tmp_path / name), pipeline.Options(verify=None))
        outputs.append(tree(tmp_path / name / "onnx"))
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("dtype", [None, "fp16", "bf16"])
def test_a_second_run_in_another_directory_gives_the_same_bytes(dtype: str | None, tmp_path: Path) -> None:
    shutil.copytree(TRAINED, tmp_path / "elsewhere" / "source")
    options = pipeline.Options(targets=("onnx", "safetensors"), dtype=dtype)
    for number, source in enumerate((TRAINED, tmp_path / "elsewhere" / "source")):
        checkpoint = pipeline.open_checkpoint(str(source))
        pipeline.convert(checkpoint, str(tmp_path / f"out{number}"), options)
    assert tree(tmp_path / "out0") == tree(tmp_path / "out1")


def test_round_trip_through_our_own_safetensors_gives_the_same_graph(tmp_path: Path) -> None:
    checkpoint = pipeline.open_checkpoint(str(TRAINED))
    pipeline.convert(checkpoint, str(tmp_path / "a"), pipeline.Options(targets=("onnx", "safetensors"), verify=None))
    pipeline.convert(
        pipeline.open_checkpoint(str(tmp_path / "a")), str(tmp_path / "b"), pipeline.Options(verify=None)
    )
    assert tree(tmp_path / "a/onnx") == tree(tmp_path / "b/onnx")


@pytest.mark.skipif(not SHARED.exists(), reason=NO_RELEASED_FILES)
def test_openais_checkpoint_matches_openais_code(tmp_path: Path) -> None:
    oracle = np.load(SHARED / "openai-gpt2/oracle.npz")
    checkpoint = pipeline.open_checkpoint(str(SHARED / "openai-gpt2/model.ckpt"), format="openai-tf")
    pipeline.convert(checkpoint, str(tmp_path / "out"))
    graph = tmp_path / "out/onnx/model.onnx"
    assert np.abs(onnx_logits(graph, oracle["ids"].astype(np.int64))[:, -4:] - oracle["logits_last"]).max() < 2e-6
    long = onnx_logits(graph, oracle["long_ids"].astype(np.int64))
    assert np.abs(long[:, -2:] - oracle["long_logits_last"]).max() < 2e-6
    data = SHARED / "openai-gpt2/model.ckpt.data-00000-of-00001"
    assert (tmp_path / "out/onnx/model.onnx_data").read_bytes() == data.read_bytes()


def plant_the_other_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptconvert.targets.onnx.activations import ACTIVATION

    monkeypatch.setitem(ACTIVATION, "gelu_tanh", ACTIVATION["gelu_erf"])  # type: ignore[arg-type]


def test_a_wrong_graph_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_the_other_gelu(monkeypatch)
    checkpoint = pipeline.open_checkpoint(str(TINY / "hf-safetensors"))
    with pytest.raises(errors.VerificationError) as caught:
        pipeline.convert(checkpoint, str(tmp_path / "out"))
    assert caught.value.report is not None
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_the_existing_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = pipeline.open_checkpoint(str(TINY / "hf-safetensors"))
    pipeline.convert(checkpoint, str(tmp_path / "out"), pipeline.Options(verify=None))
    before = tree(tmp_path)
    plant_the_other_gelu(monkeypatch)
    with pytest.raises(errors.VerificationError):
        pipeline.convert(checkpoint, str(tmp_path / "out"), pipeline.Options(force=True))
    assert tree(tmp_path) == before


def test_manifest_records_source_options_and_every_digest(tmp_path: Path) -> None:
    import hashlib

    checkpoint = pipeline.open_checkpoint(str(TINY / "openai-tf"))
    pipeline.convert(checkpoint, str(tmp_path / "out"), pipeline.Options(targets=("onnx", "safetensors")))
    text = (tmp_path / "out/manifest.json").read_text()
    assert str(tmp_path) not in text
    assert str(TINY) not in text
    manifest = json.loads(text)
    data = (TINY / "openai-tf/model.ckpt.data-00000-of-00001").read_bytes()
    assert hashlib.sha256(data).hexdigest() in {file["sha256"] for file in manifest["source"]["files"]}
    for file in manifest["files"]:
        assert hashlib.sha256((tmp_path / "out" / file["path"]).read_bytes()).hexdigest() == file["sha256"]
    assert {t["name"] for t in manifest["tensors"] if t["file"] == "onnx/model.onnx_data"} == set(checkpoint.weights)


@pytest.mark.parametrize("opset", [17, 18, 19, 20, 21])
@pytest.mark.parametrize("kv_cache", [True, False])
def test_options_work_together(opset: int, kv_cache: bool, tmp_path: Path) -> None:
    import onnx

    target = Options(opset=opset, kv_cache=kv_cache, single_file=not kv_cache, dtype="fp16" if opset > 18 else None)
    checkpoint = pipeline.open_checkpoint(str(TINY / "hf-variant"))
    pipeline.convert(checkpoint, str(tmp_path / "out"), target)
    (graph,) = (tmp_path / "out/onnx").glob("*.onnx")
    onnx.checker.check_model(str(graph), full_check=True)
    model = onnx.load(graph, load_external_data=False)
    assert [o.version for o in model.opset_import] == [opset]
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)
    assert {node.domain for node in model.graph.node} == {""}


def test_feature_extraction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    args = (
        "hf",
        TINY / "hf-safetensors",
        "--task",
        "feature-extraction",
        "--to",
        "onnx",
        "--to",
        "safetensors",
        "-o",
        out,
    )
    assert command(capsys, *args, "-q").code == 0
    from transformers import AutoModel

    _, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
