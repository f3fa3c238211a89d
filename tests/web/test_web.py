"""Exports in onnxruntime-web and transformers.js: under Node, and in headless Chromium.

``make test-web`` installs the npm packages. The default build of onnxruntime-web (``.asyncify``) has fewer kernels
than the plain one and than onnxruntime itself.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.generation.model import generate
from gptconvert.generation.sampling import Sampling
from gptconvert.model.options import Options
from gptconvert.pipeline import convert, open_checkpoint
from tests.helpers import FIXTURES

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKENIZER = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
PLAIN, ASYNCIFY = "", ".asyncify"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("node") and (HERE / "node_modules").is_dir()),
        reason="no Node or npm packages: make test-web",
    ),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with weights large enough that no two tokens are almost equally likely."""
    import torch
    import transformers

    sizes = {"vocab_size": 2003, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 56}
    rope = {"rope_theta": 1000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
    neox = transformers.GPTNeoXConfig(
        vocab_size=2003,
        max_position_embeddings=64,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=56,
        rope_parameters=rope,
    )
    models = {
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)),
        "gptj": transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes, rotary_dim=4)),
        "neox": transformers.GPTNeoXForCausalLM(neox),
    }
    root = tmp_path_factory.mktemp("web")
    torch.manual_seed(0)
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        source = root / "sources" / name
        model.save_pretrained(source)
        for old, new in TOKENIZER.items():
            shutil.copy(FIXTURES / "gpt2-stdlib" / old, source / new)
        for dtype in (None, "fp16") if name == "neox" else (None,):
            directory = root / "exports" / (f"{name}-{dtype}" if dtype else name)
            directory.parent.mkdir(exist_ok=True)
            convert(
                open_checkpoint(str(source)), str(directory), Options(targets=("onnx",), dtype=dtype, verify=None)
            )
    return root / "exports"


def node(*arguments: str | Path) -> str:
    """Run a program of this folder; returns what it prints."""
    done = subprocess.run(
        ["node", *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=HERE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("build", ["onnxruntime-web", "onnxruntime-web/webgpu"], ids=["plain", "asyncify"])
def test_logits_under_node(build: str, exports: Path, tmp_path: Path) -> None:
    import onnxruntime

    ids = np.arange(2, 40)[np.newaxis]
    feeds: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": ids - 2,
    }
    given = {name: {"data": array.ravel().tolist(), "dims": array.shape} for name, array in feeds.items()}
    for directory in exports.iterdir():
        (tmp_path / directory.name).mkdir()
        (tmp_path / directory.name / "onnx").symlink_to(directory / "onnx")
        (tmp_path / directory.name / "feeds.json").write_text(json.dumps(given))
    node("node.mjs", tmp_path, build)
    for directory in tmp_path.iterdir():
        (graph,) = (directory / "onnx").glob("*.onnx")
        session = onnxruntime.InferenceSession(graph.resolve(), providers=["CPUExecutionProvider"])
        past = {v.name: np.zeros((1, 3, 0, 8), np.float32) for v in session.get_inputs() if v.name not in feeds}
        expected = session.run(["logits"], {**feeds, **past})[0]
        found = np.reshape(json.loads((directory / "logits.json").read_text()), expected.shape)
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=directory.name
        )


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of exports of a trained model with several graphs, by name."""
    root = tmp_path_factory.mktemp("variants")
    options: dict[str, dict[str, Any]] = {
        "all": {"quantize": ("q8", "q4", "fp16")},
        "external": {"quantize": ("q8", "q4"), "single_file": False},
        "no-q8": {"quantize": ("q4", "fp16")},
        "fp16": {"quantize": ("fp16",), "no_base": True},
    }
    for name, chosen in options.items():
        source = open_checkpoint(str(FIXTURES / "gpt2-stdlib"))
        convert(source, str(root / name), Options(targets=("onnx",), verify=None, **chosen))
    return root


#: (export, dtype that the page asks for, dtype that it gets). Without one, the q8 graph if there is one, else fp32.
DTYPES = [
    ("all", None, "q8"),
    ("all", "q4", "q4"),
    ("all", "fp32", "fp32"),
    ("external", None, "q8"),
    ("external", "q4", "q4"),
    ("no-q8", None, "fp32"),
    ("fp16", None, "fp16"),
]


def check_variants(root: Path, cases: list[tuple[str, str | None, str]], results: list[list[str]]) -> None:
    """Each text is what our own generate writes with the graph of the expected dtype."""
    for (name, asked, dtype), (text, chosen) in zip(cases, results, strict=True):
        continued = generate(str(root / name), "import os", Sampling(max_new_tokens=12), variant=dtype)
        assert (text, chosen) == ("import os" + continued.text, dtype), (name, asked)


def test_variants_under_node(variants: Path) -> None:
    cases = [{"model": name, "dtype": dtype} for name, dtype, _ in DTYPES]
    check_variants(variants, DTYPES, json.loads(node("transformers.mjs", variants, json.dumps(cases))))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_variants_in_a_browser(variants: Path) -> None:
    """On WebAssembly, and on WebGPU in software: slow, and without the ``shader-f16`` that fp16 needs."""
    on_gpu = [case for case in DTYPES if case in (("all", None, "q8"), ("no-q8", None, "fp32"))]
    cases = [
        {"model": name, "dtype": dtype, "binary": ASYNCIFY, "device": device}
        for device, chosen in (("wasm", DTYPES), ("webgpu", on_gpu))
        for name, dtype, _ in chosen
    ]
    results = json.loads(node("browser.mjs", variants, str(CHROMIUM), json.dumps(cases)))
    check_variants(variants, DTYPES + on_gpu, results)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_text_in_a_browser(exports: Path) -> None:
    """transformers.js, without a dtype option, writes what onnxruntime writes on the CPU."""
    cases = [
        {"model": model, "binary": binary, "device": device}
        for binary, device in ((PLAIN, "wasm"), (ASYNCIFY, "wasm"), (ASYNCIFY, "webgpu"))
        for model in ("gptj", "neox")
    ]
    cases.append({"model": "neox-fp16", "binary": ASYNCIFY, "device": "wasm"})
    texts = json.loads(node("browser.mjs", exports, str(CHROMIUM), json.dumps(cases)))
    for case, (text, _) in zip(cases, texts, strict=True):
        continued = generate(str(exports / case["model"]), "import os", Sampling(max_new_tokens=12))
        assert text == "import os" + continued.text, case
