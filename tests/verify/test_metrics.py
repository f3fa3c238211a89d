from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.verify.metrics import EPSILON, Errors, LogitSimilarity, Measure, significant


def measure(error: np.ndarray, noise: np.ndarray, truth: np.ndarray) -> Measure:
    found = Measure("logits", EPSILON["float32"])
    exact = torch.from_numpy(truth)
    found.add(*(Errors.of(exact + torch.from_numpy(part), exact) for part in (error, noise)), exact)
    return found


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(0, 1e-5, (8, 50)), random.normal(0, 1, (8, 50))


@pytest.mark.parametrize(("times", "ok"), [(0.0, True), (1.0, True), (3.9, True), (4.3, False), (100.0, False)])
def test_rmse_rule(times: float, ok: bool) -> None:
    noise, truth = arrays()
    assert measure(times * noise, noise, truth).ok is ok


def test_single_outlier_fails() -> None:
    noise, truth = arrays()
    error = noise.copy()
    error[3, 3] = 12 * np.abs(noise).max()
    found = measure(error, noise, truth)
    assert found.rmse < found.most_rmse and not found.ok
    error[3, 3] = 7 * np.abs(noise).max()
    assert measure(error, noise, truth).ok


def test_figures_against_numpy() -> None:
    noise, truth = arrays()
    error = arrays(1)[0]
    found = measure(error, noise, truth)
    assert math.isclose(found.rmse, math.sqrt((error**2).mean()), rel_tol=1e-6)
    assert math.isclose(found.ratio, math.sqrt((error**2).mean() / (noise**2).mean()), rel_tol=1e-6)
    assert math.isclose(found.error_max, np.abs(error).max(), rel_tol=1e-6)
    assert math.isclose(found.floor, 8 * 2.0**-23 * math.sqrt((truth**2).mean()), rel_tol=1e-6)


def test_yardstick_without_noise_leaves_the_floor() -> None:
    _, truth = arrays()
    none = np.zeros_like(truth)
    assert measure(none, none, truth).ok and measure(none, none, truth).ratio == 0
    assert measure(none + 5e-7, none, truth).ok
    assert not measure(none + 5e-6, none, truth).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_never_pass(bad: float) -> None:
    noise, truth = arrays()
    error = noise.copy()
    error[0, 0] = bad
    assert not measure(error, noise, truth).ok


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7))
def test_sums_do_not_depend_on_how_tokens_are_split(cut: int) -> None:
    noise, truth = arrays()
    error = arrays(1)[0]
    whole, pooled = measure(error, noise, truth), Measure("logits", EPSILON["float32"])
    for rows in (slice(0, cut), slice(cut, None)):
        exact = torch.from_numpy(truth[rows])
        values = (torch.from_numpy(part[rows]) for part in (error, noise))
        pooled.add(*(Errors.of(exact + value, exact) for value in values), exact)
    assert math.isclose(whole.rmse, pooled.rmse, rel_tol=1e-12) and whole.error_max == pooled.error_max


def test_single_precision_values_are_widened_before_subtraction() -> None:
    exact = torch.tensor([[1 / 3, 2.0]], dtype=torch.float64)
    errors = Errors.of(exact.float(), exact)
    assert 0 < float(errors.largest[0]) < 2.0**-24


def test_similarity_against_torch() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(0, 3, (5, 40))
    values = (truth + random.normal(0, 0.1, truth.shape)).astype(np.float32)
    found = LogitSimilarity()
    found.add(torch.from_numpy(values), torch.from_numpy(truth), 0.0)
    c, t = torch.from_numpy(values).double(), torch.from_numpy(truth)
    divergence = torch.nn.functional.kl_div(c.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True)
    assert math.isclose(found.max_divergence, float(divergence.sum(1).max()), rel_tol=1e-9)
    assert math.isclose(found.min_cosine, float(torch.cosine_similarity(c, t, 1).min()), rel_tol=1e-9)
    assert found.same_top == int((c.argmax(1) == t.argmax(1)).sum())


def test_ties_within_the_noise_count_as_agreement() -> None:
    truth = torch.tensor([[1.0, 1.0 + 1e-7, 0.0]], dtype=torch.float64)
    values = torch.tensor([[1.0 + 1e-6, 1.0, 0.0]], dtype=torch.float64)
    strict, aware = LogitSimilarity(), LogitSimilarity()
    strict.add(values, truth, 0.0)
    aware.add(values, truth, 1e-6)
    assert (strict.top1, aware.top1) == (0.0, 1.0)


def test_significant() -> None:
    assert (significant(0.0012345), significant(math.inf), significant(math.nan)) == (0.00123, None, None)


def test_few_numbers_are_judged_by_the_typical_value() -> None:
    """An error that is usual elsewhere must not fail because a number or the yardstick's error is small by chance."""
    small = np.full((1, 1), 0.01)
    found = measure(np.full((1, 1), 5e-7), np.full((1, 1), 1e-8), small)
    assert not found.ok
    found.typical = 1.0
    assert found.ok
    found = measure(np.full((1, 1), 5e-6), np.full((1, 1), 1e-8), small)
    found.typical = 1.0
    assert not found.ok


def test_few_tokens_are_judged_by_the_usual_noise() -> None:
    """A yardstick that is lucky on 7 tokens does not fail a correct candidate; on 8 tokens it counts."""

    def measure(tokens: int) -> Measure:
        truth = torch.ones(tokens, 10, dtype=torch.float64)
        found = Measure("logits", 2.0**-23, usual_rmse=1e-4, usual_max=3e-4)
        found.add(Errors.of(truth + 2e-4, truth), Errors.of(truth + 1e-6, truth), truth)
        return found

    assert measure(7).ok
    assert not measure(8).ok
    worse = measure(7)
    worse.usual_rmse = worse.usual_max = 1e-5
    assert not worse.ok
