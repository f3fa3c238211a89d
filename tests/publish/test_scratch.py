"""Scratch directories: removed at the end, or, after their process was killed, by a later run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gptconvert.publish.scratch import PREFIX, Scratch, remove_abandoned
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_removed_with_its_content(temporary: Path) -> None:
    with Scratch() as directory:
        (Path(directory) / "file").write_bytes(b"1")
        assert Path(directory).parent == temporary
    assert not list(temporary.iterdir())


def test_one_in_use_stays(temporary: Path) -> None:
    with Scratch() as directory:
        remove_abandoned()
        assert os.path.isdir(directory)


def test_one_of_a_killed_process_is_removed(temporary: Path) -> None:
    code = "import os, signal; from gptconvert.publish.scratch import Scratch; s = Scratch(); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(temporary)})
    assert done.returncode == -signal.SIGKILL
    assert len(list(temporary.iterdir())) == 1
    remove_abandoned()
    assert not list(temporary.iterdir())


def test_links_and_other_names_are_left_alone(temporary: Path) -> None:
    mine = temporary / "mine"
    mine.mkdir()
    (mine / "file").touch()
    (temporary / f"{PREFIX}link").symlink_to(mine)
    remove_abandoned()
    assert (mine / "file").exists()
    assert (temporary / f"{PREFIX}link").is_symlink()
