"""The JSON object on stdout: one schema version, readable in every encoding."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptconvert.cli.output import Progress, print_json
from gptconvert.model import schema
from tests.commands import TINY, TRAINED, command


def test_json_and_manifest_have_the_same_schema_version(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    done = command(capsys, "openai-tf", TRAINED, "-o", out, "--no-verify", "--json")
    written = [
        done.json,
        json.loads((out / "manifest.json").read_text()),
        command(capsys, "inspect", TRAINED, "--json").json,
        command(capsys, "formats", "--json").json,
        command(capsys, "generate", out, "Objects", "--max-new-tokens", 1, "--json").json,
        command(capsys, "inspect", tmp_path / "nothing", "--json").json,
        command(capsys, "inspect", "--nonsense", "--json").json,
    ]
    assert {document["schema_version"] for document in written} == {schema.SCHEMA_VERSION}


def test_json_is_ascii(capsys: Any) -> None:
    print_json({"text": "µ – \udcff"})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == {"schema_version": schema.SCHEMA_VERSION, "text": "µ – \udcff"}


def test_file_name_that_is_not_utf8_still_gives_one_object(tmp_path: Path) -> None:
    args = [sys.executable, "-m", "gptconvert", "inspect", bytes(tmp_path) + b"/\xff", "--json"]
    done = subprocess.run(args, capture_output=True)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["error"]["file"].endswith("/\udcff")


def test_errors_have_the_documented_keys(capsys: Any, tmp_path: Path) -> None:
    error = command(capsys, "inspect", tmp_path / "nothing", "--json").json["error"]
    assert list(error) == ["kind", "exit_code", "message", "file", "tensor", "expected", "found", "hint"]


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_shows_every_probe_group(capsys: Any, tmp_path: Path, verbose: bool) -> None:
    flags = ("-v",) if verbose else ()
    converted = command(capsys, "convert", TINY / "openai-tf", "-o", tmp_path / "out", *flags)
    verified = command(capsys, "verify", TINY / "openai-tf", tmp_path / "out", *flags)
    assert (converted.code, verified.code) == (0, 0)
    for text in (converted.out, verified.out):
        assert ("max|Δ|" in text) == verbose
        assert ("probe groups within noise, worst R" in text) != verbose


def test_a_failed_verification_shows_every_probe_group(capsys: Any, tmp_path: Path) -> None:
    command(capsys, "convert", TINY / "openai-tf", "-o", tmp_path / "out", "--no-verify")
    failed = command(capsys, "verify", TINY / "openai-tf-bf16", tmp_path / "out")
    assert failed.code == 5
    assert "probe groups within noise" not in failed.out
    assert failed.out.rstrip().endswith("VERIFICATION FAILED")


def test_a_failed_verification_has_an_error_in_json(capsys: Any, tmp_path: Path) -> None:
    command(capsys, "convert", TINY / "openai-tf", "-o", tmp_path / "out", "--no-verify")
    failed = command(capsys, "verify", TINY / "openai-tf-bf16", tmp_path / "out", "--json")
    assert (failed.code, failed.json["ok"], failed.json["error"]["exit_code"]) == (5, False, 5)
    assert failed.json["verification"]["passed"] is False
    passed = command(capsys, "verify", TINY / "openai-tf", tmp_path / "out", "--json")
    assert passed.json["ok"]
    assert "error" not in passed.json


def test_lists_fit_80_columns(capsys: Any) -> None:
    for line in command(capsys, "formats").out.splitlines():
        assert len(line) <= 80, line


@pytest.mark.parametrize(("total", "shown"), [(9, "4 of 9"), (3_000_000, "of 3.00MB"), (0, "[00:00")])
def test_progress_fits_80_columns(monkeypatch: pytest.MonkeyPatch, total: int, shown: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(quiet=False)
    progress.stage("running onnxruntime, default options", total)
    progress.advance(4)
    progress.bar.ncols, progress.bar.dynamic_ncols = 80, None
    text = str(progress.bar)
    progress.close()
    assert len(text) <= 80
    assert shown in text
    assert ("|" in text) == (total > 0)


def test_strict_verification_refuses_notes(capsys: Any, tmp_path: Path) -> None:
    command(capsys, "convert", TINY / "openai-tf", "-o", tmp_path / "out", "--no-verify")
    arguments = ("verify", TINY / "openai-tf", tmp_path / "out", "--strict")
    assert command(capsys, *arguments).code == 0
    (tmp_path / "out" / "README.md").write_text("edited")
    done = command(capsys, *arguments)
    assert (done.code, done.out) == (3, "")
    assert "README.md was edited after SHA256SUMS was written" in done.err
