"""Options in Python: every value is checked when it is given, and named in the error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import UsageError
from gptconvert.model.options import DEFAULTS, FIELDS, Options


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dtype", "int8", "one of fp32, fp16, bf16"),
        ("opset", 99, "one of 17, 18"),
        ("opset", "21", "one of 17, 18"),
        ("verify", "yes", "one of default, full"),
        ("task", "text", "one of text-generation"),
        ("max_shard_size", "lots", "such as 5GB"),
        ("max_shard_size", 0, "at least 1"),
        ("max_shard_size", 5e9, "a whole number"),
        ("n_head", "3", "a whole number"),
        ("n_head", 0, "at least 1"),
        ("n_head", True, "a whole number"),
        ("pad_token_id", -1, "at least 0"),
        ("targets", "onnx", "a tuple of text"),
        ("targets", (1,), "a tuple of text"),
        ("kv_cache", "no", "True or False"),
        ("force", 1, "True or False"),
        ("strict", None, "True or False"),
        ("hparams", 3, "text"),
        ("weights_file", b"x", "text"),
        ("weights_file", "", "not empty"),
        ("hparams", "", "not empty"),
        ("targets", (), "at least one"),
        ("set_key", ("n_head=3", "n_head=4"), "each key once"),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(**{name: value})
    assert name in caught.value.message
    assert expected in str(caught.value.expected)


def test_values_are_converted(tmp_path: Path) -> None:
    options = Options(
        hparams=tmp_path / "x.json",  # type: ignore[arg-type]
        cache_dir=tmp_path,  # type: ignore[arg-type]
        weights_file=Path("x.bin"),  # type: ignore[arg-type]
        scope="",
        max_shard_size="5MB",  # type: ignore[arg-type]
        n_head=np.int64(3),  # type: ignore[arg-type]
        targets=["onnx", "tf"],  # type: ignore[arg-type]
    )
    assert (options.hparams, options.cache_dir) == (str(tmp_path / "x.json"), str(tmp_path))
    assert (options.weights_file, options.scope) == ("x.bin", "")
    assert (options.max_shard_size, options.n_head, options.targets) == (5_000_000, 3, ("onnx", "tf"))
    assert type(options.n_head) is int
    assert options == Options(**{name: getattr(options, name) for name in FIELDS})


def test_defaults_are_valid() -> None:
    assert Options() == Options(**DEFAULTS)
    assert Options(verify=None).verify is None
