"""Resolving a file's tensors with a name table, for every scheme of every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.families.registry import FAMILIES
from gptconvert.model.resolution import resolve
from gptconvert.model.schemes import canonical_shapes, expand, write_names
from tests.families.configs import configs
from tests.helpers import computed_tensors

SCHEMES = [
    pytest.param(family, scheme, id=f"{family.name}-{scheme.name}")
    for family in FAMILIES
    for scheme in family.schemes
]


@pytest.mark.parametrize(("family", "scheme"), SCHEMES)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_written_names_resolve(family: Any, scheme: Any, data: Any) -> None:
    """Every tensor is found under its written name, and none is left over."""
    config = data.draw(configs(family.name, tasks=scheme is family.hf))
    bounds = expand(scheme.rows, config, scheme.write_prefix)
    weights = {bound.canonical: np.ones(canonical_shapes([bound.row], config)[bound.canonical]) for bound in bounds}
    written = write_names(scheme, config, computed_tensors(weights))
    found = resolve(scheme, config, written)
    assert found.weights.keys() == weights.keys()
    assert not found.dropped
    assert found.prefix == scheme.write_prefix
