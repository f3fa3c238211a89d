"""What a confined process can reach, and what its parent accepts from it."""

from __future__ import annotations

import ctypes
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptconvert.targets.child.confine import CREATE_RULESET, VERSION
from gptconvert.targets.child.frames import FrameError, read_message, write_message
from tests.helpers import ROOT

CONTENT = "content"


def landlock() -> int:
    """The kernel's version of Landlock; below 1 without it."""
    if sys.platform != "linux":
        return 0
    return ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION))


def outcomes(directory: Path, port: int, *memory: str) -> dict[str, str]:
    for name in ("kept", "removed", "renamed"):
        (directory / name).write_text(CONTENT)
    module = [sys.executable, "-m", "gptconvert.targets.child.confine", "tests.targets.child.reach", *memory]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PORT": str(port)}
    done = subprocess.run(module, cwd=directory, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_reach(tmp_path: Path) -> None:
    for name in ("free", "confined"):
        (tmp_path / name).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        free = outcomes(tmp_path / "free", port)
        confined = outcomes(tmp_path / "confined", port, str(512 << 20))
    assert set(free.values()) == {"done"}
    assert confined["read"] == "done"
    assert (tmp_path / "confined/kept").read_text() in (CONTENT, "")
    never = {"write", "overwrite"} | ({"memory"} if sys.platform == "linux" else set())
    version = landlock()
    if version >= 1:
        never |= {"remove", "rename", "mkdir", "link", "run"}
    if version >= 3:
        never |= {"truncate"}
    if version >= 4:
        never |= {"connect"}
    assert {name for name, outcome in confined.items() if outcome != "done"} >= never
    if version >= 3:
        assert sorted(p.name for p in (tmp_path / "confined").iterdir()) == ["kept", "removed", "renamed"]
        assert (tmp_path / "confined/kept").read_text() == CONTENT


def test_messages_arrive_as_sent() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "empty": np.zeros((2, 0, 3), np.int64),
        "scalar": np.array(True),
        "half": np.float16([1, 2]),
    }
    stream = io.BytesIO()
    write_message(stream, {"ok": True, "text": "ä\n"}, arrays)
    stream.seek(0)
    message = read_message(stream)
    assert message is not None
    fields, found = message
    assert fields == {"ok": True, "text": "ä\n"}
    assert found.keys() == arrays.keys()
    assert all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array) for name, array in arrays.items()
    )
    assert read_message(stream) is None


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[1]",
        b"{}",
        b'{"arrays": [["a", "<f4"]]}',
        b'{"arrays": [["a", "|O", [1]]]}',
        b'{"arrays": [["a", "<f4", [-1]]]}',
        b'{"arrays": [["a", "<f4", [1.5]]]}',
        b'{"arrays": [["a", "<f4", [1000000000000]]]}',
        b'{"arrays": [["a", "wrong", [1]]]}',
        b"[" * 100_000,
    ],
)
def test_damaged_messages(line: bytes) -> None:
    with pytest.raises(FrameError):
        read_message(io.BytesIO(line + b"\n"), 1 << 20)


def test_message_that_ends_early() -> None:
    for content in (b'{"arrays": []}', b'{"arrays": [["a", "<f4", [2]]]}\n1234'):
        assert read_message(io.BytesIO(content)) is None
