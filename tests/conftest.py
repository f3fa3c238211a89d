"""Settings of every test process, and fixtures that many rooms need."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

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
