"""The code, commands, outputs and messages in the documentation are real."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gptconvert
from gptconvert.cli import group
from gptconvert.families.registry import FAMILIES
from tests.commands import TINY, TRAINED, command
from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("docs") / "gpt2"
    gptconvert.convert(TRAINED, output, gptconvert.Options(targets=("onnx", "safetensors"), verify=None))
    return output


# --- Python ---------------------------------------------------------------------------------------------------------


def _readme(directory: Path, trained: Path) -> Path:
    (directory / "models").mkdir()
    (directory / "models/124M").symlink_to(TRAINED)
    (directory / "export-of-another-tool").symlink_to(trained)
    return directory


def _fixtures(directory: Path, trained: Path) -> Path:
    (directory / "fixtures").symlink_to(ROOT / "fixtures")
    return directory


def _tokenizers(directory: Path, trained: Path) -> Path:
    if any(importlib.util.find_spec(name) is None for name in ("ftfy", "spacy")):
        pytest.skip("ftfy and spaCy are not installed: pip install 'gptconvert[gpt1-tokenizer]'")
    from tests.families.witness import Case
    from tests.targets.package.small_exports import export

    (directory / "out").symlink_to(export(Case("gpt1"), directory, gptconvert.Options()))
    return directory


def _generate(directory: Path, trained: Path) -> Path:
    (directory / "out").symlink_to(trained)
    return directory


def _litert(directory: Path, trained: Path) -> Path:
    gptconvert.convert(TRAINED, directory / "t", gptconvert.Options(targets=("tflite",), verify=None))
    return directory


#: Page → where its Python runs. ``api.md`` has signatures; ``tests/targets/saved_model`` runs ``serving.md``,
#: ``test_tutorials`` the tutorials, and a test below ``mlflow.md``.
SETTINGS: dict[str, Callable[[Path, Path], Path]] = {
    "generate.md": _generate,
    "README.md": _readme,
    "onnx.md": lambda _, trained: trained,
    "tokenizers.md": _tokenizers,
    "reports.md": _fixtures,
    "litert.md": _litert,
}
ELSEWHERE = {"api.md", "mlflow.md", "serving.md", "verify.md"}


def test_every_page_with_python_is_run() -> None:
    assert {page.name for page in PAGES if blocks(page, "python")} == {*SETTINGS, *ELSEWHERE}


#: Pages whose code needs an export by TensorFlow.
BY_TENSORFLOW = {"litert.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.tensorflow] if page.name in BY_TENSORFLOW else [])
        for page in PAGES
        if page.name in SETTINGS
    ],
)
def test_python_runs(page: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another in one namespace, as when pasted into a session."""
    monkeypatch.chdir(SETTINGS[page.name](tmp_path, trained))
    space: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(block, space)


def test_mlflow_gets_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a double, as mlflow has too many dependencies for the tests. The page was run with mlflow 3.17."""
    logged: dict[str, float] = {}
    double = SimpleNamespace(
        start_run=lambda run_name: nullcontext(),
        log_metric=logged.__setitem__,
        log_artifacts=lambda directory, path: logged.update({path: len([*Path(directory).iterdir()])}),
    )
    monkeypatch.setitem(sys.modules, "mlflow", double)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs/howto/mlflow.md", "python")
    exec(code.replace("fixtures/gpt2-stdlib", str(TINY / "openai-tf")), {})
    assert 0 < logged["mean_kl"] < 0.01 and 0.9 < logged["top1"] <= 1 and logged["gpt2"] > 5


def test_decode_loop_writes_what_the_example_writes(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from tests.test_examples import example

    monkeypatch.chdir(trained)
    space: dict[str, Any] = {}
    loop = next(block for block in blocks(ROOT / "docs/onnx.md", "python") if "past_key_values" in block)
    exec(loop, space)
    texts = [space["tokenizer"].decode(row) for row in space["rows"]]
    assert texts == example("decode_loop").main(".", *space["prompts"], new_tokens=20)
    assert texts[0] in capsys.readouterr().out


def test_sixteen_bit_weights_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session options of ``docs/onnx.md``, with the graph's name under ``--dtype``."""
    (code,) = [block for block in blocks(ROOT / "docs/onnx.md", "python") if "ConstantFolding" in block]
    for dtype in ("fp16", "bf16"):
        options = gptconvert.Options(targets=("onnx",), dtype=dtype, verify=None)
        monkeypatch.chdir(gptconvert.convert(TINY / "openai-tf", tmp_path / dtype, options).output)
        space: dict[str, Any] = {}
        exec(code, space)
        assert space["graph"] == f"onnx/model_{dtype}.onnx"
        assert space["session"].get_inputs()


def test_readme_loads_the_output(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table under *Output*: onnxruntime and transformers here; ``test_card_snippets`` the other libraries."""
    from onnxruntime import InferenceSession
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(trained.parent)
    cells = re.findall(r"^\| (\w[\w.-]*) \| `([^`]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    code = dict(cells)
    assert list(code) == ["onnxruntime", "transformers", "optimum", "onnxruntime-genai", "transformers.js"]
    names = {"InferenceSession": InferenceSession, "AutoModelForCausalLM": AutoModelForCausalLM}
    assert eval(code["onnxruntime"], names) and eval(code["transformers"], names)


# --- Commands -------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The words of every ``gptconvert`` command in a page's code blocks: shell, workflows, rules of make."""
    fence = re.compile(r"^```(?:sh|console|yaml|make)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
    text = "\n".join(fence.findall(page.read_text("utf-8")))
    text = re.sub(r"\$\{\{.*?\}\}|\$[A-Z_]+", "0", text)  # variables
    lines = re.findall(r"^(?:\$ |\s+|\s*(?:- )?(?:\w+: )?)gptconvert (?!--)(.*)$", text, re.MULTILINE)
    found = []
    for line in lines:
        words = shlex.split(line.partition("; echo")[0], comments=True)
        end = min((words.index(word) for word in (">", "||", "|") if word in words), default=len(words))
        found.append(words[:end])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page: Path) -> None:
    for name, *words in commands(page):
        found = group.get_command(group.make_context("gptconvert", ["formats"], resilient_parsing=True), name)
        assert found is not None, name
        found.make_context(name, words)


def test_outputs_are_current(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """``docs/cli.md`` shows what its commands print."""
    shown = re.findall(r"^```\n\$ gptconvert (.*?)\n(.*?)^```", (ROOT / "docs/cli.md").read_text(), re.DOTALL | re.M)
    assert len(shown) == 2
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    (tmp_path / "demo-out").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    for words, expected in shown:
        done = command(capsys, *words.split())
        assert done.code == 0, done.err
        measured = re.compile(r"worst R [\d.]+ \([^)]*\)")  # differs between processors
        assert measured.sub("R", done.out.strip()) == measured.sub("R", expected.strip())


@pytest.mark.slow
def test_figures_of_quantised_graphs_are_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What ``README.md`` and ``docs/cli.md`` say is printed, but for the numbers, which differ between processors."""

    def masked(text: str) -> list[str]:
        return [
            " ".join(re.sub(r"\d[\d.]*(e-\d+)?|\([a-z ]+\d*\)$", "N", line).split()) for line in text.splitlines()
        ]

    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    for page, first in (("README.md", "gptconvert openai-tf fixtures"), ("docs/cli.md", "gptconvert quality out")):
        pairs = re.findall(
            rf"^```\n({first}.*?)\n```(?:(?!```).)*```\n(.*?)```", (ROOT / page).read_text(), re.S | re.M
        )
        ((line, shown),) = pairs
        done = command(capsys, *line.split()[1:])
        assert done.code == 0, done.err
        assert [each for each in masked(shown) if each not in masked(done.out + done.err)] == []


# --- Messages -------------------------------------------------------------------------------------------------------


@cache
def texts_in_the_code() -> str:
    """Every string in the package, with ``…`` for what f-strings insert."""
    found = []
    for path in (ROOT / "gptconvert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
    return "\n\n".join(found)


def troubleshooting() -> tuple[list[str], str]:
    """The messages of the page's own tables, and the section on other programs."""
    own, _, other = (ROOT / "docs/troubleshooting.md").read_text("utf-8").partition("## Other programs")
    return re.findall(r"^\| `(.+?)` \| ", own, re.MULTILINE), other


def test_messages_are_those_of_the_code() -> None:
    messages, _ = troubleshooting()
    assert len(messages) > 30
    assert [message for message in messages if message not in texts_in_the_code()] == []


def test_onnxruntime_says_so(trained: Path) -> None:
    import numpy as np
    import onnxruntime

    _, other = troubleshooting()
    session = onnxruntime.InferenceSession(trained / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[2003]])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.zeros_like(ids)}
    past = {v.name: np.zeros((1, 3, 0, 48), np.float32) for v in session.get_inputs() if v.name not in feed}
    with pytest.raises(Exception, match="indices element out of data bounds"):
        session.run(None, {**feed, **past})
    with pytest.raises(ValueError, match="are missing from input feed"):
        session.run(None, {"input_ids": ids})
    assert "indices element out of data bounds" in other and "are missing from input feed" in other


def test_readme_lists_every_family_by_runtime() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| runtime | load with") :].split("\n\n")[0]
    assert "GPT-1" in table
    assert all(family.title.partition(",")[0] in text for family in FAMILIES)
