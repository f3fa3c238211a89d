"""The variables of a SavedModel: index and strings as TensorFlow writes them, tensors unchanged."""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from gptconvert.containers.tf_bundle import read_bundle
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.targets.saved_model.bundle import OBJECT_GRAPH_KEY, plan_bundle
from gptconvert.targets.saved_model.plan import BuiltGraph
from tests.helpers import computed_tensors
from tests.targets.saved_model.support import file_bytes


def test_tensors_read_back_unchanged(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "h.0.w": random.standard_normal((5, 7)).astype(np.float32),
        "a": random.standard_normal(3).astype(BFLOAT16),
        "b": random.standard_normal((2, 3)).astype(np.float16),
    }
    keys = {name: f"weights/{name}" for name in arrays}
    graph = BuiltGraph(b"", b"objects" * 100, keys)
    files = plan_bundle("variables", computed_tensors(arrays).tensors, lambda stop: graph)
    for file in files:
        (tmp_path / file.path).parent.mkdir(exist_ok=True)
        (tmp_path / file.path).write_bytes(file_bytes(file))
    found = read_bundle(str(tmp_path / "variables/variables"))
    assert set(found) == set(keys.values())
    for name, array in arrays.items():
        assert found[keys[name]].dtype == array.dtype
        np.testing.assert_array_equal(found[keys[name]].read(), array)
        assert found[keys[name]].crc32c == google_crc32c.value(array.tobytes())  # type: ignore[attr-defined]
    assert all(placed.offset % 64 == 0 for placed in files[0].tensors)
    assert OBJECT_GRAPH_KEY in found.notes[0]


def test_weights_are_laid_out_before_the_graph_is_built() -> None:
    arrays = {f"h.{i}.w": np.full(3, i, np.float32) for i in range(40)}
    tensors = computed_tensors(arrays).tensors
    data, objects, index = plan_bundle("v", tensors, lambda stop: pytest.fail("the graph was built"))
    assert data.finish is None
    assert [placed.name for placed in data.tensors] == sorted(arrays)
    assert None not in (objects.finish, index.finish)
