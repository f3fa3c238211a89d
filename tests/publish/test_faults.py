"""Make every file operation fail, fall short, and be the last one before a crash."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptconvert.errors import GptConvertError, InputError, OutputError
from gptconvert.publish.staging import clean_up_again
from tests.helpers import ROOT
from tests.publishing import OLD, SCENARIOS, FaultyFileSystem, convert, leftovers, prepare, tree

#: If one of these fails, files are left behind, and the next run must remove them.
CLEAN_UP = {"remove", "unlink", "rmdir"}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A directory in a memory file system where available, because the tests sync thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        yield Path(directory) / "root"


def _half(number: int, operation: str, nbytes: int) -> int:
    return max(1, nbytes // 2)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["enospc", "eio"])
def test_a_failing_operation_leaves_the_old_output_or_the_new_one(root: Path, scenario: str, code: int) -> None:
    checkpoint, output = prepare(root, scenario)
    convert(checkpoint, output)
    new, old = tree(output), OLD if SCENARIOS[scenario][1] else {}

    for n in itertools.count():
        checkpoint, output = prepare(root, scenario)

        def act(number: int, operation: str, nbytes: int, n: int = n) -> int:
            if number == n:
                raise OSError(code, os.strerror(code))
            return nbytes

        error: GptConvertError | None = None
        faulty = FaultyFileSystem(act, scenario)
        try:
            convert(checkpoint, output, faulty)
        except GptConvertError as caught:
            error = caught
        failed = faulty.seen[n] if n < len(faulty.seen) else None
        # Only inputs are opened and read; all other operations work on the output.
        expected = InputError if failed in ("open", "read") else OutputError
        if failed == "close" and error is None:
            continue  # of an input, which was read to the end
        assert error is None or isinstance(error, expected), (n, failed, error)
        assert tree(output) == (new if error is None else old), (n, failed, error)
        if failed is None:
            assert error is None
            break
        if failed == "exchange" and scenario == "replace-without-exchange":
            assert error is None  # always fails in this scenario; two renames replace it
        elif failed in CLEAN_UP:
            convert(checkpoint, output)
            assert tree(output) == new
        else:
            assert error is not None, (n, failed)
            assert os.strerror(code) in str(error)
        assert not leftovers(root), (n, failed)
    assert n > 40


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_everything_fails_from_some_operation_on(root: Path, scenario: str) -> None:
    """As on a disk that dies: the message is true, and names what is left; the next run removes it."""
    checkpoint, output = prepare(root, scenario)
    convert(checkpoint, output)
    new, old = tree(output), OLD if SCENARIOS[scenario][1] else {}
    for n in itertools.count():
        checkpoint, output = prepare(root, scenario)

        def act(number: int, operation: str, nbytes: int, n: int = n) -> int:
            if number >= n:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return nbytes

        message = ""
        faulty = FaultyFileSystem(act, scenario)
        try:
            convert(checkpoint, output, faulty)
        except GptConvertError as error:
            message = "; ".join((str(error), str(error.hint), *getattr(error, "__notes__", ())))
        if len(faulty.seen) <= n:
            break
        published = not message or "is published" in message
        aside = "could not be moved back" in message
        assert tree(output) == (new if published else {} if aside else old), (n, faulty.seen[n], message)
        for name in leftovers(root) if message else ():
            assert name.partition("/")[0] in message or name in ("a", "a/b"), (n, faulty.seen[n], message, name)
        faulty.act = lambda number, operation, nbytes: nbytes
        assert clean_up_again() == []
        assert aside or not leftovers(root), (n, faulty.seen[n])
        convert(checkpoint, output)
        assert tree(output) == new
        assert not leftovers(root), (n, faulty.seen[n])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_short_reads_writes_and_copies_change_nothing(root: Path, scenario: str) -> None:
    checkpoint, output = prepare(root, scenario)
    convert(checkpoint, output)
    new = tree(output)

    checkpoint, output = prepare(root, scenario)
    convert(checkpoint, output, FaultyFileSystem(_half, scenario))

    assert tree(output) == new
    assert not leftovers(root)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_at_any_operation_leaves_the_old_output_or_the_new_one(root: Path, scenario: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.publishing", str(root), scenario],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    reports = json.loads(run.stdout)
    assert len(reports) > 40
    for report in reports:
        # Without an atomic exchange, the old output is set aside between two renames.
        aside = scenario == "replace-without-exchange" and report["state"] == "absent"
        fine = {"old", "new"}
        assert report["state"] in fine or aside, report
        assert report["redone"], report
        assert report["left"] == [], report
    assert [report["died"] for report in reports] == [True] * (len(reports) - 1) + [False]
    assert {report["state"] for report in reports} >= {"new", "old"}


LIMITED = """
import resource, sys
from pathlib import Path
from gptconvert.errors import OutputError
from tests.publishing import convert, prepare
checkpoint, output = prepare(Path(sys.argv[1]), "replace")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    convert(checkpoint, output)
except OutputError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("limit", [1, 1000, 40_000])
def test_a_file_size_limit_is_an_output_error(root: Path, limit: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(root), str(limit)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 6, run.stderr
    assert os.strerror(errno.EFBIG) in run.stdout
    assert tree(root / "out") == OLD
    assert not leftovers(root)
