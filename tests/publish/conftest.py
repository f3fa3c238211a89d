"""Fixtures shared by the tests of staging and of output paths."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An existing output."""
    output = tmp_path / "out"
    (output / "sub").mkdir(parents=True)
    (output / "sub" / "old").write_bytes(b"old")
    return output
