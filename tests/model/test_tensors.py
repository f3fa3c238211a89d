"""Blocks of transposed tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from gptconvert.model import tensors
from gptconvert.model.tensors import Cast, LazyTensor, Segment, Stored, Transposed, row_major

KINDS = ["<f4", "<f2", "<f8", "u1"]


@given(st.integers(0, 150), st.integers(0, 150), st.integers(1, 3), st.sampled_from(KINDS), st.booleans())
def test_row_major_keeps_every_element(rows: int, columns: int, step: int, kind: str, transposed: bool) -> None:
    values = (np.arange(rows * columns * step) % 251).astype(kind).reshape(rows, columns * step)[:, ::step]
    array = values.T if transposed else values
    found = row_major(array)
    assert (found.flags.c_contiguous, found.dtype) == (True, array.dtype)
    assert_array_equal(found, array)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)], ids=str)
def test_row_major_of_other_shapes(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).T
    assert_array_equal(row_major(array), array)
    assert row_major(array).flags.c_contiguous


def stored(path: Path, shape: tuple[int, ...]) -> Stored:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    values.tofile(path)
    return Stored((Segment(str(path), 0, values.nbytes),), values.dtype, shape)


def chunked(tensor: LazyTensor, nbytes: int) -> list[np.ndarray]:
    chunks = list(tensor.chunks(nbytes))
    assert all(chunk.flags.c_contiguous for chunk in chunks)
    return chunks


@pytest.mark.parametrize("slab", [1, 100, 200, 1 << 20])
@pytest.mark.parametrize("most", [1, 100, 150, 1 << 20])
def test_blocks_of_a_transpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab: int, most: int) -> None:
    monkeypatch.setattr(tensors, "_SLAB_BYTES", slab)
    base = stored(tmp_path / "data", (11, 7))
    for tensor in (Transposed(base), Transposed(Cast(base, np.dtype(np.float16)))):
        chunks, row = chunked(tensor, most), 11 * tensor.dtype.itemsize
        assert_array_equal(np.concatenate(chunks), base.read().T)
        assert max(chunk.nbytes for chunk in chunks) <= max(row, most)


def test_a_transpose_reads_its_base_in_as_few_slabs_as_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    base = stored(tmp_path / "data", (11, 7))
    read = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self, box=None: calls.append(box) or read(self, box))
    monkeypatch.setattr(tensors, "_SLAB_BYTES", 4 * 11 * 4)
    assert len(chunked(Transposed(base), 44)) == 7
    assert [(box[1].start, box[1].stop) for box in calls] == [(0, 4), (4, 7)]


@pytest.mark.parametrize("shape", [(7,), (3, 5, 2), (0, 4), (4, 0)], ids=str)
def test_blocks_of_other_transposes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    base = stored(tmp_path / "data", shape)
    joined = np.concatenate([chunk.reshape(-1) for chunk in chunked(Transposed(base), 12)] or [np.empty(0)])
    assert_array_equal(joined, base.read().T.reshape(-1))
