"""onnxruntime's cast has the bits of numpy's, in every memory order, and only large tensors use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptconvert import convert
from gptconvert.errors import VerificationError
from gptconvert.kernels import cast
from gptconvert.kernels.cast import FastCast, with_fast_casts
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.tensors import (
    Array,
    Cast,
    Joined,
    LazyTensor,
    LeadingAxis,
    Rows,
    Transposed,
)
from gptconvert.model.transforms import transpose
from gptconvert.publish.finite import checked_chunks
from tests.commands import TINY
from tests.helpers import computed_tensors

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
#: Every finite non-negative float16, in float32.
HALVES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
MIDPOINTS = (HALVES[:-1] + HALVES[1:]) / np.float32(2)  # exact: one more bit


def held(values: Array) -> LazyTensor:
    """A tensor in memory."""
    return computed_tensors({"": values})[""]


def bits(values: Array) -> NDArray[np.uint16]:
    return values.view(np.uint16)


def assert_casts(values: Array) -> None:
    """The kernel agrees with numpy, bit for bit."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = FastCast(held(values), F16).read()
        expected = values.astype(F16)
    assert (found.dtype, found.shape) == (F16, values.shape)
    np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "values",
    [
        HALVES,
        MIDPOINTS,
        np.nextafter(MIDPOINTS, np.float32(0)),
        np.nextafter(MIDPOINTS, np.float32(np.inf)),
        np.array([0, 65504, 65519.99, 1e-45, 2**-25, 2**-24], np.float32),
    ],
    ids=["every half", "midpoints", "below", "above", "edges"],
)
def test_rounds_to_nearest_even(values: NDArray[np.float32], sign: int) -> None:
    assert_casts(values * np.float32(sign))


@pytest.mark.parametrize("value", [65520, 3e38, np.inf, -np.inf, np.nan], ids=str)
def test_values_that_are_not_finite_are_numpys(value: float) -> None:
    values = np.full(cast._BLOCK + 3, 0.1, np.float32)
    values[-1] = value
    assert_casts(values)


def test_the_payload_of_nan_is_kept() -> None:
    assert_casts(np.arange(0x7F800001, 0x7FFFFFFF, 65521, np.uint32).view(np.float32))


def test_any_bits() -> None:
    assert_casts(np.arange(0, 2**32, 4099, np.uint64).astype(np.uint32).view(np.float32))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 7), st.sampled_from("CF"), st.integers(0, 2**32 - 1))
def test_any_memory_order(rows: int, columns: int, skipped: int, order: str, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(rows, columns + skipped)).astype(np.float32)[:, skipped:]
    assert_casts(values.T if order == "F" else values)


@pytest.mark.parametrize("shape", [(), (0,), (5, 0), (3, 4, 5), (cast._BLOCK + 1,), (2, cast._BLOCK + 7)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert_casts(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def test_a_transposed_result_stays_transposed() -> None:
    assert FastCast(held(np.zeros((6, 4), np.float32).T), F16).read().flags.f_contiguous


def matrix() -> LazyTensor:
    return held(np.random.default_rng(1).normal(size=(11, 7)).astype(np.float32))


NESTED: dict[str, Callable[[], LazyTensor]] = {
    "cast": lambda: Cast(matrix(), F16),
    "transposed": lambda: Transposed(Cast(matrix(), F16)),
    "cast of a transpose": lambda: Cast(Transposed(matrix()), F16),
    "leading axis": lambda: LeadingAxis(Cast(matrix(), F16)),
    "rows": lambda: Rows(Cast(matrix(), F16), ((2, 5), (0, 1))),
    "joined": lambda: Joined((Cast(matrix(), F16), Cast(Transposed(Transposed(matrix())), F16)), 1),
    "twice": lambda: Cast(Cast(Cast(matrix(), F16), F32), F16),
}


@pytest.mark.parametrize("name", NESTED)
def test_every_cast_inside_a_large_tensor_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast, "LARGE", 1)
    tensor, calls = NESTED[name](), []
    kernel = cast._kernel()
    monkeypatch.setattr(cast, "_kernel", lambda: lambda values: calls.append(values.size) or kernel(values))
    fast = with_fast_casts(tensor)
    chunks = [chunk.reshape(-1) for chunk in fast.chunks(30)]
    np.testing.assert_array_equal(np.concatenate(chunks), tensor.read().reshape(-1))
    assert sum(calls) >= tensor.size
    assert (fast.dtype, fast.shape) == (tensor.dtype, tensor.shape)


@pytest.mark.parametrize(
    "tensor",
    [Cast(matrix(), BFLOAT16), Cast(held(np.zeros((11, 7))), F16), matrix()],
    ids=["to bfloat16", "from float64", "no cast"],
)
def test_other_tensors_stay_as_they_are(tensor: LazyTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast, "LARGE", 1)
    assert with_fast_casts(tensor) == tensor
    assert not isinstance(with_fast_casts(tensor), FastCast)


def test_small_tensors_do_not_load_onnxruntime() -> None:
    tensor = Cast(matrix(), F16)
    assert with_fast_casts(tensor) is tensor


def test_an_overflow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast, "LARGE", 1)
    values = np.full((3, 5), 70000, np.float32)
    with pytest.raises(Exception, match="too large for float16") as error:
        list(checked_chunks("h.0.weight", with_fast_casts(transpose(Cast(held(values), F16)))))
    assert "h.0.weight" in str(error.value)


def test_verification_does_not_use_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong kernel is found: exported bytes are compared with numpy's."""
    monkeypatch.setattr(cast, "LARGE", 1)
    kernel = cast._kernel()
    monkeypatch.setattr(cast, "_kernel", lambda: lambda values: kernel(values * np.float32(1.001)))
    with pytest.raises(VerificationError, match="0 of 28 equal"):
        convert(str(TINY / "openai-tf"), str(tmp_path / "out"), Options(targets=("safetensors",), dtype="fp16"))
    assert not (tmp_path / "out").exists()
