"""Directories and files that need a step first: the hint says which, the same under every command, and it works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptconvert.errors import GptConvertError, InputError
from gptconvert.inspection import open_checkpoint
from gptconvert.model.options import Options
from gptconvert.sources.advice import ADVICE
from gptconvert.sources.detect import FILES, FORMATS, open_source
from tests.commands import TINY, command

HF = TINY / "hf-safetensors-sharded"
BIN = TINY / "hf-bin"


def trainer(folder: Path) -> None:
    """What the Trainer saves besides the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(BIN / "config.json", folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": {}}, folder / name)
    (folder / "trainer_state.json").write_text("{}")


def zero(folder: Path) -> None:
    trainer(folder)
    (folder / "zero_to_fp32.py").write_text("")
    (folder / "global_step500").mkdir()
    torch.save({"module": None}, folder / "global_step500" / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def fsdp(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    trainer(folder)
    state = torch.load(BIN / "pytorch_model.bin")
    dcp.save({"model": state}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)


def run_of_trainer(folder: Path) -> None:
    for step in (500, 1000, 90):
        shutil.copytree(BIN, folder / f"checkpoint-{step}")


def hub_cache(folder: Path) -> None:
    shutil.copytree(BIN, folder / "snapshots" / "0123abc")
    (folder / "refs").mkdir()


def whole_cache(folder: Path) -> None:
    hub_cache(folder / "models--org--name")


def inside(folder: Path) -> None:
    """A script's output, with the model and the tokenizer in directories of their own."""
    shutil.copytree(BIN, folder / "model")
    (folder / "tokenizer").mkdir()


def onnx_export(folder: Path) -> None:
    (folder / "onnx").mkdir(parents=True)
    shutil.copy(BIN / "config.json", folder)


def zipped(folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "gpt2.zip", "w") as archive:
        archive.write(BIN / "config.json", "config.json")


DIRECTORIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "DeepSpeed": (zero, "python zero_to_fp32.py . merged"),
    "FSDP": (fsdp, "dcp_to_torch"),
    "Trainer run": (run_of_trainer, "checkpoint-1000"),
    "hub cache": (hub_cache, "snapshots/0123abc"),
    "whole hub cache": (whole_cache, "models--org--name/snapshots/0123abc"),
    "checkpoint inside": (inside, "run/model"),
    "ONNX export": (onnx_export, "the checkpoint that it was exported from"),
    "archive": (zipped, "gpt2.zip: unpack it"),
}


def hints(path: Path, capsys: Any) -> list[str]:
    found = []
    for form in ("hf", "convert"):
        done = command(capsys, form, path, "--json")
        assert done.code in (3, 4)
        found.append(done.json["error"]["hint"])
    return found


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_directories_that_need_a_step_first(kind: str, tmp_path: Path, capsys: Any) -> None:
    make, words = DIRECTORIES[kind]
    make(tmp_path / "run")
    first, second = hints(tmp_path / "run", capsys)
    assert first == second
    assert words in first
    assert "optimizer" not in first


def test_every_piece_of_advice_is_tested() -> None:
    shown = ("zero_to_fp32.py", "pytorch_model_fsdp_0", "checkpoint-500", "snapshots", "gpt2.zip")
    shown += ("models--org--name", "onnx")
    assert all(any(re.fullmatch(each.entry, name) for name in shown) for each in ADVICE)


def test_an_fsdp_checkpoint_converts_after_the_hint(tmp_path: Path, capsys: Any) -> None:
    fsdp(tmp_path / "run")
    hint = hints(tmp_path / "run", capsys)[0]
    words = re.search(r"`python (-m [^`]+)`", hint)
    assert words is not None
    subprocess.run([sys.executable, *words[1].split()], check=True, capture_output=True)
    merged, expected = open_checkpoint(tmp_path / "run"), open_checkpoint(BIN)
    assert all(merged.weights[n].read().tobytes() == w.read().tobytes() for n, w in expected.weights.items())


@pytest.mark.parametrize("kind", ["Trainer run", "hub cache", "whole hub cache", "checkpoint inside"])
def test_the_directory_named_in_the_hint_is_a_checkpoint(kind: str, tmp_path: Path, capsys: Any) -> None:
    DIRECTORIES[kind][0](tmp_path / "run")
    hint = hints(tmp_path / "run", capsys)[0]
    assert open_checkpoint(hint.rpartition(": ")[2]).config.family == "gpt2"


def test_the_only_shard_without_its_index(tmp_path: Path, capsys: Any) -> None:
    shutil.copy(BIN / "config.json", tmp_path)
    shutil.copy(BIN / "pytorch_model.bin", tmp_path / "pytorch_model-00001-of-00001.bin")
    name = "pytorch_model-00001-of-00001.bin"
    assert hints(tmp_path, capsys) == [f"this is the only shard: pass --weights-file {name}"] * 2
    assert open_checkpoint(tmp_path, Options(weights_file=name)).weights


def test_the_run_inside_a_project(tmp_path: Path) -> None:
    """gpt-2-simple writes checkpoint/run1 into the directory in which it runs."""
    (tmp_path / "samples").mkdir()
    shutil.copytree(TINY / "openai-tf", tmp_path / "checkpoint" / "run1")
    with pytest.raises(InputError) as caught:
        open_source(tmp_path, Options())
    assert caught.value.hint == f"pass the directory inside: {tmp_path / 'checkpoint'}"
    assert open_source(tmp_path / "checkpoint", Options()).scheme == "openai-tf"


def test_the_state_of_a_training_run_is_never_proposed_as_weights(tmp_path: Path, capsys: Any) -> None:
    trainer(tmp_path / "run")
    for hint in hints(tmp_path / "run", capsys):
        assert "--weights-file" not in (hint or "")
    shutil.copy(BIN / "pytorch_model.bin", tmp_path / "run" / "mine.pt")
    for hint in hints(tmp_path / "run", capsys):
        assert "--weights-file mine.pt" in hint


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
def test_an_archive_of_a_model(suffix: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / f"gpt2.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(BIN / "config.json", "gpt2/config.json")
    else:
        with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as tar:
            tar.add(BIN, "gpt2")
    first, second = hints(path, capsys)
    assert first == second == "unpack it, and pass the directory inside"


@pytest.mark.parametrize(
    ("files", "formats"),
    [
        (["tokenizer.json", "vocab.json"], ("hf", "openai-tf")),
        (["hparams.json", "encoder.json", "vocab.bpe"], ("openai-tf", "hf")),
        (["holiday.jpg"], ("hf", "openai-tf")),
    ],
)
def test_unknown_directories_show_what_was_found_then_the_nearest_formats(
    files: list[str], formats: tuple[str, str], tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(GptConvertError) as caught:
        open_source(tmp_path, Options())
    assert str(caught.value).endswith(f"found {', '.join(sorted(files))}")
    hint = caught.value.hint or ""
    assert hint.startswith(f"the nearest formats: {formats[0]} (")
    assert f" or {formats[1]} (" in hint
    assert len(str(caught.value)) + len(hint) - len(os.fspath(tmp_path)) < 330


def test_every_format_has_its_files() -> None:
    assert FILES.keys() == {each.name for each in FORMATS}


def test_a_damaged_file_is_an_input_error_under_every_command(tmp_path: Path) -> None:
    content = (BIN / "pytorch_model.bin").read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: len(content) // 2])
    for form in ("nanogpt", None):
        with pytest.raises(InputError) as caught:
            open_checkpoint(tmp_path / "model.pt", format=form)
        assert "known format" not in str(caught.value)
    assert json.loads((BIN / "config.json").read_text())["model_type"] == "gpt2"
