"""The command line survives signals and the death of its child process: exit codes, messages, and nothing left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptconvert.cli import outcome
from gptconvert.publish.journal import Journal
from tests.commands import TINY, command
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux supervises conversions")

#: A module that Python imports at startup: it acts in the child when the conversion begins to write.
HOOK = """
import os, signal
from gptconvert.publish import writer

def write_and_digest(*args, _original=writer.write_and_digest, **kwargs):
    source = os.environ["SOURCE"]
    {action}
    return _original(*args, **kwargs)

writer.write_and_digest = write_and_digest
"""
TRUNCATE = """
    import numpy as np
    from gptconvert.model.tensors import Segment, map_segment
    mapped = map_segment(Segment(source, 0, os.path.getsize(source)))
    os.truncate(source, 0)
    mapped.sum()
"""


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory in a memory file system where available, with a source."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        shutil.copytree(TINY / "openai-tf", Path(directory) / "source")
        yield Path(directory)


def start(root: Path, *flags: str, action: str = "", before: str = "") -> subprocess.Popen[str]:
    """Convert ``source`` to ``out``; ``action`` runs before anything is written, ``before`` in the parent."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(root)}
    arguments = [sys.executable, "-m", "gptconvert"]
    if action:
        code = before + HOOK.format(action=action.strip("\n").lstrip())
        start_here = "from gptconvert.__main__ import main; main()"
        arguments = [sys.executable, "-c", f"{code}\n{start_here}"]
        (data,) = (root / "source").glob("*.data-*")
        environment["SOURCE"] = str(data)
    arguments += ["convert", str(root / "source"), "-o", str(root / "out"), "--no-verify", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, cwd=root, env=environment, text=True, **pipes)


def run(root: Path, *flags: str, action: str = "") -> subprocess.CompletedProcess[str]:
    with start(root, *flags, action=action) as process:
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_source_truncated_while_mapped_is_an_input_error(root: Path) -> None:
    done = run(root, "--json", action=TRUNCATE)
    assert done.returncode == 3, done
    error = json.loads(done.stdout)["error"]
    assert "input changed while it was being read: model.ckpt.data" in error["message"]
    assert error["file"].startswith(str(root / "source"))
    assert "nothing was published" in error["hint"]
    assert names(root) == ["source"]


def test_a_disk_that_fails_while_mapped_is_an_input_error(root: Path) -> None:
    done = run(root, action="os.kill(os.getpid(), signal.SIGBUS)")
    assert done.returncode == 3, done
    assert "input cannot be read" in done.stderr
    assert names(root) == ["source"]


@pytest.mark.parametrize(("signum", "hint"), [(signal.SIGKILL, "memory may have run out"), (signal.SIGSEGV, "")])
def test_a_process_that_is_killed_leaves_nothing(root: Path, signum: signal.Signals, hint: str) -> None:
    done = run(root, action=f"os.kill(os.getpid(), {int(signum)})")
    assert done.returncode == 128 + signum
    assert f"killed by {signum.name}" in done.stderr
    assert hint in done.stderr
    assert "nothing was published" in done.stderr
    assert names(root) == ["source"]


def test_a_child_that_does_not_react_to_a_signal_is_killed(root: Path) -> None:
    deaf = "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 30)); print(flush=True); signal.sigwait([40])"
    patience = "from gptconvert import supervisor\nsupervisor.GRACE = 0.2\n"
    with start(root, action=deaf, before=patience) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=20)[1]
    assert process.returncode == 143, err
    assert "interrupted; nothing was published" in err
    assert names(root) == ["source"]


def test_the_child_dies_with_its_parent(root: Path) -> None:
    with start(root, action="print(os.getpid(), flush=True); signal.pause()") as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.communicate(timeout=20)
    end = time.monotonic() + 10
    while _is_running(child):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(names(root)) == 3, "staging directory and lock"
    assert run(root).returncode == 0
    assert names(root) == ["out", "source"]


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_an_output_whose_path_is_not_utf8(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime accepts only UTF-8."""
    source, output = root / "source", root / os.fsdecode(b"parent\xfe") / os.fsdecode(b"out\xff")
    output.parent.mkdir()
    assert command(capsys, "convert", source, "-o", output).code == 0
    assert command(capsys, "verify", source, output).code == 0
    assert names(output.parent) == [output.name]


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        (">&-", 0, "standard output is closed"),
        ("2>&-", 0, ""),
        (">/dev/full", 6, "is published"),
        ("2>/dev/full", 6, ""),
        (">/dev/full --json", 6, "is published"),
        (">&- --json", 0, "standard output is closed"),
    ],
)
def test_lost_streams(root: Path, redirection: str, code: int, message: str) -> None:
    line = f"exec {sys.executable} -m gptconvert convert source -o out --no-verify {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert names(root) == ["out", "source"]
    checked = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=root / "out", capture_output=True)
    assert checked.returncode == 0, "text of a closed stream was written to an output file"


def test_a_child_that_dies_after_it_has_reported_is_not_reported_again() -> None:
    """A second signal may end it while Python shuts down."""
    program = """
import os, signal, sys
from gptconvert import supervisor

def command():
    import atexit
    print("error: interrupted", file=sys.stderr, flush=True)
    atexit.register(os.kill, os.getpid(), signal.SIGKILL)
    return 143

supervisor.supervise(command)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "error: interrupted\n")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["generate", "out", "text"], ""),
        (["--debug", "verify", "a", "b"], ""),
        (["hf", "x"], "nothing was published"),
    ],
)
def test_commands_that_only_read_publish_nothing(args: list[str], expected: str) -> None:
    assert outcome(Journal(), args) == expected
