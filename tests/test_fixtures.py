"""Rebuilding fixtures: complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.make import PARTS, main, replacing
from tests.commands import tree


def test_a_rebuilt_folder_replaces_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    with replacing(folder) as new:
        (new / "new").write_text("new")
        assert tree(folder) == {"old": b"old"}
    assert tree(tmp_path) == {"model/new": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_rebuild_keeps_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(error), replacing(folder) as new:
        (new / "half").write_text("half")
        raise error
    assert tree(tmp_path) == {"model/old": b"old"}
    (tmp_path / ".model.new").mkdir()  # left behind by a killed run
    with replacing(folder):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainde"]) == 2
    shown = capsys.readouterr().err
    assert all(part in shown for part in PARTS)
