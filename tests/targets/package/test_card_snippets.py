"""Every Python snippet of the model card runs as printed, for every family, task and type, and computes the same.

``tests/web`` runs the JavaScript ones.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.model.options import Options
from reference_model.config import OUTPUTS
from tests.families.witness import BY_TASK, Case
from tests.targets.package.small_exports import export, snippets

DTYPES = (None, "fp16", "bf16")
#: Library of a snippet → the module that it needs, and the reason to skip.
LIBRARIES = {
    "optimum": ("optimum.onnxruntime", "optimum-onnx is not installed"),
    "onnxruntime-genai": ("onnxruntime_genai", "onnxruntime-genai is not installed"),
}
Exports = Callable[[Case, Options], Path]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Options of a case → its output directory."""
    root = tmp_path_factory.mktemp("exports")
    made: dict[tuple[Case, Options], Path] = {}

    def get(case: Case, options: Options) -> Path:
        if (case, options) not in made:
            made[case, options] = export(case, root, options)
        return made[case, options]

    return get


def run(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute a snippet in the output directory; returns its variables."""
    monkeypatch.chdir(directory)
    space: dict[str, Any] = {}
    exec(code, space)
    return space


def installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(LIBRARIES[library][0]) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_onnxruntime_and_transformers_compute_the_same(
    case: Case, dtype: str | None, exports: Exports, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    directory = exports(case, Options(task=case.task, dtype=dtype))
    found = snippets(directory, "python")
    ours, theirs = (run(found[name], directory, monkeypatch) for name in ("onnxruntime", "transformers"))
    assert capsys.readouterr().out
    if case.task == "text-generation":
        start = ours["ids"].shape[1]
        assert theirs["output"][0, :start].tolist() == ours["ids"][0].tolist()
        assert len(theirs["output"][0]) > start
        if dtype is None:
            assert theirs["output"][0, start] == ours["logits"][0, -1].argmax()
        return
    tolerance = {None: 1e-5, "fp16": 2e-2, "bf16": 1e-1}[dtype]  # transformers computes in the stored type
    for name in OUTPUTS[case.task]:
        expected = theirs["output"][name].detach().float().numpy()
        assert ours[name].shape == expected.shape
        real = ... if case.task != "multiple-choice" or name == "mc_logits" else np.s_[:, :, :2]  # no padding
        np.testing.assert_allclose(ours[name][real], expected[real], atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_other_libraries_are_offered_where_they_work(case: Case, exports: Exports) -> None:
    found = snippets(exports(case, Options(task=case.task)), "python")
    assert ("optimum" in found) == (case.task != "multiple-choice")
    assert ("onnxruntime-genai" in found) == (case.task == "text-generation")
    assert ("og.Tokenizer" in found.get("onnxruntime-genai", "og.Tokenizer")) == (
        case.family != "gpt1" or case.task != "text-generation"
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_other_libraries(library: str, exports: Exports, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if not installed(library):
        pytest.skip(LIBRARIES[library][1])
    for case in BY_TASK:
        for dtype in DTYPES:
            directory = exports(case, Options(task=case.task, dtype=dtype))
            if library in (found := snippets(directory, "python")):
                run(found[library], directory, monkeypatch)
                assert capsys.readouterr().out.strip(), directory.name


CHOICES = (
    Options(kv_cache=False),
    Options(kv_cache=True, task="feature-extraction"),
    Options(position_ids=True, task="feature-extraction"),
    Options(position_ids=True, task="text-classification"),
    Options(position_ids=True, task="multiple-choice"),
)


@pytest.mark.parametrize("options", CHOICES, ids=lambda o: f"{o.task}-cache-{o.kv_cache}-positions-{o.position_ids}")
def test_graphs_with_other_inputs(options: Options, exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache, or positions and a cache where other tasks usually have none."""
    task = options.task or "text-generation"
    directory = exports(Case("gpt2", task), options)
    found = snippets(directory, "python")
    assert run(found["onnxruntime"], directory, monkeypatch)[OUTPUTS[task][0]].size
    assert "onnxruntime-genai" not in found
    assert ("optimum" in found) == (task == "text-generation")
    if "optimum" in found and installed("optimum"):
        assert "use_cache=False" in found["optimum"]
        run(found["optimum"], directory, monkeypatch)


@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_javascript_is_offered_where_it_works(case: Case, exports: Exports) -> None:
    for dtype in DTYPES:
        directory = exports(case, Options(task=case.task, dtype=dtype))
        code, card = snippets(directory, "js").get("transformers.js"), (directory / "README.md").read_text("utf-8")
        assert (code is not None) == (dtype != "bf16" and case.task != "multiple-choice")
        assert ("transformers.js: browsers cannot read bfloat16" in card) == (dtype == "bf16")
        if code is not None:
            assert f'dtype: "{dtype or "fp32"}"' in code
            assert "env.allowLocalModels = true" in code
            assert ('model_type = "gpt2"' in code) == (case.family == "gpt1" and case.task == "text-generation")


def test_tokenizer_of_bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As in Chinese models: no token types, which GPT-2 takes for tokens, and no end after the prompt."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = {name: str(tmp_path / name) for name in ("vocab.txt", "tokenizer_config.json")}
    directory = export(Case("gpt2"), tmp_path, Options(), (tokenizer, 97))
    found = snippets(directory, "python")
    output = run(found["transformers"], directory, monkeypatch)["output"]
    assert output[0, 0] == words.index("hello")
    assert output[0, 1] != words.index("[SEP]")
    assert run(found["onnxruntime"], directory, monkeypatch)["logits"].shape[-1] == 97
    assert "Tokenizer.from_file" in found["onnxruntime-genai"]
    for library in LIBRARIES:
        if installed(library):
            run(found[library], directory, monkeypatch)
