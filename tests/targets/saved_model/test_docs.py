"""The examples in docs/serving.md are real answers of the signatures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.model.options import Options
from gptconvert.pipeline import open_checkpoint
from gptconvert.targets.saved_model.contract import inputs_of
from gptconvert.targets.saved_model.plan import plan
from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess
from reference_model.config import GPTConfig
from tests.helpers import FIXTURES, ROOT
from tests.targets.saved_model.support import write

pytestmark = pytest.mark.tensorflow

TEXT = (ROOT / "docs/serving.md").read_text()
GENERATE, REPLY, LAST = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture
def config(shared: TensorFlowProcess, tmp_path: Path) -> GPTConfig:
    """Load the model of the page; return its configuration."""
    checkpoint = open_checkpoint(str(FIXTURES / "tiny-gpt2/openai-tf"))
    shared.ask("load", path=str(write(tmp_path, plan(checkpoint, Options())[0].files)))
    return checkpoint.config


def feeds(config: GPTConfig, signature: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """JSON inputs as arrays of the signature's types, as in TensorFlow Serving."""
    return {name: np.asarray(inputs[name], kind) for name, (kind, _) in inputs_of(config, signature).items()}


def test_the_examples(config: GPTConfig, shared: TensorFlowProcess) -> None:
    name = GENERATE["signature_name"]
    sequences = shared.run(name, feeds(config, name, GENERATE["inputs"]))["sequences"]
    assert {"outputs": sequences.tolist()} == REPLY
    assert "[[" + " ".join(f"{i:2d}" for i in sequences[0]) + "]]" in TEXT

    rows = {key: [row[key] for row in LAST["instances"]] for key in LAST["instances"][0]}
    assert shared.run(LAST["signature_name"], feeds(config, "last_logits", rows))["logits"].shape == (2, 97)

    wrong = {"input_ids": np.array([[97]]), "attention_mask": np.array([[1]])}
    documented = re.search(r"ends in\s+`([^`]*)`", TEXT)
    assert documented is not None
    with pytest.raises(TensorFlowError, match=documented[1]):
        shared.run("serving_default", wrong)


def test_the_python_code(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(FIXTURES / "tiny-gpt2/openai-tf"))
    write(tmp_path / "out", plan(checkpoint, Options())[0].files)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    check = "\nassert logits.shape == (1, 97)"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
