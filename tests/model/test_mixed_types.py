"""Tensors that combine others of different types: the result has the type that holds every value, exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.model.dtypes import BFLOAT16, FLOATS, holding_all
from gptconvert.model.shards import COLUMNS, EITHER, ROWS, SUM, Copies, Parts, added_to_rows, mean
from gptconvert.model.tensors import Joined, LazyTensor, total
from gptconvert.model.transforms import concatenate, transpose
from tests.helpers import computed_tensors, stored_tensors

TORCH = {np.dtype("f8"): torch.float64, np.dtype("f4"): torch.float32, np.dtype("f2"): torch.float16}
TYPES = st.lists(st.sampled_from(FLOATS), min_size=2, max_size=4)
#: Combination → (the lazy result, the same in NumPy on float64 values). Parts are [3, 4].
COMBINE: dict[str, tuple[Callable[[Sequence[LazyTensor]], LazyTensor], Callable[[list[Any]], Any]]] = {
    "rows": (concatenate, np.concatenate),
    "columns": (lambda parts: concatenate(parts, 1), lambda arrays: np.concatenate(arrays, 1)),
    "transposed rows": (
        lambda parts: concatenate([transpose(part) for part in parts]),
        lambda arrays: np.concatenate([array.T for array in arrays]),
    ),
    "shards, rows": (lambda parts: ROWS.merge(parts, (0, 4)), np.concatenate),
    "shards, columns": (lambda parts: COLUMNS.merge(parts, (3, 0)), lambda arrays: np.concatenate(arrays, 1)),
    "shards, either": (lambda parts: EITHER.merge(parts, (0, 4)), np.concatenate),
    "shards, sum": (lambda parts: SUM.merge(parts, (3, 4)), sum),
    "sum": (total, sum),
    "mean": (mean, lambda arrays: np.mean(arrays, axis=0)),
    "averaged copies": (lambda parts: Copies("norms", averaged=True).merge(parts, (3, 4)), None),
    "added": (
        lambda parts: added_to_rows(parts[0], [row_of(part) for part in parts[1:]]),
        lambda arrays: arrays[0] + sum(array[0] for array in arrays[1:]),
    ),
}
COMBINE["averaged copies"] = (COMBINE["averaged copies"][0], COMBINE["mean"][1])


def row_of(part: LazyTensor) -> LazyTensor:
    """The first row, as a vector."""
    return next(iter(computed_tensors({"row": part.read()[0]}).values()))


def parts_of(dtypes: Sequence[Any], stored: bool, factory: pytest.TempPathFactory) -> tuple[list[LazyTensor], Any]:
    """Lazy parts of these types, and their values in float64. Sums of two small eighths are exact in every type."""
    random = np.random.default_rng(0)
    arrays = [(random.integers(-8, 8, (3, 4)) / 8).astype(dtype) for dtype in dtypes]
    named = {str(number): array for number, array in enumerate(arrays)}
    tensors = stored_tensors(factory.mktemp("parts") / "x", named) if stored else computed_tensors(named)
    return [tensors[name] for name in named], [array.astype(np.float64) for array in arrays]


@pytest.mark.parametrize("name", COMBINE)
@given(dtypes=TYPES, stored=st.booleans())
@settings(max_examples=25, deadline=None)
def test_combined_tensors_have_the_type_that_holds_all(
    name: str, dtypes: list[Any], stored: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    parts, arrays = parts_of(dtypes, stored, tmp_path_factory)
    combine, expected = COMBINE[name]
    found = combine(parts)
    assert found.dtype == holding_all(dtypes)
    whole = found.read()
    assert whole.dtype == found.dtype
    assert np.array_equal(whole, np.asarray(expected(arrays)).astype(found.dtype))
    assert b"".join(chunk.tobytes() for chunk in found.chunks(16)) == np.ascontiguousarray(whole).tobytes()
    box = (slice(1, 3), slice(0, 2))
    assert np.array_equal(found.read(box), whole[box])
    assert found.read(box).dtype == found.dtype
    assert found.nbytes == whole.nbytes


@given(dtypes=TYPES)
@settings(max_examples=50, deadline=None)
def test_types_are_promoted_as_in_pytorch(dtypes: list[Any]) -> None:
    named = [TORCH.get(dtype, torch.bfloat16) for dtype in dtypes]
    expected = functools.reduce(torch.promote_types, named)
    assert TORCH.get(holding_all(dtypes), torch.bfloat16) == expected
    assert Parts(tuple(computed_tensors({str(i): np.zeros(1, d) for i, d in enumerate(dtypes)}).values())).dtype == (
        holding_all(dtypes)
    )


def test_byte_order_does_not_count_as_a_type() -> None:
    assert holding_all([np.dtype(">f4"), np.dtype("<f4")]) == np.dtype("=f4")
    assert holding_all([np.dtype(">f2"), BFLOAT16]) == np.dtype("=f4")


def test_integers_are_not_combined_with_floats() -> None:
    with pytest.raises(ValueError, match="int8"):
        holding_all([np.dtype("f4"), np.dtype("i1")])


def test_joined_refuses_parts_of_different_types() -> None:
    """They are converted before; otherwise ``dtype`` would be untrue of the bytes read."""
    parts = tuple(computed_tensors({"a": np.zeros(2, "f4"), "b": np.zeros(2, "f2")}).values())
    with pytest.raises(ValueError, match="different types: float32, float16"):
        Joined(parts, 0)


def test_equal_copies_of_different_types_do_not_differ() -> None:
    same = tuple(computed_tensors({"a": np.ones(3, "f4"), "b": np.ones(3, "f2")}).values())
    assert not Copies("norms").differ(same)
    other = tuple(computed_tensors({"a": np.full(3, 1 / 3, "f4"), "b": np.full(3, 1 / 3, "f2")}).values())
    assert Copies("norms").differ(other)
