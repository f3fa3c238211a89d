"""``gptconvert formats``."""

from __future__ import annotations

import click

from gptconvert.cli.options import DEBUG, DISPLAY, JSON, Command, own
from gptconvert.cli.output import print_json, table


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
    sources, targets = found["sources"], found["targets"]
    names = [target["name"] for target in targets]
    mark = {True: "yes", False: "–"}
    rows: list[tuple[str, ...]] = [("family", "model", "read from", *names, "tasks")]
    rows += [
        (
            f["name"],
            f["title"],
            ", ".join(f["sources"]),
            *(mark[name in f["targets"]] for name in names),
            ", ".join(f["tasks"]),
        )
        for f in found["families"]
    ]
    formats_rows: list[tuple[str, ...]] = [("source", "files"), *((s["name"], s["title"]) for s in sources)]
    for part in (rows, formats_rows):
        click.echo(_markdown(part) if markdown else table(part))
        click.echo()


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
