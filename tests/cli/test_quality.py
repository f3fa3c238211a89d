"""``gptconvert quality``, and the limit of quality in ``verify`` and in conversions: figures, exit codes, input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.commands import TINY, Outcome, command, tree
from tests.verify.exports import edit, node

SOURCE = TINY / "hf-safetensors"
FIGURES = ("kl_mean", "kl_99_9", "kl_max", "top1", "top1_in_top5", "perplexity_source", "perplexity")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with model.onnx and its graphs of 8 and 4 bits."""
    from gptconvert.cli import run

    directory = tmp_path_factory.mktemp("exported") / "out"
    quantize = ("--quantize", "q8", "--quantize", "q4", "--max-kl", "10")
    assert run(["hf", str(SOURCE), *quantize, "-o", str(directory), "-q"]) == 0
    return directory


def graphs(done: Outcome) -> dict[str, Any]:
    return {Path(graph["path"]).stem: graph for graph in done.json["graphs"]}


def test_every_graph_of_a_directory(exported: Path, capsys: Any) -> None:
    done = command(capsys, "quality", exported, "--against", SOURCE, "--json", "--max-kl", "10")
    assert (done.code, done.json["ok"]) == (0, True)
    found = graphs(done)
    assert list(found) == ["model", "model_q4", "model_quantized"]
    assert found["model"]["kl_mean"] < 1e-9 < found["model_quantized"]["kl_mean"] < found["model_q4"]["kl_mean"]
    assert all(graph["size"] > 1000 and graph["max_kl"] == 10 for graph in found.values())
    assert all(isinstance(graph[name], float) for graph in found.values() for name in FIGURES)


def test_table(exported: Path, capsys: Any) -> None:
    done = command(capsys, "quality", exported / "onnx" / "model_quantized.onnx", "--against", SOURCE, "--max-kl", 10)
    assert done.code == 0
    head, row = done.out.strip().splitlines()
    assert "KL mean" in head and "perplexity" in head
    assert row.split()[0] == "model_quantized.onnx"
    assert "measured on" in done.err


def test_a_directory_with_its_own_checkpoint(exported: Path, capsys: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(exported, whole)
    none = command(capsys, "quality", whole)
    assert none.code == 3
    assert "no checkpoint to measure against" in none.err
    assert "--against SOURCE" in none.err
    shutil.copy(SOURCE / "model.safetensors", whole)
    done = command(capsys, "quality", whole, "--json", "--max-kl", "10")
    assert done.code == 0
    assert graphs(done)["model"]["kl_mean"] < 1e-9


def test_a_missed_limit(exported: Path, capsys: Any) -> None:
    done = command(capsys, "quality", exported, "--against", SOURCE, "--json", "--max-kl", "1e-6")
    assert (done.code, done.json["ok"]) == (5, False)
    assert done.json["error"]["exit_code"] == 5
    found = graphs(done)
    assert [graph["ok"] for graph in found.values()] == [True, False, False]
    assert found["model_q4"]["worst_layers"] and found["model_q4"]["worst_weights"]
    shown = command(capsys, "quality", exported, "--against", SOURCE, "--max-kl", "1e-6")
    assert shown.code == 5
    assert "more than 1e-06; most is lost in h." in shown.err


def with_an_infinite_weight(path: Path) -> None:
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == "ln_f.weight")
    tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, np.inf, np.float32), tensor.name))
    onnx.save(model, path)


def test_a_graph_that_computes_nan(exported: Path, capsys: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(exported, whole)
    with_an_infinite_weight(whole / "onnx" / "model_quantized.onnx")
    done = command(capsys, "quality", whole, "--against", SOURCE, "--json", "--max-kl", "10")
    assert done.code == 5
    found = graphs(done)
    assert found["model_quantized"]["problem"] == "logits have NaN or infinite values"
    assert found["model_quantized"]["kl_mean"] is None
    assert found["model_q4"]["ok"]
    assert "model_quantized.onnx: logits have NaN" in done.json["error"]["message"]


def test_nothing_to_measure(capsys: Any, tmp_path: Path) -> None:
    done = command(capsys, "quality", SOURCE)
    assert done.code == 4
    assert "no ONNX graph to measure" in done.err
    done = command(capsys, "quality", tmp_path / "absent", "--against", SOURCE)
    assert done.code == 3


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PyTorch's own export of transformers' model, and onnxruntime's dynamic quantisation of it."""
    import torch
    import transformers
    from onnxruntime.quantization import quantize_dynamic

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel.from_pretrained(SOURCE, attn_implementation="eager").eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits

    folder = tmp_path_factory.mktemp("foreign")
    axes = {0: "batch", 1: "sequence"}
    names = ["input_ids", "attention_mask"]
    ids = torch.ones(1, 5, dtype=torch.int64)
    torch.onnx.export(
        Logits(),
        (ids, ids),
        str(folder / "model.onnx"),
        dynamo=False,
        opset_version=17,
        input_names=names,
        output_names=["logits"],
        dynamic_axes=dict.fromkeys((*names, "logits"), axes),
    )
    quantize_dynamic(folder / "model.onnx", folder / "model_int8.onnx")
    return folder


def test_exports_of_other_programs(foreign: Path, capsys: Any) -> None:
    done = command(capsys, "quality", foreign, "--against", SOURCE, "--json")
    assert done.code == 0, done.err
    found = graphs(done)
    assert found["model"]["kl_mean"] < 1e-9
    assert found["model_int8"]["kl_mean"] > 1e-7
    assert found["model_int8"]["max_kl"] is None
    done = command(capsys, "quality", foreign, "--against", SOURCE, "--json", "--max-kl", "1e-9")
    assert done.code == 5
    assert [graph["ok"] for graph in graphs(done).values()] == [True, False]


def test_verify_measures_quantised_graphs_only(exported: Path, capsys: Any) -> None:
    done = command(capsys, "verify", SOURCE, exported, "--json", "--max-kl", "10")
    assert done.code == 0, done.err
    found = {artifact["path"]: artifact.get("quality") for artifact in done.json["verification"]["artifacts"]}
    assert found["onnx/model.onnx"] is None
    assert found["onnx/model_q4.onnx"]["kl_mean"] > found["onnx/model_quantized.onnx"]["kl_mean"] > 0


def test_verify_fails_past_the_limit(exported: Path, capsys: Any) -> None:
    done = command(capsys, "verify", SOURCE, exported / "onnx" / "model_q4.onnx", "--max-kl", "1e-6")
    assert done.code == 5
    assert "a quantised graph loses more than its limit allows" in done.out
    assert "worst layers" in done.out
    done = command(capsys, "verify", SOURCE, exported / "onnx" / "model_q4.onnx", "--max-kl", "1e-6", "--json")
    assert done.json["error"]["message"] == "quantisation loses more than --max-kl allows"


def test_verify_on_a_text(exported: Path, capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9")
    done = command(capsys, "verify", SOURCE, exported, "--eval-text", path)
    assert done.code == 3
    assert "not UTF-8" in done.err


def test_a_conversion_that_misses_the_limit_publishes_nothing(capsys: Any, tmp_path: Path) -> None:
    done = command(capsys, "hf", SOURCE, "--quantize", "q4", "--max-kl", "1e-6", "-o", tmp_path / "out", "--json")
    assert done.code == 5
    assert not list(tmp_path.iterdir())
    assert done.json["error"]["message"].startswith("quantisation loses more than --max-kl allows")
    assert "--calibrate self" in done.json["error"]["hint"]
    base, q4 = done.json["verification"]["artifacts"]
    assert base["ok"] and not q4["ok"]
    assert set(q4["quality"]["worst_layers"]) == {"h.0", "h.1", "wte"}
    assert all(q4["quality"][name] is not None for name in FIGURES)
    assert "worst layers" in done.err


BAD: dict[str, tuple[tuple[str, ...], int, str]] = {
    "a target that is not ONNX": (("--to", "safetensors", "--quantize", "q4"), 2, "has no effect without --to onnx"),
    "an unknown scheme": (("--quantize", "q3"), 2, "'q3' is not one of"),
    "a block size that is not a power of two": (("--quantize", "q8", "--block-size", "48"), 2, "block_size"),
    "a small block size": (("--quantize", "q8", "--block-size", "8"), 2, "8 is not in the range"),
    "an unknown accuracy level": (("--quantize", "q8", "--accuracy-level", "3"), 2, "accuracy_level"),
    "a block size without a quantised graph": (("--block-size", "64"), 2, "--block-size has no effect"),
    "a limit without a quantised graph": (("--max-kl", "1", "--quantize", "fp16"), 2, "--max-kl has no effect"),
    "a limit for another target": (
        ("--to", "safetensors", "--max-kl", "1"),
        2,
        "no effect without --to gguf or --to onnx",
    ),
    "a limit without verification": (
        ("--quantize", "q8", "--max-kl", "1", "--no-verify"),
        2,
        "contradicts --no-verify",
    ),
    "a negative limit": (("--quantize", "q8", "--max-kl", "-1"), 2, "at least 0"),
    "a limit that is not a number": (("--quantize", "q8", "--max-kl", "nan"), 2, "at least 0"),
    "an infinite limit": (("--quantize", "q8", "--max-kl", "inf"), 2, "at least 0"),
    "a missing text": (("--quantize", "q8", "--eval-text", "absent.txt"), 3, "file is missing"),
    "an empty text": (("--quantize", "q8", "--eval-text", "EMPTY"), 3, "the text is empty"),
    "a text that is not UTF-8": (("--quantize", "q8", "--eval-text", "LATIN"), 3, "not UTF-8"),
    "a text without a tokenizer": (("--quantize", "q8", "--eval-text", "SHORT"), 2, "cannot be tokenized"),
    "calibration on an empty text": (("--quantize", "q4", "--calibrate", "EMPTY"), 3, "the text is empty"),
    "calibration without 4 bits": (("--quantize", "q8", "--calibrate", "self"), 2, "no effect without --quantize q4"),
}


@pytest.mark.parametrize(("words", "code", "message"), BAD.values(), ids=BAD)
def test_bad_input(words: tuple[str, ...], code: int, message: str, capsys: Any, tmp_path: Path) -> None:
    texts = {"EMPTY": b" \n", "LATIN": b"caf\xe9 latt\xe9", "SHORT": b"short"}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    arguments = [str(tmp_path / word) if word in texts else word for word in words]
    before = tree(tmp_path)
    done = command(capsys, "hf", SOURCE, *arguments, "-o", tmp_path / "out")
    assert (done.code, message in done.err) == (code, True), done.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_sources_are_refused(method: str, capsys: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    config = json.loads((source / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    plain, quantised = (
        command(capsys, "hf", source, "-o", tmp_path / "out", *words) for words in ((), ("--quantize", "q4"))
    )
    assert (quantised.code, quantised.err) == (plain.code, plain.err)
    assert quantised.code == 4
    assert method in quantised.err
    assert not (tmp_path / "out").exists()


def test_the_planted_bug_of_a_shipped_graph_is_seen_in_its_quality(
    exported: Path, capsys: Any, tmp_path: Path
) -> None:
    """Bytes and recipe are not compared here: only what the graph loses shows that a bias is missing."""
    path = tmp_path / "model.onnx"
    shutil.copy(exported / "onnx" / "model_quantized.onnx", path)
    before = command(capsys, "quality", path, "--against", SOURCE, "--json", "--max-kl", 10).json["graphs"][0]
    edit(path, lambda model: node(model, "h.1.mlp.inner").input.__delitem__(slice(3, None)))
    after = command(capsys, "quality", path, "--against", SOURCE, "--json", "--max-kl", 10).json["graphs"][0]
    assert after["kl_mean"] > 4 * before["kl_mean"]
