"""``generate --variant``: which graph runs, and decoding with a cache that stays in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptconvert.errors import InputError, UsageError
from gptconvert.generation.model import generate
from gptconvert.generation.results import Generated
from gptconvert.generation.sampling import Sampling
from gptconvert.kernels.library import import_onnxruntime
from gptconvert.model.options import Options
from gptconvert.pipeline import convert
from gptconvert.targets.onnx import decoding
from gptconvert.targets.onnx.decoding import Decoding, DecodingInPlace
from gptconvert.targets.onnx.run import find_onnx
from tests.helpers import FIXTURES

PROMPT = "Objects are"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("variants") / "out"
    options = Options(quantize=("q8", "q4", "fp16"), in_place=True, last_token=True, verify=None)
    convert(FIXTURES / "gpt2-stdlib", output, options)
    return str(output)


def written(directory: str, variant: str | None, **fields: Any) -> tuple[str, Generated]:
    running = generate(directory, PROMPT, Sampling(24, **fields), variant=variant)
    return running.text, running


@pytest.mark.parametrize("variant", [None, "fp32", "q8", "fp16"])
def test_variants_write_the_same_text(variant: str | None, directory: str) -> None:
    text, running = written(directory, variant)
    assert text == " never explicitly destroyed; however, when they become unreachable they may be garbage-colle"
    assert running.speed is not None
    assert running.speed > 0


def test_q4_writes_too(directory: str) -> None:
    assert written(directory, "q4")[0]


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        (None, "model_in_place.onnx"),
        ("fp32", "model_in_place.onnx"),
        ("q8", "model_quantized_in_place.onnx"),
        ("q4", "model_q4_in_place.onnx"),
        ("fp16", "model_fp16.onnx"),
    ],
)
def test_the_graph_in_place_is_preferred(variant: str | None, name: str, directory: str) -> None:
    assert Path(find_onnx(directory, variant)).name == name


def test_a_variant_that_does_not_exist(directory: str) -> None:
    with pytest.raises(InputError, match="no such ONNX graph") as caught:
        generate(directory, PROMPT, Sampling(1), variant="bf16")
    assert caught.value.hint == "this export has fp32, q8, q4, fp16"


def test_variants_are_onnx_graphs(directory: str) -> None:
    with pytest.raises(UsageError, match="no effect with --runtime torch"):
        generate(directory, PROMPT, Sampling(1), "torch", "q8")
    with pytest.raises(UsageError, match="no such variant"):
        generate(directory, PROMPT, Sampling(1), variant="q3")


def test_buffers_grow(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of several tokens, and more tokens than the first buffers hold."""
    monkeypatch.setattr(decoding, "SMALLEST_BUFFER", 4)
    session = import_onnxruntime().InferenceSession
    growing = Decoding(session(f"{directory}/onnx/model.onnx"))
    in_place = DecodingInPlace(session(f"{directory}/onnx/model_in_place.onnx"))
    for ids in ([1, 2, 3], [4], [5, 6, 7, 8, 9], [10], [11], *([n] for n in range(12, 40))):
        assert in_place.step([ids], [0]) == pytest.approx(growing.step([ids], [0]), abs=2e-5)
    assert in_place.room == 72
