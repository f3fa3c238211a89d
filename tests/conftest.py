"""Settings of every test process, and fixtures that many rooms need."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

pytest_plugins = ["tests.strict_skips"]

# Two processes share two cores, so each computes with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A job started in the background inherits an ignored SIGINT, and hands it on to what it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Fixtures that start TensorFlow; a test that starts it by other means carries the marker.
TENSORFLOW_FIXTURES = {"tf", "tensorflow"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts TensorFlow as slow, and skip it on versions of Python that TensorFlow does not support yet."""
    unavailable = sys.version_info >= (3, 14) and importlib.util.find_spec("tensorflow") is None
    for item in items:
        if item.get_closest_marker("tensorflow") or TENSORFLOW_FIXTURES & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.slow)
            if unavailable:
                item.add_marker(pytest.mark.skip("TensorFlow has no release for this version of Python"))


@pytest.fixture(scope="session")
def tf() -> Any:
    """TensorFlow in this process, as a witness."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    import tensorflow

    return tensorflow


class SharedOnnx:
    """One onnxruntime process for all tests, since starting one takes longer than most runs."""

    process: Any = None
    closed: ClassVar[list[int]] = []

    def __init__(self, limits: object = None) -> None:
        from gptconvert.targets.child.client import Limits
        from gptconvert.targets.onnx.process import OnnxProcess

        if SharedOnnx.process is None:
            SharedOnnx.process = OnnxProcess(Limits("a test's graph", 4 << 30, 0, 0))
        self.sessions: list[int] = []

    def call(self, command: str, **fields: Any) -> Any:
        while SharedOnnx.closed:
            SharedOnnx.process.call("close", session=SharedOnnx.closed.pop())
        answer = SharedOnnx.process.call(command, **fields)
        if command == "open":
            self.sessions.append(answer[0]["session"])
        return answer

    def close(self) -> None:
        """Called by the garbage collector too, perhaps during another call."""
        SharedOnnx.closed += self.sessions


@pytest.fixture(autouse=True, scope="session")
def shared_onnx() -> Iterator[None]:
    """Run graphs of unknown origin in one process, except in tests that patch the name back."""
    from gptconvert.targets.onnx import runner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "OnnxProcess", SharedOnnx)
        yield
    if SharedOnnx.process is not None:
        SharedOnnx.process.close()
        SharedOnnx.process = None


@pytest.fixture
def no_hang() -> Iterator[None]:
    """A test that blocks fails after half a minute."""

    def stop(*_: Any) -> None:
        raise TimeoutError("blocked")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
