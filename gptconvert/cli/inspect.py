"""``gptconvert inspect``."""

from __future__ import annotations

from typing import Any

import click

from gptconvert.cli import options
from gptconvert.cli.output import human_bytes, note, print_json, table
from gptconvert.errors import printable


@click.command()
@click.argument("source")
@options.OPENING
@options.HUB
@options.TASK
@options.ACTIVATION
@click.option("--tensors/--no-tensors", default=True, help="List every tensor.")
@options.OUTPUT_FORMAT
def inspect(source: str, tensors: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show what SOURCE is: configuration, tensors, sizes, types, and what a conversion would drop.

    Only headers are read, so a checkpoint of any size is inspected at once.
    """
    options.quieten()
    from gptconvert.inspection import inspect as run

    found = run(source, options.chosen(given))
    if as_json:
        print_json({"ok": True, **found})
        return
    for text in found["notes"]:
        note(text, quiet)
    click.echo(f"{found['title']}  ({found['format']})")
    click.echo(f"  {found['parameters']:,} parameters, {human_bytes(found['bytes'])}, {', '.join(found['dtypes'])}")
    click.echo()
    click.echo(table([(key, printable(_short(value))) for key, value in found["config"].items()]))
    if tensors:
        rows = [(t["name"], t["dtype"], "×".join(map(str, t["shape"])) or "scalar") for t in found["tensors"]]
        rows = [(printable(a), b, c) for a, b, c in rows]
        click.echo()
        click.echo(table([("tensor", "type", "shape"), *rows]))
    if found["dropped"]:
        click.echo()
        click.echo("Would be dropped")
        click.echo(table([(printable(name), why) for name, why in found["dropped"].items()]))


def _short(value: object) -> str:
    """A value on one line; a tuple of equal entries once."""
    if isinstance(value, (list, tuple)) and value and all(entry == value[0] for entry in value):
        return f"{value[0]} in each of {len(value)} layers"
    return str(value)
