"""Exact products of low rank: the same bits whatever the order of additions, and close to the exact result."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from gptconvert.model.lora import Merged, Update, product
from gptconvert.model.tensors import Computed


def lazy(array: Any) -> Computed:
    return Computed(lambda box: array[box], array.dtype, array.shape)


def factors(rank: int, seed: int = 0) -> tuple[Any, Any]:
    """Factors whose values span twelve orders of magnitude, exact in float32."""
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(7, rank)), random.normal(size=(rank, 11))
    spread = [10.0 ** random.integers(-6, 6, x.shape) for x in (left, right)]
    return tuple((x * s).astype(np.float32).astype(np.float64) for x, s in zip((left, right), spread, strict=True))


@pytest.mark.parametrize("rank", [1, 3, 64, 513])
def test_product_does_not_depend_on_the_order_of_additions(rank: int) -> None:
    left, right = factors(rank)
    found = product(left, right)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(min(rank, 512))  # within one block of ranks
        shuffled = [*order, *range(len(order), rank)]
        np.testing.assert_array_equal(product(left[:, shuffled], right[shuffled]), found)


def test_product_is_nearly_exact() -> None:
    left, right = factors(64)
    found = product(left, right)
    largest = np.abs(left).max(1)[:, None] * np.abs(right).max(0)
    for i, j in np.ndindex(found.shape):
        exact = sum(Fraction(a) * Fraction(b) for a, b in zip(left[i], right[:, j], strict=True))
        assert abs(Fraction(found[i, j]) - exact) <= 64 * Fraction(2) ** -43 * Fraction(largest[i, j])


def test_zeros_and_values_that_are_not_finite() -> None:
    left, right = np.zeros((2, 3)), np.ones((3, 4))
    assert not product(left, right).any()
    base = np.ones((2, 4), np.float32)
    for bad in (np.nan, np.inf):
        update = Update(lazy(right), lazy(np.full((2, 3), bad)), 1.0)
        assert not np.isfinite(Merged(lazy(base), update, transposed=False).read()).any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_chunks_equal_the_whole(transposed: bool, dora: bool) -> None:
    random = np.random.default_rng(0)
    a, b, magnitude = random.normal(size=(3, 13)), random.normal(size=(9, 3)), random.normal(size=9)
    base = random.normal(size=(13, 9) if transposed else (9, 13)).astype(np.float32)
    merged = Merged(
        lazy(base), Update(lazy(a), lazy(b), 0.7, magnitude=lazy(magnitude) if dora else None), transposed
    )
    whole = base.astype(np.float64) + 0.7 * ((b @ a).T if transposed else b @ a)
    if dora:
        whole *= (
            (magnitude / np.linalg.norm(whole, axis=0))
            if transposed
            else (magnitude / np.linalg.norm(whole, axis=1))[:, None]
        )
    np.testing.assert_allclose(merged.read(), whole, rtol=1e-6)
    chunks = np.concatenate(list(merged.chunks(100)))
    np.testing.assert_array_equal(chunks, merged.read())
