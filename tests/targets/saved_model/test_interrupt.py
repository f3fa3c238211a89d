"""A conversion that ends early kills its TensorFlow process at once and leaves no files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess
from tests.helpers import FIXTURES, ROOT

pytestmark = pytest.mark.tensorflow

SOURCE = FIXTURES / "tiny-gpt2/openai-tf"
#: A fake TensorFlow whose import takes longer than any test waits.
SLOW = """
import os, time
with open(os.environ["STARTED"] + ".part", "w") as file:
    file.write(str(os.getpid()))
os.rename(os.environ["STARTED"] + ".part", os.environ["STARTED"])
time.sleep(40)
"""
SECONDS = 20


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace TensorFlow by the slow one; return the file that will hold its process id once it has started."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/tensorflow.py").write_text(SLOW)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path / "modules"), str(ROOT))))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    return tmp_path / "started"


def wait_for(path: Path) -> int:
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < end, "TensorFlow was not started"
        time.sleep(0.01)
    return int(path.read_text())


def convert(source: Path, work: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gptconvert", "openai-tf", str(source), "--to", "tf", "-o", str(work / "out/x")]
    (work / "out").mkdir()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=work, text=True, start_new_session=True, **pipes)


def check_nothing_is_left(work: Path, tensorflow: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(tensorflow, 0)
    assert list((work / "temporary").iterdir()) == []
    assert list((work / "out").iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the process", "to the group, as a terminal does"])
def test_a_signal(send: Callable[[int, int], None], number: int, code: int, slow: Path, tmp_path: Path) -> None:
    with convert(SOURCE, tmp_path) as process:
        tensorflow = wait_for(slow)
        send(process.pid, number)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    check_nothing_is_left(tmp_path, tensorflow)


def test_a_damaged_source(slow: Path, tmp_path: Path) -> None:
    """Found by another thread while TensorFlow is importing."""
    damaged = shutil.copytree(SOURCE, tmp_path / "damaged")
    data = damaged / "model.ckpt.data-00000-of-00001"
    raw = bytearray(data.read_bytes())
    raw[1000] ^= 1
    data.write_bytes(raw)
    with convert(damaged, tmp_path) as process:
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, errors
    assert "checksum" in errors
    assert list((tmp_path / "temporary").iterdir()) == []
    assert list((tmp_path / "out").iterdir()) == []


def test_cancelled_request(slow: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    with TensorFlowProcess() as tensorflow, pytest.raises(TensorFlowError, match="was cancelled"):
        tensorflow.ask("load", stop, path="/nowhere")
    assert time.monotonic() - started < SECONDS
