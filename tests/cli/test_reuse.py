"""``--reuse``: an output that is up to date is kept, with its reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import TINY, command, tree
from tests.reporting.runs import valid

SOURCE = TINY / "hf-safetensors"


@pytest.fixture
def output(tmp_path: Path, capsys: Any) -> Path:
    """A verified output with its report."""
    done = command(capsys, *words(tmp_path), "--report", tmp_path / "r.md")
    assert done.code == 0, done.err
    return tmp_path / "out"


def words(directory: Path, *more: object) -> tuple[object, ...]:
    return ("hf", SOURCE, "--to", "safetensors", "-o", directory / "out", *more)


def states(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_an_output_that_is_up_to_date_is_kept(output: Path, tmp_path: Path, capsys: Any) -> None:
    before = states(tmp_path)
    done = command(capsys, *words(tmp_path, "--reuse", "--force", "--report", tmp_path / "r.md"))
    assert (done.code, done.out) == (0, f"{output} is up to date\n")
    assert states(tmp_path) == before
    found = valid("convert", command(capsys, *words(tmp_path, "--reuse", "--json")).json)
    assert found["verification"]["passed"] is True
    assert found["source"]["files"] == json.loads((output / "manifest.json").read_text())["source"]["files"]
    assert states(tmp_path) == before


def test_an_output_that_is_not_there_is_written(tmp_path: Path, capsys: Any) -> None:
    assert command(capsys, *words(tmp_path, "--reuse", "--no-verify")).code == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--dtype", "bf16"), "its options differ: dtype"),
        (("--no-verify",), "its options differ: verify"),
        (("--report", "new.md"), "new.md is missing"),
    ],
)
def test_any_other_output_is_replaced_only_by_force(
    output: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(output)
    done = command(capsys, *words(tmp_path, "--reuse", *options))
    assert done.code == 6
    assert f"note: {output} is not up to date: {reason}" in done.err
    assert tree(output) == before
    assert command(capsys, *words(tmp_path, "--reuse", "--force", *options)).code == 0
    assert reason == "new.md is missing" or tree(output) != before


def test_a_damaged_output_is_replaced(output: Path, tmp_path: Path, capsys: Any) -> None:
    before = tree(output)
    (output / "config.json").write_text("{}")
    done = command(capsys, *words(tmp_path, "--reuse", "--force"))
    assert done.code == 0
    assert "config.json was changed after it was published" in done.err
    assert tree(output) == before
