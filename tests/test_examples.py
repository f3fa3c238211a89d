"""The programs in examples/, run as in their README and compared with the library."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import gptconvert
from gptconvert.generation.model import generate
from gptconvert.generation.sampling import Sampling
from tests.commands import TINY, TRAINED, command
from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"
PROMPTS = ("Objects are", "A class instance is", "The")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: str, where: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=where, env=environment, capture_output=True, text=True, timeout=300
    )


def takes_arguments(path: Path) -> bool:
    return re.search(rf"python examples/{path.name} [A-Z]", path.read_text()) is not None


def directory_like_a_clone(path: Path) -> Path:
    """A directory with the examples and fixtures, in which the examples may write."""
    for name in ("examples", "fixtures"):
        (path / name).symlink_to(ROOT / name)
    return path


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "gpt2"
    gptconvert.convert(TRAINED, output)
    return output


@pytest.mark.slow
def test_readme_commands_run_as_written(tmp_path: Path) -> None:
    (block,) = re.findall(r"```\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    scripts = [words[1] for words in commands]
    assert sorted(scripts) == sorted(f"examples/{path.name}" for path in EXAMPLES.glob("*.py"))
    clone = directory_like_a_clone(tmp_path)
    for words in commands:
        assert words[0] == "python"
        if words[1] == "examples/litertlm.py":
            continue  # test_litert_lm_writes_the_same_text
        done = run(*words[1:], where=clone)
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=[pytest.mark.tensorflow] if path.stem == "litertlm" else [])
        for path in sorted(EXAMPLES.glob("*.py"))
        if takes_arguments(path)
    ],
)
def test_usage_without_arguments(name: str) -> None:
    done = run(f"examples/{name}.py")
    assert done.returncode == 1
    assert f"python examples/{name}.py" in done.stderr


def test_convert_and_run(tmp_path: Path, capsys: Any) -> None:
    example("convert_and_run").main(str(TRAINED), str(tmp_path / "out"), "Objects are")
    first, verified, *tokens = capsys.readouterr().out.splitlines()
    assert first == "gpt2, 4 layers, 5,313,600 bytes"
    assert verified.endswith("files, verified: True")
    assert len(tokens) == 5
    assert tokens[0].endswith("' never'")
    shares = [float(line.split("%")[0]) for line in tokens]
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 100.3


@pytest.mark.tensorflow
@pytest.mark.skipif(importlib.util.find_spec("litert_lm") is None, reason="LiteRT-LM is not installed")
def test_litert_lm_writes_the_same_text(export: Path, tmp_path: Path) -> None:
    """Its engine, which phones run, and onnxruntime choose the same tokens."""
    prompt = PROMPTS[0]
    done = run(str(EXAMPLES / "litertlm.py"), str(TRAINED), str(tmp_path / "model.litertlm"), prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{prompt}{generate(str(export), prompt, Sampling(max_new_tokens=24)).text}\n"


def test_decode_loop_writes_what_each_prompt_gives_alone(export: Path) -> None:
    """Padding, batch and cache change nothing."""
    texts = example("decode_loop").main(str(export), *PROMPTS)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        alone = generate(str(export), prompt, Sampling(max_new_tokens=24))
        assert text == prompt + alone.text


def test_decode_loop_ends_a_row_and_goes_on_with_the_others(export: Path) -> None:
    import onnxruntime
    from tokenizers import Tokenizer

    loop = example("decode_loop")
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    session = onnxruntime.InferenceSession(export / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    ids, mask = loop.pad_left([tokenizer.encode(prompt).ids for prompt in PROMPTS[:2]], pad=0)
    endless = loop.decode(session, ids, mask, [], 9)
    assert endless.shape == (2, 9)
    stop = endless[0, 2]  # a token that the first row writes third, and the second never
    assert stop not in endless[1] and stop not in endless[0, :2]
    ended = loop.decode(session, ids, mask, [stop, -1], 9)
    assert np.array_equal(ended[0], [*endless[0, :3], *[stop] * 6])
    assert np.array_equal(ended[1], endless[1])
    assert loop.decode(session, ids[:1], mask[:1], [stop], 9).shape == (1, 3)


@pytest.mark.parametrize(("artifact", "code"), [("hf-safetensors", 0), ("hf-variant", 5), ("missing", 3)])
def test_verify_foreign_export_of_transformers(artifact: str, code: int, capsys: Any) -> None:
    assert example("verify_foreign_export").main(str(TINY / "openai-tf"), str(TINY / artifact)) == code
    captured = capsys.readouterr()
    assert {0: "equal", 5: "DIFFERENT", 3: ""}[code] in captured.out
    assert bool(captured.err) == (code == 3)


def test_verify_foreign_export_sees_one_damaged_weight(export: Path, tmp_path: Path, capsys: Any) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    verify = example("verify_foreign_export").main
    assert verify(str(TRAINED), str(copy / "onnx/model.onnx")) == 0
    assert "52 of 52 weights" in capsys.readouterr().out
    data = copy / "onnx/model.onnx_data"
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2 + 3] ^= 0x40  # the exponent of one float32
    data.write_bytes(damaged)
    assert verify(str(TRAINED), str(copy)) == 5
    out = capsys.readouterr().out
    assert "DIFFERENT" in out
    assert "51 of 52 weights" in out


@pytest.mark.slow
def test_the_list_of_jobs_runs_on_dask_and_its_shards_find_it_done(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = directory_like_a_clone(tmp_path)
    done = run("examples/dask_batch.py", where=clone)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[:2] for line in done.stdout.splitlines()) == [
        ["converted", f"out-batch/{name}"] for name in ("gpt2-stdlib", "llmc", "nanogpt", "tiny")
    ]
    monkeypatch.chdir(clone)
    for index in range(2):
        again = command(capsys, "batch", "examples/jobs.jsonl", "--shard", f"{index}/2", "--jobs", 2)
        assert again.code == 0, again.err
        assert [json.loads(line)["status"] for line in again.out.splitlines()] == ["skipped", "skipped"]
