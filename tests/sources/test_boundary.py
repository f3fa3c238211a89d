"""The boundary of the sources: every failure while a checkpoint is read is exit 3, with the file and its format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptconvert import pipeline
from gptconvert.cli import run
from gptconvert.errors import UnforeseenError
from gptconvert.families import registry
from gptconvert.sources import detect, openai_tf
from tests.commands import ORIGINALS, TINY, command


class Panic(BaseException):
    """As pyo3's PanicException: not an Exception."""


FAULTS = [
    OverflowError("cannot fit 'int' into an index-sized integer"),
    RecursionError("maximum recursion depth exceeded"),
    ZeroDivisionError("division by zero"),
    OSError(5, "Input/output error"),
    AssertionError(),
    Panic("index out of bounds"),
]


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object, **options: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["openai-tf", "convert"])
def test_a_reader_that_fails(name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(openai_tf, "read_json_object", failing(error))
    done = command(capsys, name, TINY / "openai-tf", "-o", "out", "--no-verify")
    assert done.code == 3
    assert str(TINY / "openai-tf") in done.err
    assert openai_tf.FORMAT.title in done.err
    assert f"{type(error).__name__}: {error}" in done.err
    assert "bug in gptconvert" not in done.err


@pytest.mark.parametrize(
    ("module", "function"),
    [(detect, "detect"), (detect, "with_inventory"), (registry, "assemble"), (pipeline, "tokenizer_files")],
    ids=["detection", "inventory", "tensors", "tokenizer"],
)
def test_every_stage_of_reading(module: Any, function: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(module, function, failing(IndexError("list index out of range")))
    done = command(capsys, "convert", TINY / "hf-safetensors", "-o", "out", "--no-verify", "--json")
    assert done.code == 3
    assert done.json["error"]["kind"] == "input"
    assert done.json["error"]["file"] == str(TINY / "hf-safetensors")
    assert "IndexError: list index out of range" in done.json["error"]["message"]


def test_debug_shows_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ZeroDivisionError("division by zero")
    monkeypatch.setattr(openai_tf, "read_json_object", failing(original))
    with pytest.raises(UnforeseenError) as caught:
        run(["--debug", "inspect", str(TINY / "openai-tf")])
    assert caught.value.__cause__ is original


def test_too_little_memory_is_the_inputs_fault(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(openai_tf, "read_json_object", failing(MemoryError()))
    done = command(capsys, "inspect", TINY / "openai-tf")
    assert done.code == 3
    assert "not enough memory" in done.err


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (ModuleNotFoundError("No module named 'x'", name="x"), 4)]
)
def test_what_passes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(openai_tf, "read_json_object", failing(error))
    assert command(capsys, "inspect", TINY / "openai-tf").code == code


# --- causes ---------------------------------------------------------------------------------------------------------

HUGE = (2**63, 2**64, 10**18, 10**30, 10**299, 1e30, 1e300, -(2**63), -(10**299))
CONFIGURATIONS = {
    "openai-tf": (TINY / "openai-tf", "hparams.json"),
    "hf": (TINY / "hf-safetensors", "config.json"),
    "gpt-neo": (ORIGINALS / "flax-gpt-neo", "config.json"),
    "mesh-tf": (ORIGINALS / "mesh-tf", "config.json"),
    "mesh-jax": (ORIGINALS / "mesh-jax", "6B_roto_tiny.json"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_huge_numbers(name: str, tmp_path: Path, capsys: Any) -> None:
    """Every number of a configuration, and all of them together."""
    source, file = CONFIGURATIONS[name]
    path = Path(shutil.copytree(source, tmp_path / "in")) / file
    raw = json.loads(path.read_text())
    numbers = [key for key, value in raw.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    assert numbers
    for huge in HUGE:
        for keys in ([key] for key in numbers):
            path.write_text(json.dumps(raw | dict.fromkeys(keys, huge)))
            done = command(capsys, "inspect", tmp_path / "in")
            assert done.code in (0, 2, 3, 4), (keys, huge, done.err)
            assert "Error:" not in done.err, (keys, huge, done.err)
        path.write_text(json.dumps(raw | dict.fromkeys(numbers, huge)))
        assert command(capsys, "inspect", tmp_path / "in").code in (3, 4)


SPECIAL: dict[str, tuple[Callable[[Path], object], int]] = {
    "a named pipe": (os.mkfifo, 7),
    "a link to /dev/zero": (lambda path: path.symlink_to("/dev/zero"), 7),
    "a link to itself": (lambda path: path.symlink_to(path.name), 3),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), 3),
    "empty": (lambda path: path.touch(), 3),
    "a directory": (lambda path: path.mkdir(), 3),
}
WEIGHTS = ["tf_model.h5", "flax_model.msgpack", "model.safetensors", "pytorch_model.bin", "x.hdf5", "x.pt", "x.npz"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("named", [None, "hf"])
def test_special_files(name: str, kind: str, named: str | None, tmp_path: Path, capsys: Any) -> None:
    make, code = SPECIAL[kind]
    shutil.copy(TINY / "hf-safetensors" / "config.json", tmp_path)
    make(tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        done = command(capsys, *(("hf", path, "--dry-run") if named else ("inspect", path)))
        assert done.code in (code, 3, 4) if path == tmp_path else done.code in (code, 4), done.err
        assert "Error:" not in done.err
