from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptconvert.targets.saved_model import plan as model
from gptconvert.targets.saved_model import verify as verifier
from gptconvert.targets.saved_model.process import TensorFlowProcess
from tests.targets.saved_model.support import Shared


@pytest.fixture(scope="session")
def tensorflow() -> Iterator[TensorFlowProcess]:
    """One TensorFlow for all tests here."""
    with TensorFlowProcess() as process:
        yield process


@pytest.fixture
def shared(tensorflow: TensorFlowProcess, monkeypatch: pytest.MonkeyPatch) -> TensorFlowProcess:
    """Make planning and verification use one TensorFlow process."""
    monkeypatch.setattr(model, "TensorFlowProcess", Shared(tensorflow))
    monkeypatch.setattr(verifier, "TensorFlowProcess", Shared(tensorflow))
    return tensorflow


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory for models saved by transformers."""
    return tmp_path_factory.mktemp("saved")
