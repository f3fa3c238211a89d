"""A report as one HTML page without script, or as a fragment for a notebook.

The page answers, in this order: is it right, what was converted from what, how is that known, and with what.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shlex
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from gptconvert.reporting.charts import Charts
from gptconvert.reporting.document import (
    Document,
    artifacts,
    bytes_text,
    counted,
    environment,
    faults_of,
    headline,
    is_quantised,
    measured,
    ratio_text,
    verdict,
    worst_group,
)
from gptconvert.reporting.files import MARK
from gptconvert.reporting.html_elements import (
    MOST_LISTED,
    code,
    figures,
    folded,
    joined,
    listing,
    mark,
    number,
    table,
    text,
)

#: A table of weights shows whole layers up to this many; the rest of the rows would only repeat that all are equal.
MOST_WEIGHTS = 5000
#: Of a page of its own: the background beside the report too.
PAGE_STYLE = "html { color-scheme: light dark; } body { margin: 0; }\n"
PAGE_STYLE += "@media screen and (prefers-color-scheme: dark) { html { background: #14171a; } }\n"


def page(found: Document) -> str:
    """A self-contained page."""
    title = f"{headline(found)}: {found.get('output') or found.get('artifact') or found['command']}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta name="generator" content="{MARK}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{text(title)}</title>",
            f"<style>\n{_style()}{PAGE_STYLE}</style>",
            "</head>",
            "<body>",
            '<main class="gptconvert">',
            *_body(found, Charts()),
            "</main>",
            "</body>",
            "</html>\n",
        ]
    )


def fragment(fields: Mapping[str, Any]) -> str:
    """The report as a part of another page, with charts if matplotlib is installed.

    Args:
        fields: of a document; those that describe the run may be missing.
    """
    found = {"arguments": [], "environment": environment(), "created": "", **fields}
    found["verdict"] = verdict(found)
    unique = hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:8]
    charts = Charts(f"g{unique}-") if importlib.util.find_spec("matplotlib") else None
    return "\n".join(['<div class="gptconvert">', f"<style>\n{_style()}</style>", *_body(found, charts), "</div>"])


def _style() -> str:
    return resources.files("gptconvert.reporting").joinpath("report.css").read_text(encoding="utf-8")


def _body(found: Document, charts: Charts | None) -> Iterator[str]:
    yield from _header(found)
    yield from _faults(found)
    yield from _about(found)
    yield from _quality(found, charts)
    for artifact in artifacts(found):
        yield from _artifact(artifact, charts)
    if artifacts(found):
        yield METHOD
    yield from _notes(found)
    yield from _files(found)
    yield from _environment(found)


METHOD = """<h2>How to read the figures</h2>
<p><b>Weights</b> are compared byte for byte with the checkpoint's. <b>Outputs</b> are compared with the same model
computed in 64-bit arithmetic. R is the artifact's error divided by the error that a correct model makes by rounding
alone, in the artifact's own arithmetic. Correct exports measure 0.7 to 1.6; above 4, verification fails. The mildest
of the faults that were planted on purpose, and that outputs show, measures 22. Milder ones, such as an epsilon that
is off by a part in 1000, are found by comparing the graph node by node.</p>
<p><b>Quality</b> applies to quantised graphs, which differ from the checkpoint on purpose. The Kullback–Leibler
divergence (KL) measures, in nats, how far the predicted distribution moves; 0 is no loss.</p>"""


def _header(found: Document) -> Iterator[str]:
    word = headline(found)
    kind = "bad" if not found["ok"] else "good" if word in ("Verified", "Measured") else "neutral"
    sign = {"bad": "✗", "good": "✓", "neutral": "○"}[kind]
    made = f"gptconvert {found['environment']['gptconvert']}"
    when = f", {found['created'].replace('T', ' ').replace('Z', ' UTC')}" if found["created"] else ""
    yield f'<header class="{kind}">'
    yield f'<h1><span aria-hidden="true">{sign}</span> {word}</h1>'
    yield f'<p class="verdict">{text(found["verdict"])}</p>'
    yield f'<p class="small">{text(made + when)}</p>'
    yield "</header>"


def _faults(found: Document) -> Iterator[str]:
    """Everything that is wrong, with its location."""
    if found["ok"]:
        return
    lines = []
    for artifact in artifacts(found):
        faults = faults_of(artifact)
        exact = [*artifact["weights"]["problems"], *artifact["problems"]]
        exact += [f"{g['group']}: {p}" for run in artifact["runs"] for g in run["groups"] for p in g["problems"]]
        located = listing(text(problem) for problem in exact) if faults and exact else ""
        lines += [f"{code(artifact['path'])}: {text('; '.join(faults))}{located}"] if faults else []
    lines += [text(problem) for problem in _package(found).get("problems", ())]
    error = found.get("error") or {}
    if not lines and error:
        keys = [key for key in ("file", "tensor", "expected", "found", "hint") if error.get(key)]
        lines.append(text(error["message"]) + listing(f"{key}: {text(error[key])}" for key in keys))
    elif error.get("hint"):
        lines.append(f"What to do next: {text(error['hint'])}")
    if lines:
        yield "<h2>What is wrong</h2>"
        yield listing(lines)


def _about(found: Document) -> Iterator[str]:
    """What was read, what was written or examined, and the verdict on each artifact."""
    model, source = found.get("model") or {}, found.get("source") or {}
    facts = [
        ("model", text(model.get("title") or "")),
        ("size", joined(_count(model, "parameters"), _count(model, "layers"), model.get("task"))),
        ("checkpoint", joined(code(source.get("path")), text(source.get("format") or ""))),
        ("revision", code(source.get("revision"))),
        ("output", code(found.get("output"))),
        ("artifact", code(found.get("artifact"))),
    ]
    rows = [f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in facts if value]
    verdicts = [_verdict_row(artifact) for artifact in artifacts(found)]
    if rows or verdicts:
        converted = found["command"] in ("convert", "plan")
        yield f"<h2>{'What was converted' if converted else 'What was examined'}</h2>"
    if rows:
        yield f'<table class="facts">{"".join(rows)}</table>'
    head = ("artifact", "verdict", "size", "weights equal", "probe groups passed", "largest R")
    yield from table(head, verdicts, right=range(2, 6))
    package = _package(found)
    if package.get("files"):
        wrong = counted(len(package["problems"]), "difference") if package["problems"] else "all agree"
        files = counted(len(package["files"]), "file")
        yield f"<p>Checksums, configuration and tokenizer, compared with the checkpoint's: {files}, {wrong}.</p>"


def _verdict_row(artifact: Mapping[str, Any]) -> tuple[str, ...]:
    weights, groups = artifact["weights"], [group for run in artifact["runs"] for group in run["groups"]]
    ratios = [worst_group(run) for run in artifact["runs"] if run["groups"]]
    worst = max(ratios, key=lambda pair: float("inf") if pair[0] is None else pair[0], default=None)
    return (
        code(artifact["path"]),
        mark(artifact["ok"]),
        bytes_text(artifact.get("size")),
        f"{weights['equal']} of {weights['weights']}",
        f"{sum(group['ok'] for group in groups)} of {len(groups)}" if groups else "–",
        "–" if worst is None else ratio_text(worst[0]),
    )


def _artifact(artifact: Mapping[str, Any], charts: Charts | None) -> Iterator[str]:
    yield f"<h2>{code(artifact['path'])} {mark(artifact['ok'])}</h2>"
    if faults := faults_of(artifact):
        why = "; ".join(faults)
        yield f"<p>{text(why[0].upper() + why[1:])}.</p>"
    for run in artifact["runs"]:
        yield f"<h3>{text(run['runtime'])}</h3>"
        if charts is not None:
            yield from figures([charts.ratios(run), charts.blocks(run)])
        yield from folded(f"Figures of {counted(len(run['groups']), 'probe group')}", _groups(run))
    yield from _weights(artifact["weights"])


def _groups(run: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for group in run["groups"]:
        outputs, cache = (
            [m for m in group["measures"] if m["tensor"].startswith("present.") == presents]
            for presents in (False, True)
        )
        main, similar = outputs[0] if outputs else {}, group.get("similarity") or {}
        rows.append(
            (
                text(group["group"]),
                str(group["tokens"]),
                ratio_text(main["ratio"]) if main else "–",
                number(main.get("max_abs")),
                ratio_text(cache[0]["ratio"]) if cache else "–",
                f"{similar['top1']:.1%}" if similar.get("top1") is not None else "–",
                mark(group["ok"]),
            )
        )
    head = ("probe group", "tokens", "R", "largest error", "R of keys and values", "same top-1", "verdict")
    yield from table(head, rows, right=range(1, 6))


def _weights(weights: Mapping[str, Any]) -> Iterator[str]:
    """Every stored tensor, collapsed by layer."""
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for tensor in sorted(weights.get("tensors") or (), key=_in_order)[:MOST_WEIGHTS]:
        layers.setdefault(_layer(tensor["weight"]), []).append(tensor)
    title = f"Weights: {weights['equal']} of {weights['weights']} equal, byte for byte"
    inner: list[str] = []
    for layer, tensors in layers.items():
        wrong = sum(tensor["ok"] is False for tensor in tensors)
        size = bytes_text(sum(tensor["size"] for tensor in tensors))
        state = (
            f"{wrong} not equal" if wrong else "outputs only" if any(t["ok"] is None for t in tensors) else "equal"
        )
        about = f'<span class="small">{counted(len(tensors), "tensor")}, {size}, {state}</span>'
        rows = [
            (
                code(tensor["tensor"] or tensor["weight"]),
                tensor["dtype"],
                "×".join(map(str, tensor["shape"])) or "scalar",
                bytes_text(tensor["size"]),
                mark(tensor["ok"], ("equal", "differs", "outputs only")),
            )
            for tensor in tensors
        ]
        listed = table(("tensor", "type", "shape", "size", ""), rows, right=(3,))
        inner += folded(layer, listed, about, opened=bool(wrong), printed=False)
    if inner:
        yield from folded(title, inner, opened=bool(weights["problems"]))


def _layer(weight: str) -> str:
    """``layer 3`` of ``h.3.mlp.c_fc.weight``; ``embedding`` and ``head`` for the rest."""
    kind, _, rest = weight.partition(".")
    if kind == "h":
        return f"layer {rest.partition('.')[0]}"
    return "embedding" if kind in ("wte", "wpe", "embedding") else "head"


def _in_order(tensor: Mapping[str, Any]) -> tuple[int, int, str]:
    """Embedding, layers by number, head."""
    layer = _layer(tensor["weight"])
    digits = layer.removeprefix("layer ")
    place = {"embedding": 0, "head": 2}.get(layer, 1)
    return place, int(digits) if digits.isdigit() else 0, str(tensor["tensor"])


def _quality(found: Document, charts: Charts | None) -> Iterator[str]:
    graphs = [graph for graph in measured(found) if graph.get("kl_mean") is not None]
    if not graphs:
        return
    yield "<h2>Quality against the checkpoint</h2>"
    rows = [
        (
            code(graph["path"]),
            mark(graph["ok"]),
            bytes_text(graph["size"]),
            number(graph["kl_mean"]),
            "–" if graph["max_kl"] is None else f"{graph['max_kl']:g}",
            number(graph["kl_99_9"]),
            f"{graph['top1']:.1%}",
            f"{graph['top1_in_top5']:.1%}",
            _perplexity(graph),
        )
        for graph in graphs
    ]
    head = ("graph", "verdict", "size", "mean KL", "limit", "99.9 % KL", "same top-1", "in top-5", "perplexity")
    yield from table(head, rows, right=range(2, 9))
    yield f'<p class="small">On {counted(graphs[0]["tokens"], "token")}: {text(graphs[0]["text"])}.</p>'
    if charts is not None:
        yield from figures([charts.sizes(graphs, _lossless(found)), charts.positions(graphs)])
    for graph in graphs:
        if graph["worst_layers"]:
            worst = ", ".join(f"{code(name)} {error:.2%}" for name, error in graph["worst_layers"].items())
            yield f"<p>{code(graph['path'])} loses most in {worst} (error relative to the weights' size).</p>"


def _lossless(found: Document) -> int | None:
    """Bytes of the largest ONNX graph that is not quantised."""
    sizes = [a["size"] for a in artifacts(found) if a["kind"] == "onnx" and not is_quantised(a) and a.get("size")]
    return max(sizes, default=None)


def _perplexity(graph: Mapping[str, Any]) -> str:
    source, export = graph.get("perplexity_source"), graph.get("perplexity")
    return "–" if source is None or export is None else f"{source:.4g} → {export:.4g}"


def _notes(found: Document) -> Iterator[str]:
    if found.get("notes"):
        yield "<h2>Notes</h2>"
        yield listing(text(note) for note in found["notes"])


def _files(found: Document) -> Iterator[str]:
    """Digests of the source's files, and of the files written or examined."""
    source, files = (found.get("source") or {}).get("files") or (), found.get("files") or ()
    if not source and not files:
        return
    yield "<h2>Files</h2>"
    for title, listed in (("Checkpoint", source), ("Planned" if found["command"] == "plan" else "Export", files)):
        if listed:
            size = bytes_text(sum(file.get("size") or 0 for file in listed))
            rows = [_file_row(file) for file in listed[:MOST_LISTED]]
            about = f'<span class="small">{counted(len(listed), "file")}, {size}</span>'
            yield from folded(
                title, table(("file", "size", "digest"), rows, right=(1,)), about, opened=len(listed) < 20
            )


def _file_row(file: Mapping[str, Any]) -> tuple[str, ...]:
    algorithm = next((name for name in ("sha256", "crc32c") if file.get(name)), None)
    digest = (
        "–" if algorithm is None else f'<span class="hash"><code>{algorithm}:{text(file[algorithm])}</code></span>'
    )
    return code(file.get("path") or file.get("name")), bytes_text(file.get("size")), digest


def _environment(found: Document) -> Iterator[str]:
    machine = found["environment"]
    yield "<h2>Command and environment</h2>"
    if found["arguments"]:
        yield f"<pre><code>{text(shlex.join(['gptconvert', *found['arguments']]))}</code></pre>"
    versions = {"gptconvert": machine["gptconvert"], "Python": machine["python"], **machine["libraries"]}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    place = f"{machine['system']}, {machine['machine']}, {machine['cpus']} CPUs"
    yield f'<p class="small">{text(place)}<br>{text(listed)}</p>'


def _package(found: Document) -> Mapping[str, Any]:
    return (found.get("verification") or {}).get("package") or {}


def _count(model: Mapping[str, Any], key: str) -> str:
    return f"{model[key]:,} {key}" if model.get(key) is not None else ""
