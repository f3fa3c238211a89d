"""A greedy continuation checked against another runtime's logits: every token matters, ties pass."""

from __future__ import annotations

import numpy as np
import pytest

from gptconvert.model.generation import SpecialIds
from gptconvert.verify.greedy import Continuation

#: Prompts of three tokens: whole, padded on the left, padded on the right; then three new tokens each.
IDS = np.array([[5, 6, 7, 1, 2, 3], [0, 6, 7, 4, 5, 6], [5, 6, 0, 7, 8, 9]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])
NO_IDS = SpecialIds()
#: Row, new token → index of the logits that choose it.
CHOSEN_AFTER = [[2, 3, 4], [2, 3, 4], [1, 3, 4]]


@pytest.fixture
def logits() -> np.ndarray:
    """Logits [3, 6, 10] under which these tokens are best; zeros at places that must not be read."""
    values = np.zeros((3, 6, 10), np.float32)
    for row, places in enumerate(CHOSEN_AFTER):
        for i, place in enumerate(places):
            values[row, place, IDS[row, 3 + i]] = 1.0
    return values


def test_same_text_passes(logits: np.ndarray) -> None:
    made = Continuation(IDS, MASK, 3, 0.0)
    assert list(made.unlikely(logits, NO_IDS, 0.0)) == []


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("i", range(3))
def test_every_token_matters(row: int, i: int, logits: np.ndarray) -> None:
    made = Continuation(IDS, MASK, 3, 0.0)
    logits[row, CHOSEN_AFTER[row][i], 0] = 1.5
    assert list(made.unlikely(logits, NO_IDS, 0.25)) == [f"token {i} of row {row} is {IDS[row, 3 + i]}"]
    assert list(made.unlikely(logits, NO_IDS, 0.5)) == []  # a tie, within the allowed distance


def test_nan_never_passes(logits: np.ndarray) -> None:
    assert len(list(Continuation(IDS, MASK, 3, 0.0).unlikely(logits * np.nan, NO_IDS, 1.0))) == 9


def test_only_padding_may_follow_the_end(logits: np.ndarray) -> None:
    special = SpecialIds(eos=(4, 96))
    made = Continuation(IDS, MASK, 3, 0.0)
    assert list(made.unlikely(logits, special, 0.0)) == ["token 1 of row 1 is 5", "token 2 of row 1 is 6"]
    ids = IDS.copy()
    ids[1, 4:] = 4
    assert list(Continuation(ids, MASK, 3, 0.0).unlikely(logits, special, 0.0)) == []
    assert Continuation(ids, MASK, 3, 0.0).ended((4,))[:, -1].tolist() == [False, True, False]
    assert not Continuation(ids, MASK, 3, 0.0).ended(()).any()
