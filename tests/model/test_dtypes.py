"""The table of element types agrees with the libraries whose names it contains."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptconvert.model.dtypes import ELEMENT_TYPES, FLOATS, ElementType


@pytest.mark.parametrize("column", ["dtype", "torch", "safetensors", "tensorflow", "storage", "option"])
def test_names_are_unambiguous(column: str) -> None:
    values = [getattr(row, column) for row in ELEMENT_TYPES if getattr(row, column) is not None]
    assert len(values) == len(set(values)) > 2


@pytest.mark.parametrize("row", [row for row in ELEMENT_TYPES if row.torch], ids=lambda row: row.torch)
def test_types_exist_in_pytorch(row: ElementType) -> None:
    import torch

    assert row.torch == row.dtype.name
    assert torch.empty(0, dtype=getattr(torch, row.torch)).element_size() == row.dtype.itemsize
    if row.storage is not None:
        assert getattr(torch, row.storage).dtype == getattr(torch, row.torch)


@pytest.mark.parametrize("row", [row for row in ELEMENT_TYPES if row.tensorflow], ids=lambda row: row.dtype.name)
def test_types_exist_in_tensorflow(row: ElementType, tf: Any) -> None:
    assert tf.dtypes.as_dtype(row.tensorflow).as_numpy_dtype == row.dtype.type


def test_weights_are_floats() -> None:
    assert all(ml_dtypes.finfo(dtype).bits >= 16 for dtype in FLOATS)
    assert {np.dtype(row.dtype) for row in ELEMENT_TYPES if row.option} < {*FLOATS}
