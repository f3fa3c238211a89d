"""onnxruntime's telemetry is off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gptconvert.kernels.library import NO_TELEMETRY, import_onnxruntime
from tests.commands import REPOSITORY, TINY

RUN = f"from gptconvert import convert; convert({str(TINY / 'openai-tf')!r}, 'out')"
#: Variables that move caches, or by which onnxruntime recognises a CI service, where it sends nothing anyway.
CLEARED = (NO_TELEMETRY, "XDG_CACHE_HOME", "CI", "GITHUB_ACTIONS", "TF_BUILD")


def test_a_conversion_writes_nothing_into_the_home_directory(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: text for name, text in os.environ.items() if name not in CLEARED}
    environment |= {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert [str(path) for path in home.rglob("*")] == []


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, before: str | None, after: str) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    monkeypatch.setenv(NO_TELEMETRY, before or "")
    if before is None:
        monkeypatch.delenv(NO_TELEMETRY)
    import_onnxruntime()
    assert os.environ[NO_TELEMETRY] == after
