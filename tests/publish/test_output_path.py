"""Outputs refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptconvert.errors import OutputError
from gptconvert.publish.staging import Staging
from tests.publish.cases import names, publish


class TestRefusals:
    """Refusals come from the constructor, before anything is written."""

    @pytest.fixture(autouse=True)
    def _untouched(self, tmp_path: Path) -> Iterator[None]:
        yield
        assert not [path for path in tmp_path.rglob("*") if "gptconvert" in path.name]

    def refused(self, output: Path | str, why: str, **options: object) -> None:
        with pytest.raises(OutputError, match=why) as caught:
            Staging(output, **options)  # type: ignore[arg-type]
        assert caught.value.exit_code == 6
        assert caught.value.hint

    @pytest.mark.parametrize("force", [False, True])
    def test_files_links_and_devices(self, tmp_path: Path, old: Path, force: bool) -> None:
        (tmp_path / "file").write_bytes(b"")
        (tmp_path / "link").symlink_to(old)
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / "fifo")
        for output in ("file", "fifo"):
            self.refused(tmp_path / output, "is not a directory", force=force)
        self.refused("/dev/null", "is not a directory", force=force)
        for output in ("link", "dangling"):
            self.refused(tmp_path / output, "symbolic link", force=force)

    def test_a_full_directory_needs_force_an_empty_one_does_not(self, tmp_path: Path, old: Path) -> None:
        self.refused(old, "not empty")
        (tmp_path / "empty").mkdir()
        publish(tmp_path / "empty")
        assert names(tmp_path / "empty") == ["file"]

    @pytest.mark.parametrize("force", [False, True])
    def test_mount_points_and_the_current_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
    ) -> None:
        self.refused("/", "mount point", force=force)
        self.refused("/proc", "mount point", force=force)
        (tmp_path / "here" / "inside").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here" / "inside")
        self.refused(".", "current directory", force=force)
        self.refused(tmp_path / "here", "current directory", force=True)

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        self.refused(tmp_path / "file" / "out", "not a directory")
        self.refused(tmp_path / "file" / "a" / "out", "not a directory")

    def test_an_unwritable_parent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
        self.refused(tmp_path / "out", "is not writable")

    @pytest.mark.parametrize("force", [False, True])
    def test_outputs_that_touch_an_input(self, tmp_path: Path, force: bool) -> None:
        source = tmp_path / "source"
        (source / "deep").mkdir(parents=True)
        weights = source / "deep" / "weights"
        weights.write_bytes(b"w")
        (tmp_path / "way").symlink_to(source)
        for output, inputs, why in [
            (source, [source], "is the input"),
            (source / "out", [source], "is inside the input"),
            (source / "deep" / "a" / "out", [source], "is inside the input"),
            (tmp_path / "way" / "out", [source], "is inside the input"),
            (source / "out", [tmp_path / "way"], "is inside the input"),
        ]:
            self.refused(output, why, inputs=[str(path) for path in inputs], force=force)
        for output, inputs in [(source, [weights]), (source / "deep", [weights]), (source, [source / "deep"])]:
            self.refused(output, "contains the input", inputs=[str(path) for path in inputs], force=True)
        assert weights.read_bytes() == b"w"

    def test_outputs_that_contain_an_input_by_a_link(self, tmp_path: Path) -> None:
        """As in a hub cache, which stores the name in one directory and the bytes in another."""
        for directory in ("names", "blobs", "other"):
            (tmp_path / directory).mkdir()
        (tmp_path / "blobs" / "b1").write_bytes(b"w")
        (tmp_path / "names" / "weights").symlink_to(tmp_path / "blobs" / "b1")
        (tmp_path / "other" / "x").write_bytes(b"x")
        inputs = [str(tmp_path / "names" / "weights")]
        self.refused(tmp_path / "names", "contains the input", inputs=inputs, force=True)
        self.refused(tmp_path / "blobs", "contains the input", inputs=inputs, force=True)
        publish(tmp_path / "other", inputs=inputs, force=True)

    def test_an_output_beside_an_input_file_is_fine(self, tmp_path: Path) -> None:
        (tmp_path / "weights").write_bytes(b"w")
        publish(tmp_path / "out", inputs=[str(tmp_path / "weights"), str(tmp_path / "missing")])
        assert names(tmp_path) == ["out", "weights"]
