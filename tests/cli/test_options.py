"""Command-line options: which command offers which, how the help lists them, and which combinations are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from gptconvert.cli import COMMANDS, group
from gptconvert.cli.options import DISPLAY, GROUPS
from gptconvert.cli.sources import ALWAYS, FORMAT_COMMANDS, HUB
from gptconvert.model.options import INFO
from tests.commands import ORIGINALS, TINY, command

OPENAI = TINY / "openai-tf"


def offered(name: str) -> set[str]:
    """The options of a command that are fields of ``Options``."""
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return {parameter.name for parameter in found.params if parameter.name is not None} & set(INFO)


def opening(name: str) -> set[str]:
    """A command's source and checkpoint options."""
    return {option for option in offered(name) if INFO[option].stage in ("source", "checkpoint")}


@pytest.mark.parametrize("name", FORMAT_COMMANDS)
def test_command_offers_the_options_of_its_format(name: str) -> None:
    from gptconvert.sources.detect import FORMATS
    from gptconvert.sources.format import ALWAYS as UNREFUSED

    accepts = next(each.accepts for each in FORMATS if each.name == name)
    assert opening(name) == accepts | ALWAYS | (HUB if name == "hf" else set())
    assert ALWAYS == UNREFUSED - HUB


@pytest.mark.parametrize("name", ["convert", "inspect", "verify"])
def test_commands_that_detect_offer_every_option_of_every_format(name: str) -> None:
    assert opening(name) == {option for option, info in INFO.items() if info.stage in ("source", "checkpoint")}


def test_every_option_is_offered_by_convert() -> None:
    assert offered("convert") == set(INFO)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--opset", "17"), "--opset has no effect without --to onnx"),
        (("--opset", "21"), "--opset has no effect without --to onnx"),  # the default, but given explicitly
        (("--single-file",), "--single-file has no effect without --to onnx"),
        (("--no-kv-cache",), "--no-kv-cache has no effect without --to onnx"),
        (("--kv-cache",), "--kv-cache has no effect without --to onnx"),
        (("--xla",), "--xla has no effect without --to tf"),
        (("--opset", "17", "--xla"), "--opset has no effect without --to onnx; --xla has no effect without --to tf"),
    ],
)
def test_options_of_other_targets_are_refused(
    capsys: Any, tmp_path: Path, words: tuple[str, ...], named: str
) -> None:
    done = command(capsys, "openai-tf", OPENAI, "--to", "safetensors", *words, "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert named in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--max-shard-size", "5MB"), ("--max-shard-size", "5GB"), ("--xla",)])
def test_options_of_other_targets_are_refused_for_onnx(capsys: Any, words: tuple[str, ...]) -> None:
    done = command(capsys, "convert", OPENAI, *words, "--dry-run")
    assert done.code == 2
    assert f"{words[0]} has no effect without" in done.err


@pytest.mark.parametrize("words", [("--verify", "full"), ("--verify",), ("--verify", "default")])
def test_no_verify_contradicts_verify(capsys: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = command(capsys, "convert", OPENAI, "--no-verify", *words, "-o", tmp_path / "out")
    assert done.code == 2
    assert f"--no-verify contradicts --verify {'full' if 'full' in words else 'default'}" in done.err


def test_no_verify_overrides_the_environment(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCONVERT_CONVERT_VERIFY", "full")
    done = command(capsys, "convert", OPENAI, "--no-verify", "-o", tmp_path / "out", "--json")
    assert (done.code, done.json["verification"]) == (0, None)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (TINY / "hf-safetensors", ("--step", 10)),
        (TINY / "hf-safetensors", ("--n-head", 3)),
        (TINY / "hf-safetensors", ("--activation", "erf")),
        (OPENAI, ("--weights-file", "model.ckpt")),
        (OPENAI, ("--revision", "main")),
        (OPENAI, ("--pad-token-id", 3)),
        (OPENAI, ("--activation", "tanh")),
        (ORIGINALS / "nanogpt", ("--step", 10)),
        (ORIGINALS / "nanogpt", ("--hparams", OPENAI / "hparams.json")),
        (ORIGINALS / "nanogpt" / "ckpt.pt", ("--weights-file", "ckpt.pt")),
        (ORIGINALS / "llmc" / "gpt2_fp32.bin", ("--n-head", 3)),
        (ORIGINALS / "mesh-jax", ("--n-head", 3)),
        (ORIGINALS / "mesh-tf", ("--weights-file", "x")),
        (ORIGINALS / "neox-pipeline", ("--activation", "tanh")),
        (ORIGINALS / "megatron", ("--hparams", OPENAI / "hparams.json")),
    ],
)
@pytest.mark.parametrize("name", ["convert", "inspect"])
def test_options_of_other_formats_are_refused(
    capsys: Any, name: str, source: Path, words: tuple[object, ...]
) -> None:
    done = command(capsys, name, source, *words, *(("--dry-run",) if name == "convert" else ()))
    assert (done.code, done.out) == (2, "")
    assert str(words[0]) in done.err


@pytest.mark.parametrize(
    ("name", "flag"), [("hf", "--n-head"), ("hf", "--step"), ("neox", "--offline"), ("llmc", "--hparams")]
)
def test_format_command_rejects_options_of_other_formats(capsys: Any, name: str, flag: str) -> None:
    done = command(capsys, name, OPENAI, flag, 1)
    assert done.code == 2
    assert "No such option" in done.err
    assert flag in done.err
    assert flag not in command(capsys, name, "--help").out


def test_trim_vocab_beyond_the_vocabulary(capsys: Any) -> None:
    done = command(capsys, "nanogpt", ORIGINALS / "nanogpt", "--trim-vocab", 98, "--dry-run")
    assert done.code == 2
    assert "--trim-vocab 98" in done.err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_grouped_and_fits_80_columns(capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = command(capsys, name, "--help").out
    assert "Options:" not in text
    titles = [line[:-1] for line in text.splitlines() if line[:-1] in GROUPS and line.endswith(":")]
    assert titles == sorted(titles, key=GROUPS.index)
    assert titles[-1] == DISPLAY
    assert max(map(len, text.splitlines())) <= 80


def test_help_shows_defaults_and_one_word_per_kind_of_value(capsys: Any) -> None:
    text = " ".join(command(capsys, "convert", "--help").out.split())
    for part in (
        "--opset N Write this ONNX operator set, 17 to 21. [default: 21]",
        "[default: 5GB for safetensors, none for GGUF]",
        "[default: as stored]",
        "--no-verify Skip verification.",
        "--strict Treat notes as errors.",
        "token-classification",
    ):
        assert part in text


def test_sections_hold_the_options_of_the_table(capsys: Any) -> None:
    text = command(capsys, "convert", "--help").out
    sections = {part.split(":\n")[0]: part for part in text.split("\n\n")}
    for info in INFO.values():
        assert f"  {info.flag}" in sections[info.group], info.flag


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_does_not_import_heavy_libraries(name: str) -> None:
    code = (
        f"import sys\nfrom gptconvert.cli import run\nrun([{name!r}, '--help'])\n"
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime', 'tensorflow', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(','.join(heavy) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("3kib", 3072)]
)
def test_sizes(text: str, size: int) -> None:
    from gptconvert.cli.options import size_in_bytes

    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "5TB", "1e400", "nan", "lots"])
def test_invalid_sizes(text: str) -> None:
    from gptconvert.cli.options import size_in_bytes

    with pytest.raises(click.BadParameter):
        size_in_bytes(text)


@pytest.mark.parametrize(
    "words",
    [
        ("convert", ""),
        ("convert", "{source}", "-o", ""),
        *(("convert", "{source}", f"--{flag}", "") for flag in ("hparams", "revision", "cache-dir", "weights-file")),
        *(("convert", "{source}", f"--{flag}", "") for flag in ("adapter", "base", "ignore-key", "set", "task")),
        ("verify", "{source}", ""),
        ("generate", "", "x"),
    ],
)
def test_empty_text_is_refused(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """From ``-o "$OUT"`` in a script that never set OUT."""
    monkeypatch.chdir(tmp_path)
    done = command(capsys, *(word.replace("{source}", str(TINY / "openai-tf")) for word in words))
    assert done.code == 2
    assert "the text is empty" in done.err or "--task" in done.err
    assert not list(tmp_path.iterdir())


def test_the_path_of_a_checkpoint_instead_of_a_command(capsys: Any) -> None:
    done = command(capsys, TINY / "openai-tf", "--to", "onnx")
    assert done.code == 2
    assert f"gptconvert convert {TINY / 'openai-tf'}" in done.err


@pytest.mark.parametrize("arguments", [("convert",), ("verify",)])
def test_probes_of_a_seed(capsys: Any, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    source, out = TINY / "openai-tf", tmp_path / "out"
    seeded = ("--seed", "7") if arguments == ("convert",) else ("--no-verify",)
    done = command(capsys, "convert", source, "-o", out, "--json", *seeded)
    if arguments == ("verify",):
        done = command(capsys, "verify", source, out / "onnx" / "model.onnx", "--json", "--seed", "7")
    assert done.code == 0
    groups = {group["group"] for group in done.json["verification"]["artifacts"][0]["runs"][0]["groups"]}
    assert {"random 1", "random 2", "random 3"} <= groups
