"""Staging: atomic publication, cleanup, and one process at a time per output."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptconvert.errors import OutputError
from gptconvert.publish import staging as staging_module
from gptconvert.publish.file_system import OS
from gptconvert.publish.staging import Staging, clean_up_again
from tests.helpers import ROOT
from tests.publish.cases import names, publish
from tests.publishing import failing, file_system


@pytest.fixture(autouse=True)
def _nothing_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test leaves on purpose is not tried again in later tests."""
    monkeypatch.setattr(staging_module, "_unfinished", [])


def test_publishes_only_the_output(tmp_path: Path) -> None:
    publish(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_bytes() == b"new"


def test_stages_beside_the_target_which_appears_only_when_published(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        assert Path(staging.path).parent == tmp_path
        assert re.fullmatch(r"\.out\.gptconvert-[0-9a-f]{6}", Path(staging.path).name)
        assert not (tmp_path / "out").exists()
        staging.publish()
    assert (tmp_path / "out").is_dir()


def test_leaving_without_publishing_publishes_nothing(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        (Path(staging.path) / "file").write_bytes(b"new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("force", [False, True])
def test_any_exception_leaves_everything_unchanged(
    tmp_path: Path, error: type[BaseException], force: bool, request: pytest.FixtureRequest
) -> None:
    output = request.getfixturevalue("old") if force else tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error), Staging(output, force=force) as staging:
        (Path(staging.path) / "deep").mkdir()
        (Path(staging.path) / "deep" / "file").write_bytes(b"new")
        raise error
    assert sorted(tmp_path.rglob("*")) == before


def test_everything_is_synced_before_it_is_visible(tmp_path: Path) -> None:
    """Sync files, then their directories; rename; then sync the output's parent directory."""
    done: list[str] = []

    def sync_path(path: str) -> None:
        done.append(path)
        OS.sync_path(path)

    def rename(source: str, target: str) -> None:
        done.append("rename")
        OS.rename(source, target)

    with Staging(tmp_path / "a" / "out", file_system=file_system(sync_path=sync_path, rename=rename)) as staging:
        (Path(staging.path) / "deep").mkdir()
        (Path(staging.path) / "deep" / "file").write_bytes(b"new")
        (Path(staging.path) / "file").write_bytes(b"new")
        staging.publish()
    staged = [staging.path + tail for tail in ("/deep/file", "/deep", "/file", "")]
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert before[:4] == staged
    assert before[4:] == [str(tmp_path)]  # contains the entry of the new parent
    assert sorted(after) == [str(tmp_path), str(tmp_path / "a")]


@pytest.mark.parametrize(("umask", "directory", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, directory: int, file: int) -> None:
    before = os.umask(umask)
    try:
        with Staging(tmp_path / "a" / "out") as staging:
            os.close(OS.create(os.path.join(staging.path, "file")))
            staging.publish()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == directory
    assert stat.S_IMODE((tmp_path / "a" / "out").stat().st_mode) == directory
    assert stat.S_IMODE((tmp_path / "a" / "out" / "file").stat().st_mode) == file


def test_lack_of_free_space_is_reported_in_bytes(tmp_path: Path) -> None:
    free = 40_000
    with Staging(tmp_path / "a" / "out", file_system=file_system(free_bytes=lambda path: free)) as staging:
        staging.require_space(int(free / 1.03))
        with pytest.raises(OutputError, match=f"expected {free * 102 // 100} bytes, found {free} bytes"):
            staging.require_space(free)


class TestParents:
    def test_are_made_when_publishing(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "a" / "b" / "out") as staging:
            assert Path(staging.path).parent == tmp_path
            assert not (tmp_path / "a").exists()
            staging.publish()
        assert names(tmp_path) == ["a"]
        assert names(tmp_path / "a" / "b") == ["out"]

    def test_are_not_made_otherwise(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "a" / "b" / "out"):
            pass
        assert names(tmp_path) == []

    def test_outputs_of_the_same_name_do_not_lock_each_other_out(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "a" / "out") as first, Staging(tmp_path / "b" / "out") as second:
            first.publish()
            second.publish()
        assert names(tmp_path) == ["a", "b"]

    def test_outputs_with_escaped_names_do_not_lock_each_other_out(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "a" / "out") as first, Staging(tmp_path / "a%2Fout") as second:
            first.publish()
            second.publish()
        assert names(tmp_path) == ["a", "a%2Fout"]

    def test_leftovers_from_before_the_parents_existed_are_removed(self, tmp_path: Path) -> None:
        first = Staging(tmp_path / "a" / "out")
        first.__enter__()
        os.close(first._lock)  # type: ignore[arg-type]  # as the kernel does when a process is killed
        (tmp_path / "a").mkdir()
        publish(tmp_path / "a" / "out")
        assert names(tmp_path) == ["a"]

    def test_made_by_another_run_in_the_meantime(self, tmp_path: Path) -> None:
        def make(path: str) -> None:
            if path == str(tmp_path / "a"):
                OS.make_directory(path)
            OS.make_directory(path)

        publish(tmp_path / "a" / "b" / "out", file_system=file_system(make_directory=make))
        assert names(tmp_path) == ["a"]
        assert names(tmp_path / "a" / "b") == ["out"]

    def test_a_file_in_the_place_of_a_parent_is_an_error(self, tmp_path: Path) -> None:
        def make(path: str) -> None:
            if path == str(tmp_path / "a"):
                (tmp_path / "a").touch()
            OS.make_directory(path)

        with pytest.raises(OutputError, match="File exists"):
            publish(tmp_path / "a" / "out", file_system=file_system(make_directory=make))
        assert names(tmp_path) == ["a"]

    def test_stay_if_another_run_has_published_in_them(self, tmp_path: Path) -> None:
        def rename(before: str, after: str) -> None:
            publish(tmp_path / "a" / "other")
            raise OSError(errno.EIO, "failed")

        with (
            pytest.raises(OutputError, match="cannot be published"),
            Staging(tmp_path / "a" / "out", file_system=file_system(rename=rename)) as staging,
        ):
            staging.publish()
        assert staging.discard() == []
        assert names(tmp_path) == ["a"]
        assert names(tmp_path / "a") == ["other"]


class TestForce:
    @pytest.fixture(params=["exchange", "two renames"])
    def operations(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        """Replaced operations of the file system."""
        return {"exchange": failing(errno.EINVAL)} if request.param == "two renames" else {}

    def test_replaces_and_never_merges(self, tmp_path: Path, old: Path, operations: dict[str, Any]) -> None:
        publish(old, force=True, file_system=file_system(**operations))
        assert names(old) == ["file"]
        assert names(tmp_path) == ["out"]

    def test_keeps_the_old_output_until_the_new_one_is_complete(self, old: Path, operations: dict[str, Any]) -> None:
        with Staging(old, force=True, file_system=file_system(**operations)) as staging:
            (Path(staging.path) / "file").write_bytes(b"new")
            assert (old / "sub" / "old").read_bytes() == b"old"
            staging.publish()
            assert names(old) == ["file"]

    def test_notes_that_the_old_output_cannot_be_removed(self, old: Path, operations: dict[str, Any]) -> None:
        stuck = file_system(**operations, remove_tree=failing(errno.EACCES))
        staging = publish(old, force=True, file_system=stuck)
        assert names(old) == ["file"]
        assert "could not be removed" in staging.notes[0]


class TestWithoutForce:
    def test_output_that_appears_during_the_run_is_not_replaced(self, tmp_path: Path) -> None:
        output = tmp_path / "out"
        with pytest.raises(OutputError, match="cannot be published"), Staging(output) as staging:
            output.mkdir()
            (output / "other").write_bytes(b"other")
            staging.publish()
        assert names(tmp_path) == ["out"]
        assert names(output) == ["other"]

    def test_link_that_appears_during_the_run_is_not_followed(self, tmp_path: Path, old: Path) -> None:
        output = tmp_path / "new"
        with pytest.raises(OutputError, match="cannot be published"), Staging(output, force=True) as staging:
            output.symlink_to(old)
            staging.publish()
        assert names(old) == ["sub"]
        assert names(tmp_path) == ["new", "out"]


class TestCrashes:
    def test_stale_directories_of_this_output_go_and_no_others(self, tmp_path: Path) -> None:
        keep = [
            ".other.gptconvert-0123ab",
            ".out.gptconvert-keepme",
            "out.gptconvert-0123ab",
            ".out.gptconvertX0123ab",
        ]
        for name in (".out.gptconvert-0123ab", *keep):
            (tmp_path / name / "deep").mkdir(parents=True)
        publish(tmp_path / "out")
        assert names(tmp_path) == sorted([*keep, "out"])

    def test_an_output_set_aside_by_a_crash_comes_back(self, tmp_path: Path, old: Path) -> None:
        old.rename(tmp_path / ".out.gptconvert-replaced")
        with pytest.raises(OutputError, match="not empty"):
            publish(old)
        assert names(tmp_path) == ["out"]
        assert (old / "sub" / "old").read_bytes() == b"old"

    def test_replaced_output_set_aside_is_removed(self, tmp_path: Path, old: Path) -> None:
        (tmp_path / ".out.gptconvert-replaced").mkdir()
        publish(old, force=True)
        assert names(tmp_path) == ["out"]


class TestLeftovers:
    """What cannot be removed is named, does not block later runs, and is tried again at exit."""

    def test_that_cannot_be_removed_is_a_note(self, tmp_path: Path) -> None:
        (tmp_path / ".out.gptconvert-0123ab" / "deep").mkdir(parents=True)
        staging = publish(tmp_path / "out", file_system=file_system(remove_tree=failing(errno.EACCES)))
        (note,) = staging.notes
        assert ".out.gptconvert-0123ab" in note
        assert "Permission denied" in note
        assert (tmp_path / "out" / "file").exists()

    def test_of_this_run_is_named_and_removed_at_exit(self, tmp_path: Path) -> None:
        stuck = file_system(remove_tree=failing(errno.EACCES))
        with pytest.raises(ZeroDivisionError) as caught, Staging(tmp_path / "out", file_system=stuck) as staging:
            raise ZeroDivisionError
        assert caught.value.__notes__ == [f"could not be removed: {staging.path} (Permission denied)"]
        assert f"{staging.path} (Permission denied)" in clean_up_again()
        stuck.remove_tree = OS.remove_tree  # type: ignore[method-assign]
        assert f"{staging.path} (Permission denied)" not in clean_up_again()
        assert names(tmp_path) == []

    def test_a_lock_file_that_cannot_be_removed_is_a_note(self, tmp_path: Path) -> None:
        staging = publish(tmp_path / "out", file_system=file_system(remove_file=failing(errno.EACCES)))
        assert staging.notes == [f"could not be removed: {tmp_path}/.out.gptconvert.lock (Permission denied)"]
        publish(tmp_path / "out", force=True)
        assert names(tmp_path) == ["out"]

    def test_an_old_output_that_cannot_be_moved_back_is_named(self, tmp_path: Path, old: Path) -> None:
        old.rename(tmp_path / ".out.gptconvert-replaced")
        with pytest.raises(OutputError, match="could not be moved back") as caught:
            publish(old, file_system=file_system(rename=failing(errno.EIO)))
        assert ".out.gptconvert-replaced" in str(caught.value.hint)

    def test_a_file_system_without_locks_gets_no_lock_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fcntl.flock", failing(errno.ENOLCK))
        with pytest.raises(OutputError, match="cannot be prepared"):
            publish(tmp_path / "out")
        assert names(tmp_path) == []


def test_errors_name_the_output_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError) as caught, Staging("out") as staging:
        raise OutputError("cannot be written", path=os.path.join(staging.path, "onnx", "model.onnx"))
    assert caught.value.path == "out/onnx/model.onnx"


HOLD = """
import sys
from gptconvert.publish.staging import Staging
with Staging(sys.argv[1]) as staging:
    print("holding", flush=True)
    sys.stdin.readline()
    staging.publish()
"""


class TestLock:
    @pytest.fixture
    def holder(self, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "holding\n"
            yield process
            process.kill()

    def test_the_second_process_names_the_first(self, tmp_path: Path, holder: subprocess.Popen[str]) -> None:
        with pytest.raises(OutputError, match=f"locked by pid {holder.pid}") as caught:
            publish(tmp_path / "out")
        assert caught.value.exit_code == 6
        holder.communicate("go\n")
        assert holder.returncode == 0
        assert names(tmp_path) == ["out"]

    def test_killed_process_does_not_hold_the_lock(self, tmp_path: Path, holder: subprocess.Popen[str]) -> None:
        holder.kill()
        holder.wait()
        assert len(names(tmp_path)) == 2  # its staging directory and its lock file
        publish(tmp_path / "out")
        assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["x" * 255, "a\nb", "with space", "50%2F", "ü" * 127])
def test_any_valid_file_name(tmp_path: Path, name: str) -> None:
    publish(tmp_path / name)
    assert names(tmp_path) == [name]


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    output = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    publish(Path(output))
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff\xfe"]


def test_too_long_a_name_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a\\nx"), Staging(tmp_path / ("a\n" + "x" * 300)) as staging:
        staging.publish()
    assert names(tmp_path) == []
