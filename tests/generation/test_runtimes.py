"""Every runtime generates the same text from one export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from gptconvert.cli.generate import generate as command
from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.generation.model import generate
from gptconvert.generation.results import Generated
from gptconvert.generation.sampling import Sampling
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.gguf import plan as gguf
from gptconvert.targets.onnx import plan as onnx
from gptconvert.targets.registry import RUNTIMES, target_named
from gptconvert.targets.safetensors import plan as safetensors
from gptconvert.targets.saved_model import plan as saved_model
from gptconvert.targets.target import Runtime
from gptconvert.targets.tflite import plan as tflite
from tests.commands import command as run_command
from tests.families.witness import Case, reference
from tests.targets.saved_model.support import understood, write

pytestmark = pytest.mark.tensorflow

PROMPT, NEW = [5, 6, 7, 50, 3], 12


def load(name: str, directory: Path, config: Mapping[str, object]) -> Runtime:
    loader = target_named(RUNTIMES[name]).load
    assert loader is not None
    return loader(str(directory), config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return understood(Case("gpt2"), tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def export(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every artifact and a tokenizer of one word per id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("export")
    for target in (onnx, safetensors, saved_model, tflite):
        write(directory, target.plan(checkpoint, Options())[0].files)
    write(directory, gguf.plan(checkpoint, Options(gguf_type=("f32",)))[0].files)
    config = {"model_type": "gpt2", "vocab_size": 97, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}
    config |= {"n_inner": 56, "bos_token_id": 96, "eos_token_id": 96}
    (directory / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module", params=sorted(RUNTIMES))
def runtime(request: pytest.FixtureRequest, export: Path) -> Iterator[Runtime]:
    loaded = load(request.param, export, {"n_positions": 40})
    yield loaded
    loaded.close()


def test_each_step_equals_the_reference_model(
    runtime: Runtime, checkpoint: Checkpoint, request: pytest.FixtureRequest
) -> None:
    """llama.cpp returns log-probabilities, and computes the GELU from a table of float16 values."""
    import torch

    model = reference(checkpoint)
    assert runtime.n_ctx == 40
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        (logits,) = runtime.step([PROMPT[start:stop]], [0])
        with torch.no_grad():
            expected = model(torch.tensor([PROMPT[:stop]]))[0][0, -1].numpy()
        assert logits.shape == (97,)
        if request.node.callspec.params["runtime"] == "gguf":
            logits, expected = (each - each.mean() for each in (logits, expected))
            np.testing.assert_allclose(logits, expected, atol=2e-3)
        else:
            np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(NEW), Sampling(NEW, 1.0, top_k=40, seed=3)], ids=["greedy", "sampled"])
def test_same_text_on_every_runtime(sampling: Sampling, export: Path) -> None:
    texts = {}
    for name in RUNTIMES:
        running = generate(str(export), " ".join(f"w{i}" for i in PROMPT), sampling, name)
        texts[name] = running.text
        assert running.prompt_ids == tuple(PROMPT)
    assert len(texts["onnx"].split()) > 3
    assert {*texts.values()} == {texts["onnx"]}


@pytest.mark.parametrize("name", sorted(RUNTIMES))
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_generation_stops_at_any_end_token(place: str, name: str, export: Path, tmp_path: Path) -> None:
    """Those of generation_config.json, or else of config.json."""
    prompt = " ".join(f"w{i}" for i in PROMPT)
    free = ids_of(generate(str(export), prompt, Sampling(NEW), "torch"))
    end = next(token for token in free if token != free[0])
    copy = tmp_path / "export"
    shutil.copytree(export, copy)
    config = json.loads((copy / "config.json").read_text())
    if place == "config.json":
        config["eos_token_id"] = [96, end]
    else:
        config["eos_token_id"] = free[0]  # overruled
        (copy / place).write_text(json.dumps({"eos_token_id": [96, end], "bos_token_id": 7}))
    (copy / "config.json").write_text(json.dumps(config))
    assert ids_of(generate(str(copy), prompt, Sampling(NEW), name)) == free[: free.index(end)]
    started = generate(str(copy), "", Sampling(1), "torch").prompt_ids
    assert started == ((96,) if place == "config.json" else (7,))


def ids_of(found: Generated) -> list[int]:
    return list(found.continuations[0].ids)


def test_command_line(export: Path) -> None:
    arguments = [str(export), "w5 w6", "--max-new-tokens", "4", "--runtime", "torch", "--json"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert json.loads(done.stdout)["prompt_ids"] == [5, 6]
    assert CliRunner().invoke(command, [*arguments, "--runtime", "jax"]).exit_code == 2


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_missing_artifact(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        load(name, tmp_path, {"n_positions": 40})
    assert str(tmp_path) in str(caught.value)
    assert f"--to {RUNTIMES[name]}" in str(caught.value.hint)


def test_model_without_a_language_head(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    bare = understood(Case("gpt2", "feature-extraction"), tmp_path_factory.mktemp("saved"))
    write(tmp_path, safetensors.plan(bare, Options())[0].files)
    config = {"model_type": "gpt2", "vocab_size": 97, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_inner": 56, "tie_word_embeddings": False}))
    with pytest.raises(UnsupportedError, match="feature-extraction cannot generate"):
        load("torch", tmp_path, config)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"temperature": -1.0}, "--temperature"),
        ({"top_p": float("nan")}, "--top-p"),
        ({"top_p": 0.0}, "--top-p"),
    ],
)
def test_numbers_that_choose_nothing(fields: dict[str, float], flag: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**fields)  # type: ignore[arg-type]
    assert caught.value.item == flag


def test_a_prompt_that_is_not_utf8(export: Path) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        generate(str(export), "w5 \udcff", Sampling(1), "torch")


def test_a_directory_that_is_not_one(export: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or directory"):
        generate(str(tmp_path / "nothere"), "w5", Sampling(1))
    with pytest.raises(InputError, match="not a directory"):
        generate(str(export / "config.json"), "w5", Sampling(1))


def test_why_a_continuation_ended(capsys: Any, export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    words = ["generate", tmp_path / "export", " ".join(f"w{i}" for i in PROMPT), "--runtime", "torch", "--json"]
    (tmp_path / "export" / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    few = run_command(capsys, *words, "--max-new-tokens", 3)
    full = run_command(capsys, *words, "--max-new-tokens", 1000)
    (tmp_path / "export" / "config.json").write_text(json.dumps({**config, "eos_token_id": full.json["ids"][0]}))
    ended = run_command(capsys, *words)
    assert [done.json["stopped"] for done in (few, full, ended)] == ["max_new_tokens", "context", "end_of_text"]
    assert len(full.json["ids"]) == config["n_positions"] - len(PROMPT)
    note = "note: stopped after 35 tokens: the context of 40 tokens is full"
    assert [note in done.err for done in (few, full, ended)] == [False, True, False]


def test_llama_cpp_returns_as_many_as_needed(export: Path) -> None:
    runtime = load("gguf", export, {"n_positions": 40})
    try:
        (everything,) = runtime.step([PROMPT], [0])
        runtime.reset(3)
        (largest,) = runtime.step([PROMPT], [0])
    finally:
        runtime.close()
    returned = np.isfinite(largest)
    assert returned.sum() == 23
    np.testing.assert_allclose(largest[returned], everything[returned], atol=1e-5)
    assert everything[returned].min() >= everything[~returned].max()
    assert (largest[~returned] == -np.inf).all()
