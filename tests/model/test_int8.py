"""Matrices of 8 bits with a scale per row."""

from __future__ import annotations

import numpy as np

from gptconvert.model import blocks
from gptconvert.model.int8 import Int8Rows
from tests.helpers import computed_tensors


def rows(values: np.ndarray) -> Int8Rows:  # type: ignore[type-arg]
    return Int8Rows.of(computed_tensors({"": values})[""])


def test_codes_and_scales() -> None:
    """Exact arithmetic: the nearest multiple of the row's scale, halves away from zero."""
    values = np.random.default_rng(0).normal(0, 3, (7, 20)).astype(np.float32)
    values[2], values[5] = 0, 1e-39
    values[3, :4] = [127, 0.5, -0.5, 1.5]
    values[3, 4:] = 0
    stored = rows(values)
    scales, codes = stored.scales.read(), stored.codes.read()
    assert (scales[[2, 5]] == 1).all() and not codes[[2, 5]].any()  # XNNPACK refuses subnormal scales
    assert codes[3, :4].tolist() == [127, 1, -1, 2] and scales[3] == 1
    np.testing.assert_array_equal(scales[[0, 1, 4]], np.abs(values[[0, 1, 4]]).max(1) / np.float32(127))
    assert codes.dtype == np.int8 and (np.abs(codes).max(1)[[0, 1, 4]] == 127).all()
    assert (np.abs(stored.read() - values) <= scales[:, None] * np.float32(0.5000001)).all()
    np.testing.assert_array_equal(stored.read(), codes.astype(np.float32) * scales[:, None])


def test_boxes_and_slabs(monkeypatch: object) -> None:
    values = np.random.default_rng(1).normal(0, 1, (400, 5)).astype(np.float32)
    stored, box = rows(values), (slice(130, 300), slice(1, 4))
    monkeypatch.setattr(blocks, "SLAB_BYTES", 1000)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(stored.read(box), stored.read()[130:300, 1:4])
    np.testing.assert_array_equal(np.concatenate(list(stored.codes.chunks(512))), stored.codes.read())
    assert stored.shape == (400, 5) and stored.dtype == np.float32 and stored.parts.keys() == {"codes", "scales"}
