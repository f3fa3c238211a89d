"""The model card of a directory with several graphs: its table, and code that uses a graph that exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptconvert
from gptconvert.generation.model import generate
from gptconvert.generation.sampling import Sampling
from gptconvert.model.options import Options
from gptconvert.targets.onnx.plan import plan
from gptconvert.targets.package.model_card import model_card
from gptconvert.targets.target import CardFacts
from tests.commands import TRAINED
from tests.families.witness import Case
from tests.helpers import checkpoint_of, tiny_gpt2, write_planned
from tests.targets.package.small_exports import export, snippets

ALL = Options(targets=("onnx",), quantize=("q8", "q4", "fp16"), last_token=True, in_place=True, verify=None)


def run(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute a snippet in the output directory; returns its variables."""
    monkeypatch.chdir(directory)
    space: dict[str, Any] = {}
    exec(code, space)
    return space


def rows(directory: Path) -> dict[str, list[str]]:
    """Graph → the other cells of its row."""
    section = (directory / "README.md").read_text("utf-8").partition("## Graphs")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {first.strip("`"): rest for first, *rest in cells}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(Case("gpt2"), tmp_path_factory.mktemp("all"), ALL)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("verified") / "out"
    options = Options(targets=("onnx",), quantize=("q8", "q4"), no_base=True, last_token=True)
    return Path(gptconvert.convert(TRAINED, output, options).output)


def test_every_graph_is_listed_with_its_size(everything: Path) -> None:
    found = rows(everything)
    assert set(found) == {f"onnx/{path.name}" for path in (everything / "onnx").glob("*.onnx")}
    for graph, (nbytes, use, proof) in found.items():
        data = re.findall(rb"model\w*\.onnx_data", (everything / graph).read_bytes())
        size = (everything / graph).stat().st_size
        size += (everything / "onnx" / data[0].decode()).stat().st_size if data else 0
        assert (int(nbytes.replace(",", "")), proof) == (size, "not verified")
        assert use
    assert found["onnx/model_fp16.onnx"][1].startswith("computes in float16")


def test_a_plain_export_has_no_table(tmp_path: Path) -> None:
    for dtype in (None, "fp16"):
        assert rows(export(Case("gpt2"), tmp_path, Options(dtype=dtype))) == {}


def test_limits_are_stated_and_figures_are_not(verified: Path) -> None:
    proofs = {graph: cells[-1] for graph, cells in rows(verified).items()}
    assert proofs == {
        "onnx/model_quantized.onnx": "weights, outputs, mean KL divergence at most 0.01",
        "onnx/model_quantized_last_token.onnx": "weights, outputs, mean KL divergence at most 0.01",
        "onnx/model_q4.onnx": "weights, outputs, mean KL divergence at most 0.2",
        "onnx/model_q4_last_token.onnx": "weights, outputs, mean KL divergence at most 0.2",
    }
    card = (verified / "README.md").read_text("utf-8")
    assert "gptconvert quality OUTPUT --against CHECKPOINT" in card
    assert "what the recipe of its quantisation makes of it" in card
    for file in ("README.md", "manifest.json"):
        assert "perplexity" not in (verified / file).read_text("utf-8")


def test_code_uses_a_graph_that_exists(verified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = snippets(verified, "python")
    assert not (verified / "onnx/model.onnx").exists()
    assert run(found["onnxruntime"], verified, monkeypatch)["logits"].shape[-1] == 2003
    assert 'subfolder="onnx", file_name="model_quantized.onnx"' in found["optimum"]
    assert 'dtype: "q8"' in snippets(verified, "js")["transformers.js"]
    assert "other dtypes here: `q4`" in (verified / "README.md").read_text("utf-8")


def test_code_of_a_graph_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = export(Case("gpt2"), tmp_path, Options(quantize=("fp16",), no_base=True))
    assert run(snippets(directory, "python")["onnxruntime"], directory, monkeypatch)["logits"].dtype == np.float16


def test_quantised_weights_of_a_bfloat16_checkpoint_run_in_browsers(tmp_path: Path) -> None:
    directory = export(Case("gpt2"), tmp_path, Options(dtype="bf16", quantize=("q4",)))
    assert 'dtype: "q4"' in snippets(directory, "js")["transformers.js"]


def test_the_cache_in_place_continues_as_generate_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = Options(targets=("onnx",), in_place=True, verify=None)
    directory = Path(gptconvert.convert(TRAINED, tmp_path / "out", options).output)
    code = snippets(directory, "python")["In-place"]
    ids = run(code, directory, monkeypatch)["ids"]
    (directory / "onnx/model_in_place.onnx").unlink()  # which generate would prefer
    expected = generate(str(directory), "Hello", Sampling(max_new_tokens=20))
    assert capsys.readouterr().out.strip() == ("Hello" + expected.text).strip()
    assert ids == [*expected.prompt_ids, *expected.continuations[0].ids]


def test_code_in_place_without_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(quantize=("q8",), no_base=True, in_place=True)
    checkpoint = checkpoint_of(*tiny_gpt2(), request=options)
    exports = plan(checkpoint, options)
    files = [file for each in exports for file in each.files]
    write_planned(tmp_path, files)
    facts = CardFacts(exports[0].checkpoint, exports, options, {file.path: file.nbytes for file in files})
    (tmp_path / "README.md").write_bytes(model_card(facts, {}))
    code = snippets(tmp_path, "python")["In-place"]
    assert "model_quantized_in_place.onnx" in code
    assert len(run(code, tmp_path, monkeypatch)["ids"]) == 23
