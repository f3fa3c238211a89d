"""One table decides whether a graph can generate text, in ONNX and in TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.targets.context import context_length, vocabulary_size
from gptconvert.targets.interface import check_interface
from gptconvert.targets.onnx.decoding import Decoding
from gptconvert.targets.saved_model.run import TensorFlowRuntime

IDS = ("int64", (None, None))
PAST = ("float32", (None, 3, None, 8))
INPUTS: Mapping[str, Any] = {"input_ids": IDS, "attention_mask": IDS, "past_key_values.0.key": PAST}
OUTPUTS: Mapping[str, Any] = {"logits": ("float32", (None, None, 97)), "present.0.key": PAST}


def test_a_graph_that_can_generate() -> None:
    assert check_interface(INPUTS, OUTPUTS, "m.onnx") == 97
    assert check_interface(INPUTS, {**OUTPUTS, "logits": ("float32", (None, None, "vocab"))}, "m.onnx") is None
    assert check_interface(INPUTS, {**OUTPUTS, "logits": ("float16", None)}, "m.onnx") is None
    assert check_interface({"input_ids": ("int32", (1, None))}, OUTPUTS, "m.onnx") == 97


def without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}


CHANGES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "input input_ids is missing": (without(INPUTS, "input_ids"), OUTPUTS),
    "input token_type_ids is unknown": ({**INPUTS, "token_type_ids": IDS}, OUTPUTS),
    "input attention_mask has the type float32, expected int64 or int32": (
        {**INPUTS, "attention_mask": ("float32", (None, None))},
        OUTPUTS,
    ),
    "input input_ids has 1 sizes, expected 2": ({**INPUTS, "input_ids": ("int64", (None,))}, OUTPUTS),
    "output logits is missing": (INPUTS, without(OUTPUTS, "logits")),
    "output logits has 2 sizes, expected 3": (INPUTS, {**OUTPUTS, "logits": ("float32", (None, 97))}),
    "output present.0.key is missing": (INPUTS, without(OUTPUTS, "present.0.key")),
    "output present.0.key has the type int64": (INPUTS, {**OUTPUTS, "present.0.key": ("int64", PAST[1])}),
    "expected a number as size 1": (
        {**INPUTS, "past_key_values.0.key": ("float32", (None, "heads", None, 8))},
        OUTPUTS,
    ),
    "expected a number as size 3": ({**INPUTS, "past_key_values.0.key": ("float32", (None, 3, None, -1))}, OUTPUTS),
    "has unknown sizes": ({**INPUTS, "past_key_values.0.key": ("float32", None)}, OUTPUTS),
}


@pytest.mark.parametrize("message", CHANGES)
def test_graphs_that_cannot_generate(message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_interface(*CHANGES[message], "m.onnx")
    assert str(caught.value).startswith("m.onnx: the graph cannot generate text")
    assert message in str(caught.value)


def test_many_problems_are_counted() -> None:
    inputs = {f"past_key_values.{i}.key": PAST for i in range(30)}
    with pytest.raises(UnsupportedError, match="… 22 more"):
        check_interface({**INPUTS, **inputs, "x": IDS, "y": IDS}, {"present.0.key": PAST}, "m.onnx")


@pytest.mark.parametrize(
    ("signatures", "message"),
    [
        ({"serving_default": {}}, "no signature `decode`"),
        ({"decode": {"inputs": {"input_ids": ["int64", [None, None]]}, "outputs": {}}}, "output logits is missing"),
    ],
)
def test_a_saved_model_whose_signatures_cannot_generate(signatures: Any, message: str) -> None:
    runtime, closed = object.__new__(TensorFlowRuntime), []
    runtime.path = "saved_model"
    runtime.close = lambda: closed.append(True)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match=message):
        runtime._check(signatures)
    assert closed


@pytest.mark.parametrize("value", [0, -1, True, "40", 1.5, 1 << 31, [40]])
def test_impossible_sizes(value: object) -> None:
    for function, key in ((context_length, "n_positions"), (vocabulary_size, "vocab_size")):
        with pytest.raises(InputError, match="wrong value") as caught:
            function({key: value})
        assert caught.value.item == key
    assert vocabulary_size({}) is None
    assert context_length({"n_positions": None, "max_position_embeddings": 40}) == 40


class Value:
    def __init__(self, name: str, kind: str, shape: list[object]) -> None:
        self.name, self.type, self.shape = name, kind, shape


class Session:
    """A graph of float16 and int32, whose cache is its inputs."""

    def __init__(self) -> None:
        self.fed: list[dict[str, Any]] = []

    def get_inputs(self) -> list[Value]:
        past = Value("past_key_values.0.key", "tensor(float16)", ["batch", 3, "past", 8])
        return [Value("input_ids", "tensor(int32)", [1, None]), past]

    def get_outputs(self) -> list[Value]:
        return [Value("logits", "tensor(float16)", []), Value("present.0.key", "tensor(float16)", [])]

    def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
        self.fed.append(feed)
        return [np.zeros((1, 2, 5), np.float16), np.ones((1, 3, 2, 8), np.float16)]


def test_values_have_the_types_of_the_graph() -> None:
    session = Session()
    decoding = Decoding(session)
    logits = [decoding.step([ids], [0]) for ids in ([1, 2], [3])]
    assert [each.dtype for each in logits] == [np.float32] * 2
    first, second = session.fed
    assert (first["input_ids"].dtype, first["past_key_values.0.key"].dtype) == (np.int32, np.float16)
    assert first["past_key_values.0.key"].shape == (1, 3, 0, 8)
    assert second["past_key_values.0.key"].shape == (1, 3, 2, 8)
    assert second["input_ids"].tolist() == [[3]]
