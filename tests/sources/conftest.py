"""Fixtures for tests that hand the readers things that could block."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest


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
