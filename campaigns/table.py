"""The results of campaigns as a Markdown table, with what they belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from campaigns.report import Report

PACKAGES = (
    *("numpy", "torch", "onnx", "onnxruntime", "tensorflow", "safetensors", "tokenizers", "h5py", "msgpack"),
    *("huggingface_hub", "transformers"),
)
COLUMNS = ("campaign", "cases", "outcomes", "failures", "leftovers", "slowest case", "minutes")


def markdown(reports: Sequence[Report]) -> str:
    """The table, the failures, and what was not run."""
    lines = [f"{circumstances()}\n", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
    lines += [_row(_cells(report)) for report in reports]
    for title, items in (
        ("Planted bugs", [f"{report.name}, {score}" for report in reports for score in report.scores]),
        ("Not run", [f"{report.name}: {what}" for report in reports for what in report.missing]),
        ("Failures", [f"{r.name}, case {c.number}: {c.what}: {c.outcome}" for r in reports for c in r.failures]),
    ):
        lines += ["", f"{title}:", "", *(f"* {_text(item)}" for item in items)] if items else []
    return "\n".join(lines) + "\n"


def circumstances() -> str:
    """The commit, the versions and the machine."""
    packages = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    return f"Commit {commit()}; Python {platform.python_version()}; {packages}; {machine}."


def commit() -> str:
    """The commit of the working tree, ``+`` if it has changes."""
    root = Path(__file__).parents[1]
    try:
        done = [
            subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done[0] + ("+" if done[1] else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cells(report: Report) -> Iterable[str]:
    if not report.cases:
        return (report.name, "not run", *[""] * 4, _minutes(report))
    inputs = f" ({report.inputs} inputs)" if report.inputs != report.cases else ""
    outcomes = ", ".join(f"{outcome} {count}" for outcome, count in report.outcomes.most_common())
    slowest = "" if report.slowest is None else f"{report.slowest.seconds:.2f} s: {report.slowest.what[:60]}"
    return (
        *(report.name, f"{report.cases}{inputs}", outcomes, str(len(report.failures)), str(report.leftovers)),
        *(slowest, _minutes(report)),
    )


def _minutes(report: Report) -> str:
    return f"{report.seconds / 60:.1f}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_text(cell) for cell in cells)} |"


def _text(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
