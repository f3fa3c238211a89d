"""An export, a hub, and a user who is logged in to it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptconvert.cli import run
from tests.commands import TINY
from tests.push.hub_server import TOKEN, Hub, serve


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified export with a lossy variant."""
    directory = tmp_path_factory.mktemp("push") / "out"
    options = ("--to", "onnx,safetensors", "--quantize", "q4", "--max-kl", "10", "-q")
    assert run(["hf", str(TINY / "hf-safetensors"), "-o", str(directory), *options]) == 0
    return directory


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without repositories; the client does not pause between attempts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, close_session

    with serve(Hub()) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield running
    close_session()
