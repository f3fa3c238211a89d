"""``--force`` names the files that it deletes and that no conversion wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptconvert.publish.replaceable import deletion_notes
from tests.commands import TRAINED, command, tree

CONVERT = ("convert", TRAINED, "--no-verify", "--force")


@pytest.mark.parametrize("name", ["notes.txt", "onnx/other.onnx", ".git/HEAD", "checkpoint-500/model.safetensors"])
def test_files_of_others_are_named(capsys: Any, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    assert command(capsys, *CONVERT, "-o", output).code == 0
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("precious")
    before = tree(output)
    note = f"--force deletes files in the output that gptconvert did not write: {name}"
    assert note in command(capsys, *CONVERT, "-o", output, "--dry-run", "--json").json["notes"]
    for words in (("--strict",), ("--strict", "--dry-run")):
        assert note in command(capsys, *CONVERT, "-o", output, *words).err
    assert tree(output) == before
    assert note in command(capsys, *CONVERT, "-o", output, "--json").json["notes"]


def test_many_files_are_abbreviated(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"weights{number}.bin").write_text("precious")
    (note,) = deletion_notes(str(tmp_path))
    assert note.count(".bin") == 5
    assert note.endswith("…")


def test_outputs_are_replaced_without_a_note(capsys: Any, tmp_path: Path) -> None:
    """Also after an edit, and with what a desktop adds."""
    output = tmp_path / "out"
    assert command(capsys, *CONVERT, "-o", output, "--to", "onnx,safetensors,tf").code == 0
    (output / "README.md").write_text("edited")
    (output / "onnx" / ".DS_Store").write_text("x")
    (output / "empty").mkdir()
    assert deletion_notes(str(output)) == ()
    assert deletion_notes(str(tmp_path / "nothing")) == ()
    assert command(capsys, *CONVERT, "-o", output, "--strict").code == 0
    assert not (output / "model.safetensors").exists()


def test_links_to_directories_count(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    assert "link" in deletion_notes(str(tmp_path / "out"))[0]
