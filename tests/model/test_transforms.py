"""Transforms: each matches NumPy, is undone by its inverse, and computes its output shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.model import transforms
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import (
    DeinterleaveFeatures,
    DeinterleaveHeads,
    DropLeadingAxis,
    Transform,
    Transpose,
    drop_leading_axis,
)
from tests.helpers import computed_tensors, stored_tensors

#: Transform → an input shape from three small numbers, and the same operation in NumPy.
CASES: dict[Transform, tuple[Callable[[int, int, int], tuple[int, ...]], Callable[[Any, int], Any]]] = {
    Transpose(): (lambda a, b, c: (a, b), lambda x, heads: x.T),
    DropLeadingAxis(): (lambda a, b, c: (1, a, b)[: 1 + c % 3], lambda x, heads: x[0]),
    DeinterleaveHeads(): (
        lambda a, b, c: (3 * a * b, c),
        lambda x, heads: x.reshape(heads, 3, -1, x.shape[1]).swapaxes(0, 1).reshape(x.shape),
    ),
    DeinterleaveHeads(2): (
        lambda a, b, c: (2 * a * b,),
        lambda x, heads: x.reshape(heads, 2, -1).swapaxes(0, 1).reshape(x.shape),
    ),
    DeinterleaveFeatures(): (
        lambda a, b, c: (3 * a * b, c),
        lambda x, heads: x.reshape(-1, 3, x.shape[1]).swapaxes(0, 1).reshape(x.shape),
    ),
    DeinterleaveFeatures(2): (
        lambda a, b, c: (2 * a * b,),
        lambda x, heads: x.reshape(-1, 2).swapaxes(0, 1).reshape(x.shape),
    ),
}
SMALL = st.integers(1, 4)


def lazy(array: Any, stored: bool, directory: Path) -> LazyTensor:
    """``array`` stored in a file, or computed."""
    named = {"x": array}
    return (stored_tensors(directory / "x", named) if stored else computed_tensors(named))["x"]


def same(tensor: LazyTensor, array: Any) -> bool:
    chunks = b"".join(chunk.tobytes() for chunk in tensor.chunks(16))
    return tensor.shape == array.shape and tensor.read().tobytes() == chunks == np.ascontiguousarray(array).tobytes()


def test_every_transform_is_tested() -> None:
    classes = {value for value in vars(transforms).values() if isinstance(value, type) and hasattr(value, "inverse")}
    assert classes - {Transform} == {type(transform) for transform in CASES}


@pytest.mark.parametrize("transform", CASES, ids=repr)
@given(heads=SMALL, b=SMALL, c=SMALL, stored=st.booleans())
@settings(max_examples=40, deadline=None)
def test_inverse_undoes_forward(
    transform: Transform, heads: int, b: int, c: int, stored: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape_of, expected = CASES[transform]
    array = np.arange(np.prod(shape_of(heads, b, c)), dtype=np.float32).reshape(shape_of(heads, b, c))
    sizes = {"H": heads}
    tensor = lazy(array, stored, tmp_path_factory.mktemp("values"))
    forward = transform.forward(tensor, sizes)
    assert same(forward, expected(array, heads))
    assert transform.shape(array.shape, sizes) == forward.shape
    assert same(transform.inverse(forward, sizes), array)
    fresh = lazy(np.array(expected(array, heads), order="C"), stored, tmp_path_factory.mktemp("values"))
    assert same(transform.forward(transform.inverse(fresh, sizes), sizes), expected(array, heads))


def test_unchanged_bytes_stay_stored(tmp_path: Path) -> None:
    """They can then be copied without being read."""
    array = np.arange(24, dtype=np.float32).reshape(12, 2)
    for transform in (DeinterleaveHeads(), DeinterleaveHeads(2), DeinterleaveFeatures()):
        forward = transform.forward(lazy(array, True, tmp_path), {"H": 2})
        assert forward.segments() is not None
        assert transform.inverse(forward, {"H": 2}).segments() == lazy(array, True, tmp_path).segments()
    leading = DropLeadingAxis().forward(lazy(array[None], True, tmp_path), {})
    assert leading.segments() is not None
    twice = Transpose().inverse(Transpose().forward(lazy(array, True, tmp_path), {}), {})
    assert twice.segments() is not None


def test_leading_axis_of_computed_values() -> None:
    """Also for a result that is a scalar."""
    for array in (np.arange(24.0).reshape(1, 4, 6), np.arange(5.0)[None], np.float32([7])):
        tensor = drop_leading_axis(computed_tensors({"x": array})["x"])
        assert (tensor.shape, tensor.nbytes) == (array.shape[1:], array.nbytes)
        whole, chunked = tensor.read(), b"".join(chunk.tobytes() for chunk in tensor.chunks(16))
        assert isinstance(whole, np.ndarray)
        assert whole.tobytes() == chunked == array.tobytes()
