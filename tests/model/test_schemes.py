"""Name tables: symbolic shapes, and round trips between stored and canonical tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.families.registry import FAMILIES
from gptconvert.model.schemes import (
    Bound,
    Row,
    canonical_shapes,
    concrete,
    expand,
    from_canonical,
    sizes_of,
    to_canonical,
)
from gptconvert.model.transforms import Transpose
from reference_model.config import GPTConfig
from tests.families.configs import configs
from tests.helpers import computed_tensors

SYMBOLS = "VCDHFK"
TERMS = st.tuples(st.none() | st.integers(0, 30), st.sampled_from(["", *SYMBOLS])).filter(
    lambda term: term != (None, "")
)


def spelled(term: tuple[int | None, str]) -> str:
    factor, symbol = term
    return f"{'' if factor is None else factor}{symbol}"


@given(st.lists(st.lists(TERMS, min_size=1, max_size=3), max_size=4), st.data())
def test_shapes_are_sums_of_multiples(axes: list[list[tuple[int | None, str]]], data: Any) -> None:
    sizes = {symbol: data.draw(st.integers(1, 50)) for symbol in SYMBOLS}
    shape = " ".join("+".join(map(spelled, terms)) for terms in axes)
    expected = tuple(
        sum((1 if factor is None else factor) * (sizes[symbol] if symbol else 1) for factor, symbol in terms)
        for terms in axes
    )
    assert concrete(shape, sizes) == expected


def test_shapes_of_released_tables() -> None:
    assert concrete("1 D 3D", {"D": 24}) == (1, 24, 72)
    assert concrete("C+2 D", {"C": 40, "D": 24}) == (42, 24)
    assert concrete("D+2K 2", {"D": 24, "K": 3}) == (30, 2)


@pytest.mark.parametrize("word", ["C-2", "C+", "+2", "2*D", "D3", "d", "X", "2X", "DD", "C++2", "C,", "1.5", "3 D!"])
def test_words_that_are_not_sizes_are_rejected(word: str) -> None:
    """If dropped silently, the shape would lose an axis."""
    with pytest.raises(ValueError, match="is not a size") as error:
        concrete(f"{word} D", {"C": 40, "D": 24})
    assert repr(word.split()[-1]) in str(error.value)
    assert repr(f"{word} D") in str(error.value)


@given(st.text("CDX0123+-. ", max_size=6))
def test_no_word_is_dropped(shape: str) -> None:
    try:
        found = concrete(shape, {"C": 40, "D": 24})
    except ValueError:
        return
    assert len(found) == len(shape.split())


def test_rows_with_sums(tmp_path: Any) -> None:
    """A position table with two more rows than positions, as in OPT."""
    config = GPTConfig(
        family="gpt2",
        vocab_size=9,
        n_ctx=5,
        n_embd=3,
        n_layer=1,
        n_head=1,
        n_inner=4,
        attn_scale=(1.0,),
        attn_window=(None,),
    )
    [bound] = expand([Row("wpe.weight", "positions", "D C+2", (Transpose(),))], config)
    assert bound.shape == (3, 7)
    assert canonical_shapes([bound.row], config) == {"wpe.weight": (7, 3)}


# --- every scheme of every family ----------------------------------------------------------------------------------

SCHEMES = [
    pytest.param(family, scheme, id=f"{family.name}-{scheme.name}")
    for family in FAMILIES
    for scheme in family.schemes
]


def stored_arrays(bounds: list[Bound]) -> dict[str, Any]:
    """Arrays in which every element is unique."""
    arrays, start = {}, 0
    for bound in bounds:
        for name in bound.stored:
            count = int(np.prod(bound.shape))
            arrays[name] = np.arange(start, start + count, dtype=np.float64).reshape(bound.shape)
            start += count
    return arrays


@pytest.mark.parametrize(("family", "scheme"), SCHEMES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_tensors_round_trip(family: Any, scheme: Any, data: Any) -> None:
    """From the file's layout to the canonical one and back, and in the opposite order."""
    config = data.draw(configs(family.name, tasks=scheme is family.hf))
    sizes, bounds = sizes_of(config), expand(scheme.rows, config, scheme.write_prefix)
    arrays = stored_arrays(bounds)
    tensors, shapes = computed_tensors(arrays), canonical_shapes(scheme.rows, config)
    assert len(arrays) == sum(len(bound.stored) for bound in bounds)
    for bound in bounds:
        canonical = to_canonical(bound, tensors, sizes)
        assert canonical.shape == shapes[bound.canonical] == canonical.read().shape
        again = from_canonical(bound, canonical, sizes)
        assert [*again] == [*bound.stored]
        assert all(np.array_equal(again[name].read(), arrays[name]) for name in again)
        fresh = computed_tensors({"x": canonical.read()})["x"]
        written = from_canonical(bound, fresh, sizes)
        assert all(written[name].shape == bound.shape for name in written)
        assert np.array_equal(to_canonical(bound, written, sizes).read(), canonical.read())
