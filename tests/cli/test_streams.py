"""Standard streams that are closed, full, in another encoding, or read by a program that ends first; signals."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptconvert.errors import InputError, OutputError
from gptconvert.publish.signals import Interrupted
from tests.commands import REPOSITORY, TINY, Outcome, command

MODULE = [sys.executable, "-m", "gptconvert"]
CONVERT = ("convert", str(TINY / "openai-tf"), "--no-verify")


def shell(line: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which $G stands for gptconvert."""
    known = {**os.environ, "PYTHONPATH": str(REPOSITORY), "G": " ".join(MODULE), **environment}
    return subprocess.run(["bash", "-c", line], cwd=directory, env=known, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """As under a service manager. The files of the output must not take the closed descriptors."""
    done = shell(f"$G {' '.join(CONVERT)} -o out {closed}", tmp_path)
    assert done.returncode == 0
    check = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", check=False)
    assert check.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
@pytest.mark.parametrize("words", [(), ("--json",)])
def test_full_stdout_is_not_a_bug(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = shell(f"$G {' '.join((*CONVERT, *words))} -o out >/dev/full", tmp_path)
    assert done.returncode == 6
    assert "error: stdout cannot be written (No space left on device)" in done.stderr
    assert "bug" not in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "SHA256SUMS").is_file()


def test_a_reader_that_ends_first(tmp_path: Path) -> None:
    """Later writes fail: with --json, one large object."""
    done = shell("$G inspect " + str(TINY / "openai-tf") + " --json | true; echo ${PIPESTATUS[0]}", tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_encodings_that_lack_a_character(tmp_path: Path) -> None:
    done = shell(f"$G inspect {TINY / 'openai-tf'} --no-tensors", tmp_path, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert "divided by ?" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_prints_its_json(capsys: Any, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise Interrupted(number)

    monkeypatch.setattr("gptconvert.pipeline.convert", interrupted)
    done = command(capsys, *CONVERT, "--json")
    assert done.code == 128 + number
    assert done.json["error"]["kind"] == "interrupted"
    assert done.json["error"]["exit_code"] == done.code
    assert "nothing was published" in done.err


@pytest.mark.parametrize("error", [InputError("cannot be loaded"), ImportError("initialization failed")])
def test_a_signal_that_a_library_turned_into_an_error(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def loading(*args: object, **kwargs: object) -> None:
        with contextlib.suppress(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        raise error

    monkeypatch.setattr("gptconvert.pipeline.convert", loading)
    done = command(capsys, *CONVERT)
    assert (done.code, "interrupted; nothing was published" in done.err) == (143, True), done.err


def test_interrupted_outside_a_conversion(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptconvert.inspection.inspect", interrupted)
    done = command(capsys, "inspect", TINY / "openai-tf", "--json")
    assert (done.code, done.json["error"]["message"]) == (130, "interrupted")


@pytest.mark.parametrize(
    ("number", "message", "hint"),
    [
        (errno.EMFILE, "too many open files", "ulimit -n"),
        (errno.ENFILE, "too many open files", "ulimit -n"),
        (errno.ENOMEM, "out of memory", "more memory"),
        (errno.ENOSPC, "No space left on device", "free some space"),
        (errno.EDQUOT, "Disk quota exceeded", "quota"),
    ],
)
def test_limits_of_the_system_are_not_bugs(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, number: int, message: str, hint: str
) -> None:
    done = _failing(capsys, monkeypatch, OSError(number, os.strerror(number), "some/file"))
    assert done.code == 6
    assert f"some/file: {message}" in done.err
    assert hint in done.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object", name="torch"),
    ],
)
def test_exhausted_memory_is_an_output_error(capsys: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    done = _failing(capsys, monkeypatch, error)
    assert done.code == 6
    assert "error: out of memory" in done.err


def test_a_limit_that_stops_reading_is_not_a_fault_of_the_input(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = InputError("cannot be read", path="some/file")
    error.__cause__ = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    done = _failing(capsys, monkeypatch, error)
    assert done.code == 6
    assert "some/file: too many open files; found a limit of" in done.err


def test_a_limit_does_not_hide_that_the_output_is_published(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OutputError("is published, but could not be synced to disk", path="some/out", hint="check the disk")
    error.__cause__ = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    done = _failing(capsys, monkeypatch, error)
    assert done.code == 6
    assert "some/out: is published" in done.err
    assert "hint: out of memory" in done.err


def test_a_damaged_file_that_states_huge_sizes_is_one(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = InputError("cannot be read", path="some/file")
    error.__cause__ = MemoryError()
    assert _failing(capsys, monkeypatch, error).code == 3


def _failing(capsys: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Outcome:
    def failing(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("gptconvert.inspection.inspect", failing)
    done = command(capsys, "inspect", TINY / "openai-tf")
    assert "bug" not in done.err
    return done
