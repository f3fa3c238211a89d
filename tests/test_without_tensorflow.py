"""An environment in which TensorFlow is not installed: everything that does not need it works, the rest says so."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import TRAINED
from tests.helpers import ROOT

#: What a user has who did not ask for the extra; an editable install would bring the whole environment back.
LEFT_OUT = ("tensorflow*", "keras*", "tensorboard*", "tf_keras*", "*.pth", "__editable__*", "__pycache__")
pytestmark = pytest.mark.slow

EXTRA = "pip install 'tensorflow>=2.18'"

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs a fresh Python that can import what is installed here but for TensorFlow: ``python(*arguments)``."""
    packages, empty = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("work")
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in LEFT_OUT):
                (packages / entry.name).symlink_to(entry)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(packages), str(ROOT)))}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-s", *map(str, arguments)]  # -S: no other site-packages
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def export(python: Python, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX and safetensors, converted and verified there."""
    output = tmp_path_factory.mktemp("export") / "out"
    done = python("-m", "gptconvert", "convert", TRAINED, "--to", "onnx", "--to", "safetensors", "-o", output)
    assert done.returncode == 0, done.stderr
    assert "not verified" not in done.stdout + done.stderr
    return output


def test_it_is_not_there(python: Python) -> None:
    for name in ("tensorflow", "keras"):
        done = python("-c", f"import {name}")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named '{name}'"
    for name in ("torch", "onnxruntime"):
        found = python("-c", f"import importlib.util as u; print(u.find_spec('{name}').origin)")
        assert str(ROOT) not in found.stdout and name in found.stdout, found.stderr


@pytest.mark.parametrize("targets", [("tf",), ("onnx", "tf")], ids="+".join)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
def test_the_extra_is_named_before_any_work(
    targets: tuple[str, ...], dry: tuple[str, ...], python: Python, tmp_path: Path
) -> None:
    asked = [part for name in targets for part in ("--to", name)]
    done = python("-m", "gptconvert", "convert", TRAINED, *asked, *dry, "-o", tmp_path / "deep/out")
    assert done.returncode == 4, done.stderr
    assert EXTRA in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_targets_are_converted_and_verified(export: Path) -> None:
    names = {str(path.relative_to(export)) for path in export.rglob("*") if path.is_file()}
    assert {"onnx/model.onnx", "model.safetensors", "manifest.json"} <= names
    assert '"passed": true' in (export / "manifest.json").read_text()


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_other_runtimes_generate(runtime: str, export: Path, python: Python) -> None:
    done = python("-m", "gptconvert", "generate", export, "def ", "--runtime", runtime)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 10


def test_its_own_runtime_names_the_extra(export: Path, python: Python, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((export / name).read_bytes())
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "saved_model/saved_model.pb").write_bytes(b"")
    done = python("-m", "gptconvert", "generate", tmp_path, "def ", "--runtime", "tf")
    assert done.returncode == 4, done.stderr
    assert EXTRA in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("inspect", TRAINED), "GPT-2"), (("formats",), "safetensors"), (("verify", TRAINED), "verified")],
    ids=["inspect", "formats", "verify"],
)
def test_other_commands_work(arguments: tuple[object, ...], said: str, export: Path, python: Python) -> None:
    done = python("-m", "gptconvert", *arguments, *([export] if arguments[0] == "verify" else []))
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
