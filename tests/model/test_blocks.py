"""Block quantisation: onnxruntime's own quantiser as witness, bounds on the error, any order of reading."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptconvert.model import blocks
from gptconvert.model.blocks import CODES, SCALES, BlockEncoding, BlockFormat, ordered_sum
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.transforms import transpose
from tests.helpers import computed_tensors

Matrix = NDArray[Any]


def encode(matrix: Matrix, bits: int, block: int = 16, search: bool = False) -> tuple[Matrix, Matrix, Matrix]:
    """(codes, scales, decoded) of a matrix."""
    weight, encoding = computed_tensors({"w": matrix})["w"], BlockEncoding(BlockFormat(bits, block), search)
    parts = encoding.encode(weight)
    decoded = encoding.decode(parts, matrix.shape)
    return parts[CODES].read(), parts[SCALES].read(), decoded.read()


def normal(rows: int, columns: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(0, 0.2, (rows, columns)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_equals_onnxruntimes_quantiser(bits: int, block: int) -> None:
    from onnxruntime.capi import _pybind_state

    matrix = normal(37, 200)
    columns = -(-200 // block)
    codes, scales = np.zeros((37, columns, block * bits // 8), np.uint8), np.zeros(37 * columns, np.float32)
    zeros = np.zeros((37, -(-columns * bits // 8)), np.uint8)
    quantise = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    quantise(codes, np.ascontiguousarray(matrix.T), scales, zeros, block, 37, 200, True)
    ours = encode(matrix, bits, block)
    assert np.array_equal(ours[1].ravel(), scales)
    used = 200 * bits // 8  # onnxruntime leaves the padding of the last block undefined
    assert np.array_equal(ours[0].reshape(37, -1)[:, :used], codes.reshape(37, -1)[:, :used])


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 70), st.sampled_from([4, 8]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_error_is_at_most_half_a_step(seed: int, rows: int, columns: int, bits: int, search: bool) -> None:
    """Except for elements beyond the range of the codes, which are clipped to its end."""
    matrix = normal(rows, columns, seed) * np.float32(10.0 ** (seed % 20 - 10))
    codes, scales, decoded = encode(matrix, bits, 16, search)
    unpacked = BlockFormat(bits, 16).unpack(codes).reshape(rows, -1)[:, :columns]
    step = np.abs(np.repeat(scales, 16, axis=1)[:, :columns])
    inside = (unpacked > 0) & (unpacked < 2**bits - 1)
    assert (np.abs(decoded - matrix)[inside] <= 0.5001 * step[inside]).all()
    assert (np.abs(decoded - matrix) <= 2.6 * step).all()


def test_search_never_increases_the_error() -> None:
    matrix = normal(50, 144)
    errors = [((encode(matrix, 4, 16, bool(s))[2] - matrix).reshape(50, 9, 16) ** 2).sum(-1) for s in (0, 1)]
    assert (errors[1] <= errors[0] * 1.0001).all()
    assert errors[1].sum() < 0.93 * errors[0].sum()


def test_zeros_tiny_and_constant_blocks() -> None:
    matrix = np.zeros((3, 16), np.float32)
    matrix[1], matrix[2] = 1e-42, 3.0
    for bits in (4, 8):
        for search in (False, True):
            codes, scales, decoded = encode(matrix, bits, 16, search)
            assert np.isfinite(scales).all() and scales[0] == 0
            assert (decoded[0] == 0).all() and (np.abs(decoded[1]) <= 1e-41).all() and (decoded[2] == 3).all()
            assert (BlockFormat(bits, 16).unpack(codes)[0] == 1 << (bits - 1)).all()


@pytest.mark.parametrize("search", [False, True])
def test_bytes_depend_neither_on_slabs_nor_on_the_order_of_reading(search: bool, monkeypatch: Any) -> None:
    matrix = normal(150, 90)
    weight, encoding = computed_tensors({"w": matrix})["w"], BlockEncoding(BlockFormat(4, 16), search)
    whole = encoding.encode(weight)
    codes, scales = whole[CODES].read(), whole[SCALES].read()
    monkeypatch.setattr(blocks, "SLAB_BYTES", 90 * 4 * 64)
    parts = encoding.encode(weight)
    assert np.array_equal(parts[SCALES].read((slice(3, 131), slice(1, 4))), scales[3:131, 1:4])
    pieces = [parts[CODES].read((slice(i, min(i + 7, 150)), slice(0, 6), slice(0, 8))) for i in range(0, 150, 7)]
    assert np.array_equal(np.concatenate(pieces), codes)
    assert np.array_equal(np.concatenate(list(parts[SCALES].chunks(200))), scales)


def test_transposed_and_16_bit_sources() -> None:
    matrix = normal(48, 33)
    weight = transpose(computed_tensors({"w": np.ascontiguousarray(matrix.T)})["w"])
    parts = BlockEncoding(BlockFormat(8, 16)).encode(weight)
    assert np.array_equal(parts[CODES].read(), encode(matrix, 8)[0])
    for dtype in (np.float16, BFLOAT16):
        narrow = matrix.astype(dtype)
        assert np.array_equal(encode(narrow, 8)[0], encode(narrow.astype(np.float32), 8)[0])


def test_decoded_rows_and_columns() -> None:
    matrix = normal(10, 50)
    encoding = BlockEncoding(BlockFormat(4, 16))
    decoded = encoding.decode(encoding.encode(computed_tensors({"w": matrix})["w"]), (10, 50))
    assert np.array_equal(decoded.read((slice(2, 5), slice(7, 49))), decoded.read()[2:5, 7:49])


def test_sum_is_in_halves() -> None:
    values = np.array([1e8, 1.0, -1e8, 1.0], np.float32)
    assert ordered_sum(values[None]) == (np.float32(1e8) - np.float32(1e8)) + (np.float32(1) + np.float32(1))


#: Prints a digest of a recipe's bytes on a model with blocks of all kinds: usual, tiny, huge, zero.
DIGEST = """
import hashlib, sys
import numpy as np
from gptconvert.model.blocks import CODES, SCALES, BlockEncoding, BlockFormat
from tests.helpers import computed_tensors

random, digest = np.random.default_rng(0), hashlib.sha256()
for dtype in (np.float32, np.float16):
    matrix = random.normal(0, 0.02, (333, 300))
    matrix[::7] *= 10.0 ** random.integers(-6, 4, 48)[:, None]
    matrix[3, 40:80] = 0
    weight = computed_tensors({"w": matrix.astype(dtype)})["w"]
    for bits, search in ((8, False), (4, False), (4, True)):
        for block in (16, 32, 128):
            parts = BlockEncoding(BlockFormat(bits, block), search).encode(weight)
            digest.update(parts[CODES].read().tobytes() + parts[SCALES].read().tobytes())
from numpy._core._multiarray_umath import __cpu_features__ as features
assert not any(features[name] for name in sys.argv[1:])
print(digest.hexdigest())
"""


def digest_with(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    run = [sys.executable, "-c", DIGEST, *arguments]
    return subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout


def test_bytes_depend_neither_on_threads_nor_on_the_processor() -> None:
    """Other numbers of threads, another BLAS kernel, and numpy without its vector instructions."""
    from numpy._core._multiarray_umath import (  # type: ignore[attr-defined]
        __cpu_baseline__,
        __cpu_dispatch__,
        __cpu_features__,
    )

    vector = [name for name in __cpu_dispatch__ if __cpu_features__[name] and name not in __cpu_baseline__]
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    found = {
        digest_with(),
        digest_with(**threads, OPENBLAS_CORETYPE="Prescott"),
        digest_with(*vector, NPY_DISABLE_CPU_FEATURES=" ".join(vector)),
    }
    assert len(found) == 1
