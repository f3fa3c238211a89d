"""Where reports may be written: checked before the work begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptconvert import inspection
from gptconvert.errors import OutputError, UnsupportedError, UsageError
from gptconvert.reporting.files import MARK, ReportFiles
from tests.commands import TINY, command
from tests.reporting.runs import SOURCE


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a checkpoint fails the test: the path must be refused first."""
    monkeypatch.setattr(inspection, "open_checkpoint", lambda *_, **__: pytest.fail("the work has begun"))


def refused(capsys: Any, *arguments: object) -> tuple[int, str]:
    done = command(capsys, *arguments)
    return done.code, done.err


@pytest.mark.usefixtures("idle")
def test_inside_the_output_or_the_source(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    for report in (output / "r.md", output / "a" / "r.md", Path(f"{output}/../out/r.md"), SOURCE / "r.md"):
        code, message = refused(capsys, "hf", SOURCE, "-o", output, "--report", report)
        assert (code, "the report would be inside" in message) == (2, True), report
    (tmp_path / "link").symlink_to(tmp_path)
    assert refused(capsys, "hf", SOURCE, "-o", output, "--report", tmp_path / "link" / "out" / "r.md")[0] == 2
    code, message = refused(capsys, "hf", SOURCE, "-o", tmp_path / "r.md", "--report", tmp_path / "r.md")
    assert (code, "at the same path" in message) == (2, True)


@pytest.mark.usefixtures("idle")
def test_inside_the_default_output(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "hf", SOURCE, "--report", f"{SOURCE.name}-gptconvert/r.md")[0] == 2


def test_inside_the_artifact(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "export").mkdir()
    for command_ in (("verify", SOURCE, tmp_path / "export"), ("quality", tmp_path / "export", "--against", SOURCE)):
        assert refused(capsys, *command_, "--report", tmp_path / "export" / "r.md")[0] == 2
    assert not any((tmp_path / "export").iterdir())


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["report", "report.pdf", "report.htm", ".md"])
def test_unknown_suffix(tmp_path: Path, capsys: Any, name: str) -> None:
    code, message = refused(capsys, "hf", SOURCE, "-o", tmp_path / "out", "--report", tmp_path / name)
    assert (code, ".html, .md, .xml, .json" in message) == (2, True)


@pytest.mark.usefixtures("idle")
def test_paths_that_cannot_be_written(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.md").mkdir()
    (tmp_path / "mine.md").write_text("# My notes\n")
    for report in ("file/r.md", "directory.md", "mine.md"):
        code, message = refused(capsys, "hf", SOURCE, "-o", tmp_path / "out", "--report", tmp_path / report)
        assert (code, str(tmp_path) in message) == (6, True), report
    assert (tmp_path / "mine.md").read_text() == "# My notes\n"


@pytest.mark.usefixtures("idle")
def test_a_directory_without_permission(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    code, message = refused(capsys, "hf", SOURCE, "-o", tmp_path / "out", "--report", tmp_path / "r.md")
    assert (code, "not writable" in message) == (6, True)


def test_reports_replace_reports_and_empty_files(tmp_path: Path, capsys: Any) -> None:
    paths = [tmp_path / f"new/r.{suffix}" for suffix in ("md", "xml", "json", "html")]
    options = [word for path in paths for word in ("--report", path)]
    for _ in range(2):
        assert command(capsys, "hf", SOURCE, "-o", tmp_path / "out", "--dry-run", *options).code == 0
    assert all(MARK in path.read_text()[:4096] for path in paths)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    (tmp_path / "empty.md").write_text("")
    assert (
        command(capsys, "hf", SOURCE, "-o", tmp_path / "o", "--dry-run", "--report", tmp_path / "empty.md").code == 0
    )


def test_files_of_the_source_are_not_replaced(tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "config.json"
    weights = tmp_path / "model.safetensors"
    for path in (config, weights):
        path.write_bytes((SOURCE / path.name).read_bytes())
    before = config.read_bytes()
    assert refused(capsys, "hf", weights, "-o", tmp_path / "out", "--report", config)[0] == 6
    assert config.read_bytes() == before


def test_html_without_matplotlib(tmp_path: Path) -> None:
    """Only HTML needs it, and says so before the work begins."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "sys.modules['matplotlib'] = None\n"
        "from gptconvert.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    base = [sys.executable, "-c", code, "hf", str(SOURCE), "-o", str(tmp_path / "out"), "--dry-run"]
    done = subprocess.run([*base, "--report", str(tmp_path / "r.html")], capture_output=True, text=True)
    assert (done.returncode, "pip install 'matplotlib" in done.stderr) == (4, True)
    rest = [word for suffix in ("md", "xml", "json") for word in ("--report", str(tmp_path / f"r.{suffix}"))]
    assert subprocess.run([*base, *rest], capture_output=True).returncode == 0


def test_a_report_that_fails_at_the_end(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    output, report = tmp_path / "out", tmp_path / "r.md"
    done = command(capsys, "hf", SOURCE, "-o", output, "--no-verify", "--report", report)
    assert (done.code, "only the report is missing" in done.err) == (6, True)
    assert (output / "manifest.json").exists() and not [*tmp_path.glob("r.md*")]
    done = command(capsys, "hf", tmp_path / "missing", "-o", tmp_path / "b", "--report", report)
    assert (done.code, "the report cannot be written" in done.err) == (3, True)


def test_hub_names_are_not_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ReportFiles.checked(["gpt2/r.md"], ["gpt2-gptconvert"])
    with pytest.raises(UsageError):
        ReportFiles.checked(["gpt2-gptconvert/r.md"], ["gpt2-gptconvert"])


def test_errors_have_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError):
        ReportFiles.checked([str(TINY / "golden.npz" / "r.md")], [])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError):
        ReportFiles.checked([str(tmp_path / "r.html")], [])
