"""Environment variables: one per option, named after its flag; colors; missing packages."""

from __future__ import annotations

import builtins
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from gptconvert.cli import COMMANDS, PACKAGES, group
from gptconvert.cli.options import Option
from tests.commands import REPOSITORY, TINY, command, tree

CONVERT = ("convert", TINY / "openai-tf", "--no-verify")


def parameters(name: str) -> list[Option]:
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return [p for p in found.params if isinstance(p, Option)]


#: (command, option) → the value of its variable.
VALUES = {
    "--verify": "full",
    "--dtype": "bf16",
    "--task": "text-generation",
    "--activation": "erf",
    "--to": "tf",
    "--shard": "0/4",
    "--quantize": "q8",
    "--variant": "q8",
    "--early-stopping": "never",
    "--block-size": "64",
    "--serve": "8001",
    "--gguf-type": "q8_0",
    "--tflite-type": "int8",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_variable_named_after_its_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in parameters(name):
        flag = max(option.opts, key=len)
        variable = f"GPTCONVERT_{name}_{flag[2:]}".replace("-", "_").upper()
        value = "0" if option.is_flag and option.default else "1"
        value = VALUES.get(flag, {"--opset": "17", "--top-p": "0.5", "--runtime": "tf"}.get(flag, value))
        monkeypatch.setenv(variable, value)
        context = click.Context(click.Command(name), auto_envvar_prefix=variable[: -len(flag) + 1])
        found, source = option.consume_value(context, {})
        assert source is click.core.ParameterSource.ENVIRONMENT, variable
        assert option.type_cast_value(context, found) != option.default, variable


@pytest.mark.parametrize("text", ["safetensors,onnx", "safetensors onnx"])
def test_targets_from_the_environment(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("GPTCONVERT_CONVERT_TO", text)
    command(capsys, *CONVERT, "-o", tmp_path / "out")
    assert {"model.safetensors", "onnx/model.onnx"} <= set(tree(tmp_path / "out"))


def test_comma_separated_targets(capsys: Any, tmp_path: Path) -> None:
    together = command(capsys, *CONVERT, "--to", "safetensors,onnx", "-o", tmp_path / "a")
    repeated = command(capsys, *CONVERT, "--to", "safetensors", "--to", "onnx", "-o", tmp_path / "b")
    assert (together.code, repeated.code) == (0, 0)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("text", ["onnx,coreml", "", ","])
def test_unknown_target(capsys: Any, text: str) -> None:
    done = command(capsys, *CONVERT, "--to", text)
    assert done.code == 2
    assert "is not one of onnx, safetensors, tf, openai-tf" in done.err


def test_json_from_the_environment_covers_errors(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCONVERT_INSPECT_JSON", "1")
    assert command(capsys, "inspect", "no/such/path").json["ok"] is False
    assert command(capsys, "inspect", "--nonsense").json["error"]["kind"] == "usage"
    monkeypatch.setenv("GPTCONVERT_INSPECT_JSON", "0")
    assert command(capsys, "inspect", "no/such/path").out == ""


@pytest.mark.parametrize(("value", "colored"), [(None, True), ("", True), ("1", False)])
def test_no_color(value: str | None, colored: bool) -> None:
    terminal, end = pty.openpty()
    environment = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
    if value is not None:
        environment["NO_COLOR"] = value
    words = [sys.executable, "-m", "gptconvert", "inspect", "no/such/path"]
    subprocess.run(words, stderr=end, stdout=subprocess.DEVNULL, env=environment, check=False)
    os.close(end)
    text = os.read(terminal, 10_000)
    os.close(terminal)
    assert b"no/such/path" in text
    assert (b"\x1b[" in text) == colored


@pytest.mark.parametrize(("module", "package"), [("numpy", "numpy"), ("onnx_ir", "onnx_ir"), ("yaml", "pyyaml")])
def test_missing_base_package(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    really = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gptconvert":  # from gptconvert import pipeline
            raise ModuleNotFoundError(f"No module named {module!r}", name=f"{module}.part")
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    done = command(capsys, *CONVERT, "-o", tmp_path / "out", "--json")
    assert (done.code, done.json["error"]["kind"]) == (4, "unsupported")
    assert f"the Python package {module} is not installed" in done.err
    assert f"pip install {package}" in done.err
    assert PACKAGES.get(module, module) == package


def test_missing_click_is_named() -> None:
    code = "import sys; sys.modules['click'] = None; from gptconvert.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 4
    assert done.stderr.splitlines() == [
        "error: the Python package click is not installed",
        "  hint: pip install click",
    ]


def test_missing_extras_name_the_packages_of_the_distribution() -> None:
    import tomllib

    from gptconvert.errors import EXTRAS, install_hint

    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: list(packages) for name, packages in EXTRAS.items()} == {name: extras[name] for name in EXTRAS}
    assert install_hint("gpt1-tokenizer") == "pip install 'ftfy>=6.1' 'spacy>=3.7'"


def test_base_packages_are_known_under_their_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    import re
    import tomllib

    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=]", line)[0] for line in declared}
    assert set(PACKAGES.values()) <= names


def test_help_ends_with_the_address_of_the_documentation(capsys: Any) -> None:
    assert command(capsys, "--help").out.rstrip().splitlines()[-1].strip().startswith("Documentation: https://")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("GPTCONVERT_CONVERT_OPST", "Did you mean GPTCONVERT_CONVERT_OPSET?"),
        ("GPTCONVERT_CONVERT_NO_KV_CACHE", "Did you mean GPTCONVERT_CONVERT_KV_CACHE?"),
        ("GPTCONVERT_CONVERT_TARGETS", "convert has no such option."),
    ],
)
def test_a_variable_of_no_option_is_an_error(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    monkeypatch.setenv(name, "1")
    done = command(capsys, *CONVERT, "-o", tmp_path / "out")
    assert done.code == 2
    assert f"{name} is set" in done.err
    assert hint in done.err
    assert command(capsys, "inspect", TINY / "openai-tf").code == 0


def test_a_variable_without_a_command_is_noted(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCONVERT_TO", "tf")
    done = command(capsys, *CONVERT, "-o", tmp_path / "out")
    assert done.code == 0
    assert "note: GPTCONVERT_TO is set and has no effect; the variable is GPTCONVERT_CONVERT_TO" in done.err


@pytest.mark.parametrize("value", ["1", "0.1.0", ""])
def test_variables_that_scripts_use_themselves(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("GPTCONVERT_VERSION", value)
    done = command(capsys, *CONVERT, "-o", tmp_path / "out")
    assert (done.code, "unverified" in done.err, (tmp_path / "out").is_dir()) == (0, False, True)


def test_debug_from_the_environment(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptconvert.errors import InputError

    monkeypatch.setenv("GPTCONVERT_DEBUG", "yes, please")
    with pytest.raises(InputError):
        command(capsys, "inspect", "no/such/path")


def test_repeated_values_from_the_environment(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCONVERT_INSPECT_SET", "n_head=2 n_head_is=text")
    done = command(capsys, "inspect", TINY / "openai-tf")
    assert "n_head_is" in done.err
