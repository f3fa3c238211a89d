"""LiteRT: the signatures convert with its built-in operators alone, and compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.model.options import Options
from gptconvert.targets.saved_model.plan import plan
from gptconvert.targets.saved_model.process import TensorFlowProcess
from tests.families.witness import Case
from tests.targets.saved_model.support import understood, write

pytestmark = pytest.mark.tensorflow

ERF = Case("gpt2", keys={"activation_function": "gelu"}, name="erf")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [Case("gptj"), Case("gpt_neox"), ERF], ids=str)
def test_converts_with_built_in_operators(
    case: Case, tf: Any, shared: TensorFlowProcess, saved: Path, tmp_path: Path
) -> None:
    """No float64 (which needs TensorFlow's own kernels), and an exact GELU that the converter recognises."""
    checkpoint = understood(case, saved)
    path = str(write(tmp_path, plan(checkpoint, Options())[0].files))
    converter = tf.lite.TFLiteConverter.from_saved_model(path, signature_keys=["serving_default", "decode"])
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    assert "GELU" in {op["op_name"] for op in interpreter._get_ops_details()}

    ids, config = np.arange(14).reshape(2, 7), checkpoint.config
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    check(interpreter, tf, path, "serving_default", feeds)
    feeds["position_ids"] = np.arange(7)[np.newaxis].repeat(2, 0) + (1500 if config.rotary else 30)
    past = np.zeros((2, config.n_head, 0, config.head_dim), np.float32)
    for i in range(config.n_layer):
        feeds |= {f"past_key_values.{i}.key": past, f"past_key_values.{i}.value": past}
    check(interpreter, tf, path, "decode", feeds)


def check(interpreter: Any, tf: Any, path: str, signature: str, feeds: dict[str, Any]) -> None:
    found = interpreter.get_signature_runner(signature)(**feeds)["logits"]
    tensors = {name: tf.constant(array) for name, array in feeds.items()}
    expected = tf.saved_model.load(path).signatures[signature](**tensors)["logits"].numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
