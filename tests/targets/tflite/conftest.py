from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptconvert.targets.tflite import build
from gptconvert.targets.tflite import verify as verifying
from gptconvert.targets.tflite.process import LiteProcess
from tests.targets.saved_model.support import Shared


@pytest.fixture(scope="session")
def converter() -> Iterator[build.ConverterProcess]:
    """One TensorFlow for all tests here."""
    with build.ConverterProcess() as process:
        yield process


@pytest.fixture(scope="session")
def lite() -> Iterator[LiteProcess]:
    with LiteProcess() as process:
        yield process


@pytest.fixture
def shared(
    converter: build.ConverterProcess, lite: LiteProcess, monkeypatch: pytest.MonkeyPatch
) -> build.ConverterProcess:
    """Make planning and verification use one process each."""
    monkeypatch.setattr(build, "ConverterProcess", Shared(converter))
    monkeypatch.setattr(verifying, "LiteProcess", Shared(lite))
    return converter


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory for models saved by transformers."""
    return tmp_path_factory.mktemp("saved")
