"""A report as Markdown, short enough for the summary page of a CI job (``$GITHUB_STEP_SUMMARY``)."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gptconvert.errors import printable
from gptconvert.reporting.document import (
    Document,
    artifacts,
    bytes_text,
    faults_of,
    headline,
    measured,
    ratio_text,
    worst_group,
)
from gptconvert.reporting.files import MARK

#: Lines of a list of problems or files.
MOST_LISTED = 20
#: Special characters of Markdown and HTML.
SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def page(found: Document) -> str:
    """The page."""
    mark = "✅" if found["ok"] and headline(found) in ("Verified", "Measured") else "⚪" if found["ok"] else "❌"
    lines = [f"<!-- {MARK} -->", f"## {mark} {headline(found)}", "", _text(found["verdict"]), ""]
    for section in (
        _about(found),
        _artifacts(found),
        _faults(found),
        _quality(found),
        _notes(found),
        _details(found),
    ):
        lines += section
    return "\n".join(lines).rstrip() + "\n"


def _about(found: Document) -> Iterator[str]:
    """What was read, and what was written or examined."""
    source, model = found.get("source") or {}, found.get("model") or {}
    rows = [
        (
            "model",
            _text(", ".join(filter(None, (model.get("title"), _count(model.get("parameters"), "parameters"))))),
        ),
        ("checkpoint", _code(" ".join(filter(None, (source.get("path"), source.get("revision")))))),
        ("output", _code(found.get("output"))),
        ("artifact", _code(found.get("artifact"))),
    ]
    yield from _table(("", ""), [row for row in rows if row[1] not in ("", "–")])


def _artifacts(found: Document) -> Iterator[str]:
    rows = []
    for artifact in artifacts(found):
        weights = artifact["weights"]
        equal = f"{weights['equal']} of {weights['weights']} equal"
        runs = artifact["runs"]
        passed = sum(group["ok"] for run in runs for group in run["groups"])
        groups = sum(len(run["groups"]) for run in runs)
        outputs = f"{passed} of {groups} within noise" if groups else "–"
        worst = max((_sortable(worst_group(run)[0]) for run in runs), default=None)
        shown = "–" if worst is None else ratio_text(None if worst == float("inf") else worst)
        mark = "✅" if artifact["ok"] else "❌"
        rows.append((_code(artifact["path"]), bytes_text(artifact.get("size")), equal, outputs, shown, mark))
    head = ("artifact", "size", "weights", "probe groups", "largest R (≤ 4)", "")
    yield from _table(head, rows, right=(1, 4))


def _sortable(ratio: float | None) -> float:
    return float("inf") if ratio is None else ratio


def _faults(found: Document) -> Iterator[str]:
    """Everything that is wrong, with its location."""
    lines = []
    for artifact in artifacts(found):
        faults = faults_of(artifact)
        lines += [f"* {_code(artifact['path'])}: {_text(fault)}" for fault in faults]
        lines += _some([*artifact["weights"]["problems"], *artifact["problems"]]) if faults else []
    problems = ((found.get("verification") or {}).get("package") or {}).get("problems") or []
    lines += [f"* {_text(problem)}" for problem in problems[:MOST_LISTED]]
    error = found.get("error") or {}
    if not lines and error:
        lines = [f"* {_text(error.get('message', '')[:2000])}"]
        lines += [
            f"  * {key}: {_text(error[key])}"
            for key in ("file", "tensor", "expected", "found", "hint")
            if error.get(key)
        ]
    if not found["ok"]:
        yield from ("### What is wrong", "", *lines, "")


def _some(problems: Sequence[str]) -> list[str]:
    more = [f"  * … {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
    return [f"  * {_text(problem)}" for problem in problems[:MOST_LISTED]] + more


def _quality(found: Document) -> Iterator[str]:
    graphs = [graph for graph in measured(found) if graph.get("kl_mean") is not None]
    rows = [
        (
            _code(graph["path"]),
            bytes_text(graph["size"]),
            f"{graph['kl_mean']:.2g}",
            "–" if graph["max_kl"] is None else f"{graph['max_kl']:g}",
            f"{graph['top1']:.1%}",
            f"{graph['top1_in_top5']:.1%}",
            _perplexity(graph),
            "✅" if graph["ok"] else "❌",
        )
        for graph in graphs
    ]
    if rows:
        yield from ("### Quality against the checkpoint", "")
        head = ("graph", "size", "mean KL", "limit", "top-1", "in top-5", "perplexity", "")
        yield from _table(head, rows, right=range(1, 7))
        yield from (f"On {graphs[0]['tokens']:,} tokens: {_text(graphs[0]['text'])}.", "")


def _perplexity(graph: Mapping[str, Any]) -> str:
    source, export = graph.get("perplexity_source"), graph.get("perplexity")
    return "–" if source is None or export is None else f"{source:.4g} → {export:.4g}"


def _notes(found: Document) -> Iterator[str]:
    notes = found.get("notes") or ()
    if notes:
        yield from ("### Notes", "", *(f"* {_text(note)}" for note in notes[:MOST_LISTED]), "")


def _details(found: Document) -> Iterator[str]:
    """Digests, command and environment, folded."""
    files = [*((found.get("source") or {}).get("files") or ()), *(found.get("files") or ())]
    rows = [
        (_code(f.get("path") or f.get("name")), bytes_text(f.get("size")), _code(f.get("sha256") or f.get("crc32c")))
        for f in files[: 3 * MOST_LISTED]
    ]
    yield from ("<details><summary>Files, command and environment</summary>", "")
    yield from _table(("file", "size", "SHA-256"), rows, right=(1,))
    yield from ("```", shlex.join(["gptconvert", *map(printable, found["arguments"])]).replace("`", "'"), "```", "")
    machine = found["environment"]
    versions = {"gptconvert": machine["gptconvert"], "Python": machine["python"], **machine["libraries"]}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield from (
        f"{machine['system']}, {machine['machine']}, {machine['cpus']} CPUs; {_text(listed)}",
        "",
        "</details>",
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> Iterator[str]:
    rows, aligned = list(rows), set(right)
    if rows:
        rule = ("---:" if i in aligned else "---" for i in range(len(head)))
        yield from (f"| {' | '.join(row)} |" for row in (head, tuple(rule), *rows))
        yield ""


def _count(number: int | None, noun: str) -> str:
    return "" if number is None else f"{number:,} {noun}"


def _code(value: object) -> str:
    """A code span, in a table cell."""
    if not value:
        return "–"
    return "`" + printable(value).replace("`", "'").replace("|", "\\|") + "`"


def _text(value: object) -> str:
    return printable(value).translate(SPECIAL)
