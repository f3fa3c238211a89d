"""The JavaScript of the model card runs as printed, in headless Chromium, and computes what onnxruntime computes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.generation.model import generate
from gptconvert.generation.sampling import Sampling
from gptconvert.model.options import Options
from reference_model.config import OUTPUTS
from tests.families.witness import BY_TASK, Case
from tests.targets.package.small_exports import export, snippets

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CASES = {
    **{str(case): (case, Options(task=case.task)) for case in BY_TASK if case.task != "multiple-choice"},
    **{
        f"{case}-fp16": (case, Options(task=case.task, dtype="fp16"))
        for case in (Case("gpt2"), Case("gpt1"), Case("gpt_neox", "text-classification"))
    },
    "cached": (Case("gpt2", "feature-extraction"), Options(task="feature-extraction", kv_cache=True)),
    "positions": (Case("gptj", "question-answering"), Options(task="question-answering", position_ids=True)),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("node") and (HERE / "node_modules").is_dir()),
        reason="no Node or npm packages: make test-web",
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {name: export(case, root, options) for name, (case, options) in CASES.items()}


@pytest.fixture(scope="module")
def printed(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the snippet of each export writes to the console."""
    root = tmp_path_factory.mktemp("pages")
    for name, directory in exports.items():
        (root / name / "models").mkdir(parents=True)
        (root / name / "models/my-model").symlink_to(directory)
        (root / name / "snippet.mjs").write_text(snippets(directory, "js")["transformers.js"])
    done = subprocess.run(
        ["node", HERE / "snippets.mjs", root, str(CHROMIUM)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("name", CASES)
def test_snippet(
    name: str, exports: dict[str, Path], printed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, _ = CASES[name]
    assert "error" not in printed[name], printed[name]
    found = printed[name]["written"]
    if case.task == "text-generation":
        text = found[0][0]["generated_text"]
        expected = "Hello" + generate(str(exports[name]), "Hello", Sampling(max_new_tokens=20)).text
        if case.family == "gpt1":  # decoding puts spaces between words, and the prompt is not in lower case
            text, expected = (shown.lower().replace(" ", "") for shown in (text, expected))
        assert text == expected
        return
    monkeypatch.chdir(exports[name])
    space: dict[str, Any] = {}
    exec(snippets(exports[name], "python")["onnxruntime"], space)
    for output, values in zip(OUTPUTS[case.task], found, strict=True):
        np.testing.assert_allclose(np.array(values), space[output], atol=1e-4 * np.abs(space[output]).max())
