"""The tutorials' steps work, in order, and print what the pages show."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gptconvert
from fixtures import foreign
from tests.commands import TRAINED, command
from tests.helpers import ROOT

FOLDER = ROOT / "docs" / "tutorials"
CODE_OF = '; echo "exit code $?"'
pytestmark = pytest.mark.slow


def _another_tools_export(directory: Path) -> None:
    """``optimum-export/``: a graph that another program wrote, onnxruntime's optimizer, in optimum's layout."""
    import onnx
    import onnxruntime

    written = gptconvert.convert(
        TRAINED, directory / "ours", gptconvert.Options(verify=None, single_file=True)
    ).output
    export = directory / "optimum-export"
    shutil.copytree(written, export, ignore=shutil.ignore_patterns("onnx", "genai*", "manifest.json", "SHA256SUMS"))
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(export / "model.onnx")
    onnxruntime.InferenceSession(f"{written}/onnx/model.onnx", settings)
    model = onnx.load(export / "model.onnx")
    del model.opset_import[:]  # onnxruntime lists every domain that it knows
    model.opset_import.append(onnx.helper.make_opsetid("", 21))
    model.producer_name = "onnxruntime"
    onnx.save(model, export / "model.onnx")


def _nanogpt_run(directory: Path) -> None:
    """``nanoGPT/out``: the trained fixture as nanoGPT saves it, with the tokenizer's files beside it."""
    import torch
    from safetensors.numpy import load_file

    options = gptconvert.Options(targets=("safetensors",), verify=None)
    written = Path(gptconvert.convert(TRAINED, directory / "hf", options).output)
    run = directory / "nanoGPT" / "out"
    run.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(written / name, run)
    sizes = {"n_layer": 4, "n_head": 3, "n_embd": 144, "block_size": 256, "vocab_size": 2003}
    state = foreign.nanogpt_state(load_file(written / "model.safetensors"), "_orig_mod.")
    torch.save(foreign.nanogpt_checkpoint(state, {**sizes, "bias": True, "dropout": 0.0}), run / "ckpt.pt")


#: Tutorial → what it starts from, besides the fixtures.
SETTINGS: dict[str, Callable[[Path], None]] = {
    "browser": lambda directory: None,
    "nanogpt": _nanogpt_run,
    "pipeline": lambda directory: None,
    "verify": _another_tools_export,
}


def steps(page: str) -> Iterator[tuple[str, str]]:
    """The page's code: ("python", code), or (a command, what it prints)."""
    text = (FOLDER / f"{page}.md").read_text("utf-8")
    for language, block in re.findall(r"^```(python|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            yield "python", block
        else:
            yield from re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


def masked(text: str) -> list[str]:
    """The lines without measured numbers and names of probe groups, which differ between processors."""
    text = re.sub(r"worst R [\d.]+ \([^)]*\)", "worst R", text)
    text = re.sub(r"\d+\.\d+(e[-+]?\d+)?|\d+e[-+]?\d+", "N", text)
    return [" ".join(line.split()) for line in text.splitlines()]


def run(line: str, capsys: Any) -> str:
    """What a command prints: ``gptconvert`` in this process, where nothing else is on the line."""
    bare = line.removesuffix(CODE_OF)
    if bare.startswith("gptconvert ") and not set(bare) & set("|;&<>"):
        done = command(capsys, *shlex.split(bare)[1:])
        assert done.code == 0 or line != bare, done.err
        return f"{done.out}{done.err}exit code {done.code}\n"
    shell = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return shell.stdout + shell.stderr


def test_every_tutorial_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == {*SETTINGS}


@pytest.mark.parametrize("page", SETTINGS)
def test_steps_print_what_the_page_shows(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    shim = tmp_path / "bin" / "gptconvert"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m gptconvert "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    SETTINGS[page](tmp_path)
    monkeypatch.chdir(tmp_path)
    for line, shown in steps(page):
        if line == "python":
            exec(shown, {})
            continue
        printed = masked(run(line, capsys))
        for expected in masked(shown):
            start, elided, _ = expected.partition("…")
            assert any(each == expected or (elided and each.startswith(start)) for each in printed), (line, expected)
