from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import cast, transpose
from gptconvert.targets.onnx.foreign import orientations
from gptconvert.verify.foreign import as_stored
from gptconvert.verify.weights import Pair, WeightReport, compare, difference, first_difference
from tests.helpers import computed_tensors, stored_tensors
from tests.verify.exports import tiny


def lazy(array: np.ndarray[Any, Any]) -> LazyTensor:
    return computed_tensors({"x": array})["x"]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), max_size=3).map(tuple),
    dtype=st.sampled_from([np.float32, np.float16, np.int8]),
    place=st.integers(0, 10_000),
)
def test_first_difference_is_found_at_any_index(shape: tuple[int, ...], dtype: Any, place: int) -> None:
    array = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    assert first_difference(lazy(array), lazy(array.copy())) is None
    other = array.copy()
    other.reshape(-1)[place % array.size] += 1
    assert first_difference(lazy(array), lazy(other)) == place % array.size


def test_stored_in_files_against_computed(tmp_path: Path) -> None:
    """More than one block, odd offsets, a transpose on one side."""
    array = np.random.default_rng(0).normal(size=(700, 900)).astype(np.float32)
    stored = stored_tensors(tmp_path / "a", {"w": array})["w"]
    assert first_difference(stored, lazy(array)) is None
    assert first_difference(transpose(stored), lazy(array.T.copy())) is None
    other = array.copy()
    other[650, 7] += 1
    (tmp_path / "other").mkdir()
    wrong = stored_tensors(tmp_path / "other" / "b", {"w": other})["w"]
    assert first_difference(stored, wrong) == 650 * 900 + 7
    assert difference("w", stored, wrong) == "w: differs from its source, first at element [650, 7]"


def test_transposed_tensors_are_compared_as_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    other = array.copy()
    other[5, 2] += 1
    expected, wrong = (
        transpose(stored_tensors(tmp_path / str(i), {"w": a})["w"]) for i, a in enumerate((array, other))
    )
    monkeypatch.setattr(type(expected), "read", lambda *_: pytest.fail("transposed in memory, which is slower"))
    assert difference("w", expected, expected) is None
    assert difference("w", expected, wrong) == "w: differs from its source, first at element [2, 5]"


def test_signed_zeros_differ_and_equal_nans_match() -> None:
    """Bytes are compared, not numbers."""
    assert first_difference(lazy(np.array([0.0])), lazy(np.array([-0.0]))) == 0
    assert first_difference(lazy(np.array([np.nan])), lazy(np.array([np.nan]))) is None


def test_every_problem_is_listed() -> None:
    a, b = lazy(np.zeros((2, 3), np.float32)), lazy(np.ones((2, 3), np.float32))
    other, narrow = lazy(np.zeros((3, 2), np.float32)), lazy(np.zeros((2, 3), np.float16))
    report = compare(
        WeightReport(4),
        [Pair("d", "d", a, b), Pair("c", "c", a, other), Pair("b", "b", a, narrow), Pair("a", "a", a, a)],
    )
    assert report.problems == [
        "b: expected float32, found float16",
        "c: expected shape [2, 3], found [3, 2]",
        "d: differs from its source, first at element [0, 0]",
    ]
    assert (report.equal, report.nbytes, report.ok) == (1, 24, False)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([("Gemm", ["x", "w"], ["y"], {"transB": 1})], {False}),
        ([("Gemm", ["x", "w"], ["y"], {})], {True}),
        ([("MatMul", ["x", "w"], ["y"], {})], {True}),
        ([("Cast", ["w"], ["c"], {"to": TensorProto.FLOAT}), ("MatMul", ["x", "c"], ["y"], {})], {True}),
        ([("Transpose", ["w"], ["t"], {"perm": [1, 0]}), ("MatMul", ["x", "t"], ["y"], {})], {False}),
        ([("Gather", ["w", "i"], ["y"], {})], {False}),
        ([("Gather", ["w", "i"], ["a"], {}), ("MatMul", ["x", "w"], ["y"], {})], {False, True}),
        ([("Gather", ["w", "i"], ["a"], {}), ("Gemm", ["x", "w"], ["y"], {"transB": 1})], {False}),
    ],
)
def test_orientation_is_read_from_the_graph(nodes: list[Any], expected: set[bool]) -> None:
    made = [helper.make_node(kind, ins, outs, **attributes) for kind, ins, outs, attributes in nodes]
    weight = onnx.numpy_helper.from_array(np.zeros((3, 3), np.float32), "w")
    assert orientations(helper.make_graph(made, "g", [], [], [weight])) == {"w": expected}


def test_as_stored(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    assert as_stored(checkpoint, checkpoint.weights.values()) is checkpoint
    half = [lazy(np.zeros(9, np.float16)), lazy(np.zeros(3, np.float32)), lazy(np.zeros(99, np.int64))]
    assert {w.dtype for w in as_stored(checkpoint, half).weights.values()} == {np.dtype(np.float16)}
    assert as_stored(checkpoint, []) is checkpoint


def test_as_stored_in_several_types(tmp_path: Path) -> None:
    """A mixed checkpoint stays mixed if stored so; stored in one type, it is cast to that type."""
    checkpoint = tiny(tmp_path)
    mixed = dataclasses.replace(
        checkpoint,
        weights={n: cast(w, np.dtype(np.float16)) if "ln_" in n else w for n, w in checkpoint.weights.items()},
    )
    assert as_stored(mixed, mixed.weights.values()) is mixed
    whole = as_stored(mixed, checkpoint.weights.values())
    assert {w.dtype for w in whole.weights.values()} == {np.dtype(np.float32)}
