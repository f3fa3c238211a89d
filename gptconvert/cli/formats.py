"""``gptconvert formats``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from gptconvert.cli.options import DEBUG, DISPLAY, JSON, Command, own
from gptconvert.cli.output import emit, print_json


@click.command(cls=Command)
@JSON
@own("--markdown", is_flag=True, group=DISPLAY, help="Print the tables of docs/formats.md.")
@DEBUG
def formats(as_json: bool, markdown: bool) -> None:
    """List the supported formats, models and targets."""
    from gptconvert.pipeline import matrix

    found = matrix()
    if as_json:
        print_json({"ok": True, **found})
        return
    emit(_markdown_tables(found) if markdown else "\n\n".join(_sections(found)))


def _sections(found: Mapping[str, Any]) -> Iterator[str]:
    """The lists for a terminal, at most 80 columns wide."""
    yield "Formats, by command\n" + _described([(source["command"], source["title"]) for source in found["sources"]])
    yield "Targets of --to\n" + _described([(target["name"], target["title"]) for target in found["targets"]])
    yield "Graphs of --quantize\n" + _described([(each["name"], each["title"]) for each in found["variants"]])
    for family in found["families"]:
        rows = [(key, ", ".join(family[key])) for key in ("sources", "targets", "tasks")]
        yield f"{family['title']} ({family['name']})\n" + _described(rows)


def _described(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(key) for key, _ in rows)
    lines = []
    for key, text in rows:
        first, rest = f"  {key.ljust(width)}  ", " " * (width + 4)
        # Names such as openai-tf stay whole.
        lines.append(textwrap.fill(text, 80, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False))
    return "\n".join(lines)


def _markdown_tables(found: Mapping[str, Any]) -> str:
    names = [target["name"] for target in found["targets"]]
    mark = {True: "yes", False: "–"}
    families: list[tuple[str, ...]] = [("family", "model", "read from", *names, "tasks")]
    families += [
        (
            f["name"],
            f["title"],
            ", ".join(f["sources"]),
            *(mark[name in f["targets"]] for name in names),
            ", ".join(f["tasks"]),
        )
        for f in found["families"]
    ]
    sources = [("command", "files"), *((s["command"], s["title"]) for s in found["sources"])]
    variants = [("--quantize", "file", "contents"), *((v["name"], v["file"], v["title"]) for v in found["variants"])]
    return f"{_markdown(families)}\n\n{_markdown(sources)}\n\n{_markdown(variants)}\n"


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
