"""A report as JUnit XML, which GitLab, Jenkins and others show as test results.

One suite per artifact for its weights, contract and quality, and one per artifact and runtime with a case per probe
group. What was skipped appears as skipped, and an error that is not a failed verification as an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from gptconvert.errors import printable
from gptconvert.reporting.document import Document, artifacts, quality_faults, ratio_text
from gptconvert.reporting.files import MARK

#: Problems listed in a failure.
MOST_LISTED = 50
QUALITY = "the loss against the checkpoint is within its limit"
#: Characters that XML 1.0 cannot contain.
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def test_suites(found: Document) -> str:
    """The XML."""
    root = ET.Element("testsuites", name="gptconvert")
    suites = [*_package(found), *(suite for each in artifacts(found) for suite in _artifact(each))]
    suites += [_measured(graph) for graph in found.get("graphs") or ()]
    suites += _skipped(found) if not suites else []
    if not found["ok"] and not any(suite.find(".//failure") is not None for suite in suites):
        suites.append(_error(found))
    suites = suites or [_error(found)]
    for suite in suites:
        suite.set("timestamp", str(found["created"]).removesuffix("Z"))
        root.append(suite)
    for element in (root, *suites):
        _count(element)
    ET.indent(root)
    comment = f"<!-- {MARK}: {_text(found['verdict']).replace('--', '- -')} -->\n"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{comment}{ET.tostring(root, encoding="unicode")}\n'


test_suites.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it


def _suite(name: str, **properties: object) -> ET.Element:
    suite = ET.Element("testsuite", name=_text(name))
    if properties:
        listed = ET.SubElement(suite, "properties")
        for key, value in properties.items():
            ET.SubElement(listed, "property", name=key, value=_text(value))
    return suite


def _case(suite: ET.Element, kind: str, name: str, problems: Sequence[str], *, seconds: float | None = None) -> None:
    """Add a case; it fails if there are problems, of which the first is the message."""
    case = ET.SubElement(suite, "testcase", classname=suite.get("name", ""), name=_text(name))
    if seconds is not None:
        case.set("time", f"{seconds:.3f}")
    if problems:
        more = [f"… {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
        failure = ET.SubElement(case, "failure", type=kind, message=_text(problems[0]))
        failure.text = "\n".join(map(_text, (*problems[:MOST_LISTED], *more)))


def _artifact(artifact: Mapping[str, Any]) -> Iterator[ET.Element]:
    weights, quality = artifact["weights"], artifact.get("quality")
    equal = f"{weights['equal']} of {weights['weights']}"
    suite = _suite(artifact["path"], kind=artifact["kind"], bytes=artifact.get("size") or "unknown", equal=equal)
    title = "weights equal the checkpoint's, byte for byte"
    _case(suite, "weights", title, weights["problems"], seconds=artifact.get("seconds"))
    _case(suite, "contract", "names, types, shapes and configuration", artifact["problems"])
    if not artifact["ok"] and not artifact["runs"] and not weights["problems"] and not artifact["problems"]:
        _case(suite, "outputs", "outputs", ["the outputs were not computed"])
    if quality is not None:
        _case(suite, "quality", QUALITY, quality_faults(quality))
    yield suite
    for run in artifact["runs"]:
        yield _run(artifact["path"], run)


def _run(path: str, run: Mapping[str, Any]) -> ET.Element:
    suite = _suite(f"{path}: {run['runtime']}", stress_weights="yes" if run["stressed"] else "no")
    where = [f"the error begins in {run['first_bad_block']}"] if run["first_bad_block"] else []
    for group in run["groups"]:
        problems = [] if group["ok"] else [*group["problems"], *_figures(group), *where]
        _case(suite, "outputs", group["group"], problems)
    return suite


def _figures(group: Mapping[str, Any]) -> list[str]:
    """One line per tensor that is outside the limits."""
    return [
        f"{m['tensor']}: R {ratio_text(m['ratio'])}, rmse {m['rmse']}, largest error {m['max_abs']}; rounding noise: "
        f"rmse {m['noise_rmse']}, largest {m['noise_max_abs']}"
        for m in group["measures"]
        if not m["ok"]
    ]


def _measured(graph: Mapping[str, Any]) -> ET.Element:
    figures = {key: graph[key] for key in ("kl_mean", "max_kl", "top1") if graph[key] is not None}
    suite = _suite(graph["path"], bytes=graph["size"], **figures)
    _case(suite, "quality", QUALITY, quality_faults(graph))
    return suite


def _package(found: Document) -> Iterator[ET.Element]:
    """The files beside the artifacts of an existing directory, one case each."""
    package = (found.get("verification") or {}).get("package")
    if package and package["files"]:
        suite = _suite("checksums, configuration and tokenizer")
        rest = list(package["problems"])
        for name in package["files"]:
            own = [problem for problem in rest if problem.startswith(f"{name}: ")]
            rest = [problem for problem in rest if problem not in own]
            _case(suite, "package", name, own)
        if rest:
            _case(suite, "package", "the directory", rest)
        yield suite


def _skipped(found: Document) -> list[ET.Element]:
    """A suite of one skipped case, if a successful run verified nothing on request."""
    if not found["ok"]:
        return []
    option = "--dry-run" if found["command"] == "plan" else "--no-verify"
    suite = _suite("verification")
    case = ET.SubElement(suite, "testcase", classname="verification", name="verification")
    ET.SubElement(case, "skipped", message=option)
    return [suite]


def _error(found: Document) -> ET.Element:
    error = found.get("error") or {}
    suite = _suite("gptconvert")
    case = ET.SubElement(suite, "testcase", classname="gptconvert", name=found["command"])
    lines = [f"{key}: {error[key]}" for key in ("file", "tensor", "expected", "found", "hint") if error.get(key)]
    message = str(error.get("message") or found["verdict"])
    element = ET.SubElement(case, "error", type=str(error.get("kind", "error")), message=_text(message))
    element.text = "\n".join(map(_text, (message, *lines)))
    return suite


def _count(element: ET.Element) -> None:
    """Set the numbers of cases, failures, errors and skipped cases, and the seconds."""
    for name, tag in {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}.items():
        element.set(name, str(sum(1 for _ in element.iter(tag))))
    element.set("time", f"{sum(float(case.get('time', 0)) for case in element.iter('testcase')):.3f}")


def _text(value: object) -> str:
    """Text that XML can contain, on one line: names come from untrusted files."""
    return ILLEGAL.sub("�", printable(value))
