"""Every entry of a source directory is read, carried, not needed, or left behind with a note."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptconvert import pipeline
from gptconvert.errors import InputError
from gptconvert.inspection import inspect, open_checkpoint
from gptconvert.model.options import Options
from gptconvert.sources.hf.adapter import LEFT_BEHIND
from tests.commands import command
from tests.helpers import FIXTURES

pytestmark = pytest.mark.usefixtures("no_hang")

#: An ordinary directory: a Trainer's, a hub clone's and other programs' files, none of which changes the model.
HARMLESS = """.gitattributes .gitignore .DS_Store README.md README_zh.md LICENSE.txt NOTICE optimizer.pt scheduler.pt
scaler.pt rng_state.pth rng_state_0.pth trainer_state.json training_args.bin all_results.json eval_results.json
train_results.json events.out.tfevents.1700000000.host.1 modeling_old.py handler.py requirements.txt run.sh train.log
loss.png plot.ipynb data.csv samples.jsonl model.onnx rust_model.ot 64.tflite model-q4.gguf config.yaml
tf_graph.pb""".split()
HARMLESS_FOLDERS = (".git", "runs", "checkpoint-500", "onnx", "wandb", "__pycache__", "figures", "global_step20")
NOTED = {
    "adapter_config.json": "a PEFT adapter, which changes the outputs",
    "adapter_model.safetensors": "a PEFT adapter, which changes the outputs",
    "adapter_model.bin": "a PEFT adapter, which changes the outputs",
    "modules.json": "pooling of sentence-transformers, which changes the embeddings",
    "additional_chat_templates/tool_use.jinja": "further chat templates",
    "quantize_config.json": "a quantisation, which changes the weights",
    "value_head.safetensors": "other weights",
    "v_head.bin": "other weights",
    "meta.pkl": "a vocabulary stored as a pickle, which is not opened",
    "preprocessor_config.json": "not recognised",
    "something.xyz": "not recognised",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "tiny-gpt2" / "hf-safetensors", tmp_path / "source"))


def outcomes(directory: Path) -> dict[str, tuple[str, str]]:
    return {entry["name"]: (entry["outcome"], entry["reason"]) for entry in inspect(directory)["inventory"]}


def left(directory: Path, **options: Any) -> list[str]:
    notes = open_checkpoint(directory, Options(**options)).notes
    return [note for note in notes if note.startswith("left behind")]


def test_an_ordinary_directory_has_no_notes(directory: Path) -> None:
    before = open_checkpoint(directory).notes
    for name in HARMLESS:
        (directory / name).write_text("x")
    for name in HARMLESS_FOLDERS:
        (directory / name).mkdir()
        (directory / name / "model.safetensors").write_text("x")
    assert open_checkpoint(directory).notes == before
    found = outcomes(directory)
    assert set(found) == {f"{p.name}/" if p.is_dir() else p.name for p in directory.iterdir()}
    assert {found[name][0] for name in ("config.json", "model.safetensors", "README.md")} == {"read"}
    assert {found[name][0] for name in ("LICENSE.txt", "NOTICE")} == {"carried"}
    assert {found[f"{name}/"][0] for name in HARMLESS_FOLDERS} == {"not needed"}


@pytest.mark.parametrize("name", NOTED)
def test_what_matters_is_noted_and_fails_a_strict_conversion(name: str, directory: Path, tmp_path: Path) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    shown = f"{path.parent.name}/" if path.parent != directory else name
    assert outcomes(directory)[shown] == ("left behind", NOTED[name])
    note = LEFT_BEHIND if "adapter" in name else f"left behind: {shown} ({NOTED[name]})"
    assert left(directory) == [note]  # an adapter's note says how to merge it
    with pytest.raises(InputError, match="left behind"):
        pipeline.plan(open_checkpoint(directory, Options(strict=True)))


def test_one_note_per_reason(directory: Path) -> None:
    for i in range(9):
        (directory / f"{i}.xyz").touch()
    (directory / "v_head.bin").touch()
    (directory / "value_head.safetensors").touch()
    assert left(directory) == [
        "left behind: 0.xyz, 1.xyz, 2.xyz, 3.xyz, 4.xyz, 5.xyz and 3 more (not recognised)",
        "left behind: v_head.bin, value_head.safetensors (other weights)",
    ]


def test_weights_that_the_user_passed_over_are_not_noted_again(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "step9.safetensors")
    assert left(directory) == ["left behind: step9.safetensors (other weights)"]
    assert left(directory, weights_file="step9.safetensors") == []


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "vocab.txt", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["link out", "pipe", "dangling"])
def test_a_copied_file_must_be_inside_the_directory(name: str, kind: str, directory: Path, tmp_path: Path) -> None:
    """A link could publish any file of the person who converts a stranger's checkpoint."""
    secret = tmp_path / "secret"
    secret.write_text("password")
    if kind == "pipe":
        os.mkfifo(directory / name)
    else:
        (directory / name).symlink_to(secret if kind == "link out" else tmp_path / "nothing")
    checkpoint = open_checkpoint(directory)
    reason = "not a regular file, a link that leaves the directory, or too large"
    assert left(directory) == [f"left behind: {name} ({reason})"]
    assert str(directory / name) not in checkpoint.source.files


def test_a_link_inside_the_directory_is_followed(directory: Path) -> None:
    (directory / "legal").mkdir()
    (directory / "legal" / "text").write_text("terms")
    (directory / "LICENSE").symlink_to(directory / "legal" / "text")
    assert outcomes(directory)["LICENSE"] == ("carried", "licence")


def test_a_licence_that_is_too_large_is_left_behind(directory: Path) -> None:
    with open(directory / "LICENSE", "wb") as file:
        file.truncate((16 << 20) + 1)
    assert outcomes(directory)["LICENSE"][0] == "left behind"
    assert not open_checkpoint(directory).source.documents


def test_shards_and_their_index(tmp_path: Path) -> None:
    found = outcomes(FIXTURES / "tiny-gpt2" / "hf-safetensors-sharded")
    assert found["model.safetensors.index.json"] == ("read", "index of the weights")
    assert found["model-00002-of-00004.safetensors"] == ("read", "weights")


FORMATS = [path for path in FIXTURES.glob("*/*/") if path.parent.name != "openai" and path.name != "llmc"]


@pytest.mark.parametrize("path", sorted(FORMATS), ids=lambda path: path.name)
def test_every_format_recognises_its_own_files(path: Path) -> None:
    options = Options(n_head=3) if path.name == "gpt1" else Options()
    checkpoint = open_checkpoint(path, options)
    assert checkpoint.source.inventory
    assert not [entry for entry in checkpoint.source.inventory if entry.outcome == "left behind"]


def test_a_file_of_weights_alone_has_no_inventory(tmp_path: Path) -> None:
    """Its directory may hold anything."""
    (tmp_path / "other.xyz").touch()
    for path in (FIXTURES / "tiny-gpt2" / "openai-tf").iterdir():
        shutil.copy(path, tmp_path)
    assert open_checkpoint(tmp_path / "model.ckpt").source.inventory == ()
    assert left(tmp_path) == ["left behind: other.xyz (not recognised)"]


def test_inspect_shows_it(directory: Path, capsys: Any) -> None:
    for name in ("LICENSE", "optimizer.pt", "x" * 50 + ".log", "y" * 50 + ".log", "adapter_config.json"):
        (directory / name).touch()
    out = command(capsys, "inspect", directory, "--no-tensors")
    lines = dict(
        line.strip().split("  ", 1) for line in out.out.splitlines() if line.startswith("  ") and "  " in line.strip()
    )
    assert lines["carried"].strip() == "LICENSE"
    assert lines["left behind"].strip() == "adapter_config.json"
    assert lines["not needed"].strip() == "optimizer.pt, … 2 more (--json lists all)"
    assert max(map(len, out.out.splitlines())) <= 80
    listed = command(capsys, "inspect", directory, "--json").json["inventory"]
    assert {"name": "LICENSE", "outcome": "carried", "reason": "licence"} in listed


def test_config_replaced_by_an_option(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads((directory / "config.json").read_text())))
    found = open_checkpoint(directory, Options(hparams=str(other))).source.inventory
    assert [entry.reason for entry in found if entry.name == "config.json"] == ["replaced by --hparams"]
