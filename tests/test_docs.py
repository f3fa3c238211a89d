"""Generated pages are current; links and paths in all pages exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "examples/*.md", ".github/**/*.md") for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("script", ["make_api", "make_commands"])
def test_generated_page_is_up_to_date(script: str) -> None:
    spec = importlib.util.spec_from_file_location(script, ROOT / "docs" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.render(), "run `make docs`"


#: Links in the README are absolute, because PyPI shows it too.
BLOB = "https://github.com/gptconvert/gptconvert/blob/main/"


def test_readme_links_are_absolute() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [target for target in targets if not target.startswith(BLOB)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.partition("#")[0].removeprefix(BLOB) for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not target.startswith(("https://", "http://", "mailto:"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(rf"\]\({BLOB}(docs/[^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every page is in the navigation, and every link and anchor is valid."""
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir", tmp_path / "trees"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "site" / "verification.html").read_text("utf-8")
    assert f'href="{BLOB}reference_model/model.py"' in page, "links out of docs/ lead to the repository"


def test_index_lists_the_pages_of_its_navigation() -> None:
    for section in (ROOT / "docs" / "index.md").read_text("utf-8").split("\n## ")[1:]:
        text, _, tree = section.partition("```{toctree}")
        entries = [line for line in tree.splitlines()[1:] if line and line[0] not in ":`"]
        assert re.findall(r"\]\((.+)\.md\)", text) == entries


def test_no_page_names_a_removed_api() -> None:
    gone = re.compile(
        r"OpenOptions|TargetOptions|\bRequest\(|gptconvert\.tokenizer|gptconvert/tokenizer|sources/sniff"
    )
    assert [str(page.relative_to(ROOT)) for page in PAGES if gone.search(page.read_text(encoding="utf-8"))] == []


def test_python_modules_and_files_that_pages_name_exist() -> None:
    """Paths and dotted names in code spans: ``gptconvert/pipeline.py``, ``gptconvert.targets.registry``."""
    missing = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # names files of earlier versions
            continue
        text = page.read_text(encoding="utf-8")
        paths = re.findall(r"`((?:gptconvert|reference_model|tests|fixtures|benchmarks|examples)/[\w./-]+)`", text)
        modules = re.findall(r"(?:from|import) ((?:gptconvert|reference_model)[\w.]*)", text)
        paths = [path for path in (*paths, *(name.replace(".", "/") for name in modules)) if "NAME" not in path]
        missing += [f"{page.name}: {p}" for p in paths if not ((ROOT / p).exists() or (ROOT / f"{p}.py").exists())]
    assert missing == []
