"""Checks of values: NaN and infinities in every float dtype, and all zeros."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.model.dtypes import BFLOAT16, is_finite
from gptconvert.publish.finite import FiniteCheck, is_float


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=0, max_size=64), st.sampled_from(["f2", "f4", "f8", "bfloat16"]), st.integers(1, 9))
def test_agrees_with_numpy_on_any_bits(data: bytes, dtype: str, step: int) -> None:
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    data = data[: len(data) - len(data) % kind.itemsize]
    array = np.frombuffer(data, kind)
    wide = array.astype(np.float64)
    assert (is_finite(array) == np.isfinite(wide)).all()
    check = FiniteCheck(kind)
    for start in range(0, len(data), step):
        check.update(data[start : start + step])
    assert check.nonfinite == (~np.isfinite(wide)).sum()
    assert check.nonzero == bool((wide != 0).any())
    if check.nonfinite:
        assert check.first == int(np.flatnonzero(~np.isfinite(wide))[0])


@pytest.mark.parametrize(
    "dtype",
    [np.float16, np.float32, np.float64, BFLOAT16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2],
)
def test_is_float(dtype: Any) -> None:
    assert is_float(np.dtype(dtype))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint16, np.bool_, ml_dtypes.int4])
def test_is_not_float(dtype: Any) -> None:
    assert not is_float(np.dtype(dtype))


def test_first_index_counts_all_updates() -> None:
    check = FiniteCheck(np.dtype(np.float32))
    check.update_array(np.ones((2, 3), np.float32))
    check.update_array(np.array([[1, np.inf, np.nan]], np.float32))
    assert check.problem((3, 3)) == "2 of 9 values are NaN or infinite, the first at [2, 1]"


def test_a_scalar() -> None:
    check = FiniteCheck(np.dtype(np.float32))
    check.update(np.float32(np.nan).tobytes())
    assert check.problem(()) == "1 of 1 values are NaN or infinite, the first at []"
