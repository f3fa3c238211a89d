"""ggml's block types: the bytes are those of the gguf package, and so is what they decode to."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from gptconvert.errors import UnsupportedError
from gptconvert.model import blocks
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.ggml import FORMATS
from gptconvert.model.tensors import Computed, LazyTensor


def lazy(array: Any) -> LazyTensor:
    return Computed(lambda box: array[box], array.dtype, array.shape)


def matrix(seed: int = 0) -> Any:
    """Rows of every size, zeros, ties, a block whose largest elements have both signs, and rounding to halves."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((97, 96)) * random.choice([1e-9, 1e-3, 1, 1e4], (97, 1))
    rows[3], rows[4, :40] = 0, 0
    rows[5] = np.round(rows[5] * 4) / 2
    rows[6, :32], rows[7, :32], rows[8, :32] = np.arange(32) - 16, -np.arange(32), np.tile([127, -127, 63.5, 0.5], 8)
    return rows.astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, BFLOAT16], ids=lambda t: np.dtype(t).name)
def test_bytes_and_values_are_those_of_the_gguf_package(name: str, dtype: Any) -> None:
    rows, kind = matrix().astype(dtype), gguf.GGMLQuantizationType[name]
    expected = gguf.quants.quantize(rows.astype(np.float32), kind)
    encoded = FORMATS[name].encode(lazy(rows))[""]
    assert np.array_equal(encoded.read(), expected)
    assert np.array_equal(np.concatenate([*encoded.chunks(1000)]), expected)
    decoded = FORMATS[name].decode({"": encoded}, rows.shape)
    values = gguf.quants.dequantize(expected, kind)
    assert np.array_equal(decoded.read(), values)
    assert np.array_equal(decoded.read((slice(3, 9), slice(5, 50))), values[3:9, 5:50])


@pytest.mark.parametrize("name", FORMATS)
def test_slabs_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = matrix(1)
    whole = FORMATS[name].encode(lazy(rows))[""].read()
    monkeypatch.setattr(blocks, "SLAB_BYTES", 64 * 96 * 4)
    assert np.array_equal(FORMATS[name].encode(lazy(rows))[""].read(), whole)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_whose_scale_overflows_float16(name: str) -> None:
    rows = np.full((2, 32), 1e8, np.float32)
    with pytest.raises(UnsupportedError, match="float16"):
        FORMATS[name].encode(lazy(rows))[""].read()
