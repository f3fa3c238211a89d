"""The GitHub action and the workflows of ``docs/ci.md``: valid, and the shell part runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptconvert.cli import group
from tests.commands import TINY
from tests.helpers import ROOT

ACTION, SCRIPT, PAGE = ROOT / "action.yml", ROOT / ".github" / "action.sh", ROOT / "docs" / "ci.md"
SOURCE = TINY / "hf-safetensors"
#: What the action passes if the user gives only the source.
DEFAULTS = {
    f"INPUT_{name.upper()}": each.get("default", "")
    for name, each in yaml.safe_load(ACTION.read_text())["inputs"].items()
}


def blocks() -> list[str]:
    """The workflows: two for GitHub, one for GitLab."""
    found = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(found) == 3
    return found


class Runner:
    """Runs a step of the action as GitHub's runner does."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.outputs, self.summary = directory, dict[str, str](), ""

    def run(self, step: str, **inputs: str) -> Any:
        files = {name: self.directory / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for path in files.values():
            path.write_text("")
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        given = {**DEFAULTS, **{f"INPUT_{name.upper()}": value for name, value in inputs.items()}}
        settings = {"PATH": paths, "PYTHONPATH": str(ROOT), "GITHUB_ACTION_PATH": str(ROOT)}
        done = subprocess.run(
            ["bash", str(SCRIPT), step],
            env={**os.environ, **given, **settings, **{name: str(path) for name, path in files.items()}},
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )
        text = files["GITHUB_OUTPUT"].read_text()
        self.outputs = {name: value for name, _, value in re.findall(r"(?ms)^([\w-]+)<<(\S+)\n(.*?)\n\2$", text)}
        self.summary = files["GITHUB_STEP_SUMMARY"].read_text()
        return done


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


# --- Valid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ("github-actions", [ACTION.read_text()]),
        ("github-workflows", [*blocks()[:2], *(p.read_text() for p in sorted(ROOT.glob(".github/workflows/*.yml")))]),
        ("gitlab-ci", blocks()[2:]),
        ("dependabot", [p.read_text() for p in ROOT.glob(".github/dependabot.yml")]),
    ],
)
def test_files_satisfy_their_schemas(tmp_path: Path, schema: str, texts: list[str]) -> None:
    paths = [tmp_path / f"{index}.yml" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, check=False) if paths else None
    assert done is None or done.returncode == 0, done.stdout


def test_inputs_are_never_part_of_a_script() -> None:
    steps = yaml.safe_load(ACTION.read_text())["runs"]["steps"]
    jobs = [job for text in blocks()[:2] for job in yaml.safe_load(text)["jobs"].values()]
    scripts = [step["run"] for step in (*steps, *(step for job in jobs for step in job["steps"])) if "run" in step]
    assert len(scripts) == 4
    assert [script for script in scripts if "${{" in script] == []
    assert all(step["shell"] == "bash" for step in steps if "run" in step)


def test_every_input_reaches_the_steps_that_use_it() -> None:
    action, text = yaml.safe_load(ACTION.read_text()), SCRIPT.read_text()
    passed = {step["run"].split()[-1]: step["env"] for step in action["runs"]["steps"] if "run" in step}
    for step, body in re.findall(r"^(\w+)\(\) \{.*?\n(.*?)^\}", text, re.DOTALL | re.MULTILINE):
        if step in passed:
            used = {*re.findall(r"INPUT_\w+", body), *(["INPUT_REPORT"] if "reports" in body else [])}
            assert {*passed[step]} == used, step
    for environment in passed.values():
        for name, value in environment.items():
            assert value == f"${{{{ inputs.{name.removeprefix('INPUT_').lower()} }}}}"


def test_what_the_page_says_of_inputs_and_outputs() -> None:
    action, page = yaml.safe_load(ACTION.read_text()), PAGE.read_text("utf-8")
    first = [re.findall(r"`([\w-]+)`", line.split("|")[1]) for line in page.splitlines() if line.startswith("| `")]
    assert sorted(name for names in first for name in names) == sorted([*action["inputs"], *action["outputs"]])
    for name in re.findall(r"steps\.convert\.outputs\.([\w-]+)", page):
        assert name in action["outputs"]


def test_commands_of_the_workflows_are_accepted() -> None:
    lines = re.findall(r"gptconvert ((?:convert|push) .*)$", "\n".join(blocks()), re.MULTILINE)
    assert len(lines) == 2
    for name, *words in (shlex.split(line.partition(" > ")[0]) for line in lines):
        found = group.get_command(group.make_context("gptconvert", ["formats"], resilient_parsing=True), name)
        assert found is not None
        found.make_context(name, words)


# --- The script -----------------------------------------------------------------------------------------------------


def test_a_conversion_and_the_next_run(runner: Runner) -> None:
    given = {"source": str(SOURCE), "to": "safetensors", "output": "the output", "report": "reports/r 1"}
    done = runner.run("convert", **given)
    assert done.returncode == 0, done.stdout + done.stderr
    first = runner.outputs
    digest = first.pop("manifest-digest")
    assert first == {
        "directory": "the output",
        "manifest": "the output/manifest.json",
        "sha256sums": "the output/SHA256SUMS",
        "verified": "true",
        "reused": "false",
        "report": "reports/r 1.md",
    }
    assert runner.summary == (runner.directory / "reports" / "r 1.md").read_text()
    assert (runner.directory / "reports" / "r 1.xml").is_file()
    before = (runner.directory / "the output" / "manifest.json").stat()
    assert runner.run("convert", **given).returncode == 0
    assert runner.outputs == {**first, "reused": "true", "manifest-digest": digest}
    assert runner.summary != ""
    assert (runner.directory / "the output" / "manifest.json").stat() == before


def test_arguments_are_not_evaluated(runner: Runner) -> None:
    hostile = "$(touch pwned); `touch pwned` 'x' \"y\""
    args = f"--no-verify\n\n--ignore-tensor\n{hostile}\n"
    done = runner.run("convert", source=str(SOURCE), to="safetensors", args=args)
    assert (done.returncode, hostile in done.stderr) == (2, True)
    done = runner.run("convert", source=hostile)
    assert (done.returncode, "no such file or directory" in done.stderr) == (3, True)
    assert not (runner.directory / "pwned").exists()
    assert runner.run("convert", source="--help").returncode == 3


def test_an_output_that_is_not_verified(runner: Runner) -> None:
    assert runner.run("convert", source=str(SOURCE), to="safetensors", args="--no-verify").returncode == 0
    assert runner.outputs["verified"] == "false"


def test_a_failed_verification(runner: Runner) -> None:
    done = runner.run("convert", source=str(SOURCE), args="--quantize=q4\n--max-kl=1e-12")
    assert done.returncode == 5
    assert done.stdout.splitlines()[-1].startswith("::error title=gptconvert::exit code 5; ")
    assert runner.outputs == {"report": "gptconvert-report.md"}
    assert "fail" in runner.summary.lower()
    assert runner.run("convert", source=str(SOURCE), summary="false", args="--nonsense").returncode == 2
    assert runner.summary == ""
    assert runner.run("convert", args="--nonsense", source=str(SOURCE)).returncode == 2
    assert runner.summary == "", "a report of an earlier run"


def test_commands_of_the_workflow_in_names_are_not_obeyed(runner: Runner) -> None:
    lines = runner.run("convert", source="a\n::warning::b").stdout.splitlines()
    assert lines[0].startswith("::stop-commands::")
    assert f"::{lines[0].rpartition(':')[2]}::" in lines


def test_a_missing_source(runner: Runner) -> None:
    done = runner.run("convert")
    assert (done.returncode, done.stdout) == (2, "::error title=gptconvert::the input source is missing\n")
    assert runner.run("nonsense").returncode == 2


def test_keys(runner: Runner) -> None:
    def keys(**inputs: str) -> dict[str, str]:
        assert runner.run("keys", **inputs).returncode == 0
        return runner.outputs

    base = keys(source="a")
    assert base == keys(source="a")
    assert base["result-paths"].splitlines() == [
        "gptconvert-output",
        "gptconvert-report.md",
        "gptconvert-report.xml",
        "gptconvert-report.json",
    ]
    for inputs in (
        {"source": "b"},
        {"source": "a", "to": "tf"},
        {"source": "a", "args": "x"},
    ):
        other = keys(**inputs)
        assert (other["result-key"] != base["result-key"], other["pip-key"] == base["pip-key"]) == (True, True)
    assert keys(source="a", extras="tf")["pip-key"] != base["pip-key"]
