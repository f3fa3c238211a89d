"""The GitHub action: its shell part runs here, and its text and the workflows in docs/ci.md follow the rules."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import TINY
from tests.helpers import ROOT

SCRIPT = ROOT / ".github" / "action" / "convert.sh"
ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "ci.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
SOURCE = TINY / "openai-tf"
#: Looks like an option, ends a shell word, runs commands, is a glob, and so on.
HOSTILE = "-a b'\"$(touch pwned)`touch pwned`;touch pwned&*${IFS}"


@dataclass
class Runner:
    """A runner's directories and files, and the inputs of the action."""

    home: Path
    inputs: dict[str, str] = field(default_factory=dict)

    def run(self, step: str, **environment: str) -> tuple[int, dict[str, str], str]:
        """The exit code, the outputs as the runner reads them, and the log."""
        written, summary = self.home / "output", self.home / "summary"
        for path in (written, summary):
            path.write_text("")
        done = subprocess.run(
            ["bash", SCRIPT, step],
            cwd=self.home,
            env={
                "PATH": f"{self.home}/bin:{os.environ['PATH']}",
                "RUNNER_TEMP": f"{self.home}/temp",
                "RUNNER_OS": "Linux",
                "GITHUB_OUTPUT": str(written),
                "GITHUB_STEP_SUMMARY": str(summary),
                **{f"INPUT_{name.upper()}": value for name, value in self.inputs.items()},
                **environment,
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, outputs(written.read_text("utf-8")), done.stdout + done.stderr

    @property
    def summary(self) -> str:
        return (self.home / "summary").read_text("utf-8")

    def without_program(self) -> None:
        """From here on, running gptconvert fails the test."""
        (self.home / "bin" / "gptconvert").write_text("#!/bin/sh\nexit 99\n")


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    for name in ("bin", "temp"):
        (tmp_path / name).mkdir()
    program = tmp_path / "bin" / "gptconvert"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m gptconvert "$@"\n')
    program.chmod(0o755)
    shutil.copytree(SOURCE, tmp_path / "model")
    defaults = {name: str(each.get("default", "")) for name, each in ACTION["inputs"].items()}
    return Runner(tmp_path, {**defaults, "source": "model", "options": "--no-verify"})


def outputs(text: str) -> dict[str, str]:
    """``NAME<<MARK``, lines, ``MARK``, as in GITHUB_OUTPUT."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        name, _, mark = line.partition("<<")
        assert name and mark, line
        found[name] = "\n".join(iter(lines.__next__, mark))
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- The shell part -------------------------------------------------------------------------------------------------


def test_converts_and_verifies_whatever_the_names(runner: Runner) -> None:
    """Spaces, quotes, substitutions and globs in every input that is a path or a value."""
    (runner.home / "model").rename(runner.home / HOSTILE)
    (runner.home / HOSTILE / "hparams.json").rename(runner.home / f"{HOSTILE}.json")
    runner.inputs |= {
        "source": HOSTILE,
        "targets": "onnx,safetensors",
        "options": f"\n  --hparams {HOSTILE}.json\n--opset 18",
        "output": f"out {HOSTILE}",
        "report": f"{HOSTILE}.xml\n\n{HOSTILE} 2.md",
    }
    code, found, log = runner.run("convert")
    assert code == 0, log
    published = runner.home / found["directory"]
    assert found == {
        "directory": f"out {HOSTILE}",
        "manifest": f"out {HOSTILE}/manifest.json",
        "verified": "true",
        "report": f"{HOSTILE}.xml\n\n{HOSTILE} 2.md",
    }
    assert (published / "onnx/model.onnx").is_file() and (published / "model.safetensors").is_file()
    assert (runner.home / f"{HOSTILE}.xml").is_file() and (runner.home / f"{HOSTILE} 2.md").is_file()
    assert "Verified" in runner.summary
    assert [*runner.home.rglob("pwned")] == []


def test_failure_fails_the_step_and_is_reported(runner: Runner) -> None:
    (runner.home / "model/model.ckpt.data-00000-of-00001").write_bytes(b"")
    runner.inputs |= {"report": "report.xml"}
    code, found, log = runner.run("convert", RESULT_KEY="prefix-")
    assert code == 3
    assert found == {"verified": "false", "report": "report.xml"}, "no directory, and nothing to cache"
    assert "::error title=gptconvert::exit code 3" in log
    assert "Failed" in runner.summary and (runner.home / "report.xml").is_file()


def test_log_holds_no_workflow_commands(runner: Runner) -> None:
    """What the program prints is between ``stop-commands`` and a random mark."""
    (runner.home / "model").rename(runner.home / "::set-env name=A::b")
    runner.inputs["source"] = "::set-env name=A::b/missing"
    _, _, log = runner.run("convert")
    (mark,) = re.findall(r"^::stop-commands::([0-9a-f]{32})$", log, re.MULTILINE)
    before, _, after = log.partition(f"::{mark}::\n")
    assert re.findall("^::(?!stop)", before, re.MULTILINE) == [] and after.startswith("::error")


def test_a_value_cannot_set_other_outputs(runner: Runner) -> None:
    runner.inputs |= {"source": "missing/model", "report": "a.xml\nverified<<X\ntrue\nX\n.md"}
    _, found, _ = runner.run("convert")
    assert found == {"verified": "false", "report": runner.inputs["report"]}
    marks = re.findall(r"^\w+<<(.{32})$", (runner.home / "output").read_text("utf-8"), re.MULTILINE)
    assert len({*marks}) == len(found), "a mark that is known could be part of a value"


def test_without_verification_nothing_is_verified(runner: Runner) -> None:
    code, found, _ = runner.run("convert")
    assert (code, found["verified"], found["directory"]) == (0, "false", "gptconvert-out")
    assert found["report"] == f"{runner.home}/temp/gptconvert-reports/summary.md"


# --- Its caches -----------------------------------------------------------------------------------------------------


def test_result_is_cached_by_its_manifest(runner: Runner) -> None:
    runner.inputs["report"] = "report.xml"
    _, keys, log = runner.run("keys")
    assert keys["pip"].startswith("gptconvert-pip-Linux-"), log
    _, first, _ = runner.run("convert", RESULT_KEY=keys["result"])
    manifest = runner.home / "gptconvert-out/manifest.json"
    assert first["key"] == keys["result"] + sha256(manifest)

    (runner.home / "report.xml").unlink()
    runner.without_program()
    code, again, log = runner.run("convert", RESULT_KEY=keys["result"], CACHED_KEY=first["key"])
    assert code == 0 and "restored from the cache" in log
    assert again == {name: value for name, value in first.items() if name != "key"}
    assert runner.summary and (runner.home / "report.xml").is_file()


@pytest.mark.parametrize("damaged", ["manifest.json", "config.json", "SHA256SUMS"])
def test_damaged_cache_is_not_used(runner: Runner, damaged: str) -> None:
    """It would be converted again, and replaced."""
    out, store = runner.home / "gptconvert-out", runner.home / "temp/gptconvert-reports"
    for folder in (out, store):
        folder.mkdir()
    (store / "summary.md").write_text("cached\n")
    (out / "config.json").write_text("{}")
    (out / "manifest.json").write_text('{"verification": {"passed": true}}')
    names = ("config.json", "manifest.json")
    (out / "SHA256SUMS").write_text("".join(f"{sha256(out / name)}  {name}\n" for name in names))
    key = f"prefix-{sha256(out / 'manifest.json')}"
    runner.without_program()
    assert runner.run("convert", CACHED_KEY=key)[:2] == (
        0,
        {
            "directory": "gptconvert-out",
            "manifest": "gptconvert-out/manifest.json",
            "verified": "true",
            "report": f"{store}/summary.md",
        },
    )
    assert runner.run("convert", CACHED_KEY=f"prefix-{'0' * 64}")[0] == 99, "the result of another key"
    (out / damaged).write_text((out / damaged).read_text().replace("e", "f").replace("{}", "{ }"))
    assert runner.run("convert", CACHED_KEY=key)[:2] == (99, {"verified": "false", "report": f"{store}/summary.md"})
    assert runner.run("convert", CACHED_KEY="")[0] == 99


CHANGES: dict[str, dict[str, str]] = {
    "targets": {"targets": "safetensors"},
    "format": {"format": "openai-tf"},
    "options": {"options": "--no-verify\n--dtype fp16"},
    "another report": {"report": "a.md"},
}


def test_key_is_that_of_everything_that_shapes_the_result(runner: Runner) -> None:
    (runner.home / "other.json").write_text("1")
    runner.inputs["options"] = "--no-verify\n--hparams other.json"
    seen = {runner.run("keys")[1]["result"]}
    assert runner.run("keys")[1]["result"] in seen
    before = dict(runner.inputs)
    for change in CHANGES.values():
        runner.inputs = before | change
        seen.add(runner.run("keys")[1]["result"])
    runner.inputs = before
    seen.add(runner.run("keys", GPTCONVERT_CONVERT_OPSET="17")[1]["result"])
    for path in ("other.json", "model/hparams.json"):
        (runner.home / path).write_text("2")
        seen.add(runner.run("keys")[1]["result"])
    assert len(seen) == 1 + len(CHANGES) + 3


@pytest.mark.parametrize(
    "change",
    [
        {"source": "org/model"},
        {"options": "--adapter org/lora"},
        {"cache": "false"},
        {"output": "model"},
    ],
    ids=["hub", "adapter", "off", "output exists"],
)
def test_what_may_change_is_not_cached(runner: Runner, change: dict[str, str]) -> None:
    runner.inputs |= change
    code, found, log = runner.run("keys")
    assert (code, {*found}) == (0, {"pip"}), log


def test_prefix_of_a_checkpoint_has_a_key(runner: Runner) -> None:
    (runner.home / "model").rename(runner.home / "a [b] c")
    runner.inputs["source"] = "a [b] c/model.ckpt"
    assert "result" in runner.run("keys")[1]


# --- Its text, and the workflows of the page ------------------------------------------------------------------------


def every_run(document: Any) -> list[str]:
    """The scripts of all steps and jobs in a document."""
    if isinstance(document, dict):
        own = [document["run"]] if isinstance(document.get("run"), str) else []
        return own + [script for value in document.values() for script in every_run(value)]
    return [script for value in document for script in every_run(value)] if isinstance(document, list) else []


@pytest.mark.parametrize(
    "path", ["action.yml", *(p.name for p in (ROOT / ".github" / "workflows").glob("*.yml")), "page"]
)
def test_scripts_interpolate_nothing(path: str) -> None:
    texts = {"page": BLOCKS, "action.yml": [(ROOT / "action.yml").read_text("utf-8")]}.get(path)
    for text in texts or [(ROOT / ".github" / "workflows" / path).read_text("utf-8")]:
        assert [script for script in every_run(yaml.safe_load(text)) if "${{" in script] == []


def test_steps_get_the_inputs_that_the_script_reads() -> None:
    """Each function's inputs are in the environment of its step, from the input of the same name."""
    text = SCRIPT.read_text("utf-8")
    bodies = dict(re.findall(r"^(\w+)\(\) \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE))

    def read(name: str) -> set[str]:
        used = {*re.findall(r"INPUT_\w+|CACHED_KEY|RESULT_KEY|(?<=\$)PYTHON\b", bodies[name])}
        called = {other for other in bodies if other != name and re.search(rf"\b{other}\b", bodies[name])}
        return used.union(*map(read, called))

    for step in (step for step in STEPS if "run" in step):
        assert step["shell"] == "bash"
        (name,) = re.fullmatch(r'"\$GITHUB_ACTION_PATH/.github/action/convert.sh" (\w+)', step["run"]).groups()  # type: ignore[union-attr]
        environment = step["env"]
        assert {*environment} - {"PIP_EXTRA_INDEX_URL"} == read(name)
        given = {key: value for key, value in environment.items() if key.startswith("INPUT_")}
        assert given == {key: f"${{{{ inputs.{key[6:].lower()} }}}}" for key in given}


def test_outputs_are_those_of_the_script() -> None:
    set_by_the_script = {*re.findall(r"^ +output (\w+)", SCRIPT.read_text("utf-8"), re.MULTILINE)}
    assert {*ACTION["outputs"]} == set_by_the_script - {"key", "pip", "result"}
    for name, each in ACTION["outputs"].items():
        assert each["value"] == f"${{{{ steps.convert.outputs.{name} }}}}"


def test_page_lists_the_inputs_and_uses_what_exists() -> None:
    page = (ROOT / "docs" / "ci.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| .* \| (?:`([^`]*)`)? ?\|$", page, re.MULTILINE))
    assert rows == {name: str(each.get("default", "")) for name, each in ACTION["inputs"].items()}
    steps = yaml.safe_load(BLOCKS[0])["jobs"]["convert"]["steps"]
    (used,) = (step["with"] for step in steps if step.get("uses", "").startswith("gptconvert/"))
    assert {*used} <= {*ACTION["inputs"]}
    assert {*re.findall(r"steps\.model\.outputs\.(\w+)", BLOCKS[0])} <= {*ACTION["outputs"]}
    assert json.dumps(steps).count("subject-checksums") == 1
