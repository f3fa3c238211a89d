"""``gptconvert schema``."""

from __future__ import annotations

import json

import click

from gptconvert.cli.options import DEBUG, JSON, Command
from gptconvert.cli.output import emit, print_json, table
from gptconvert.reporting.schemas import NAMES, load


@click.command(cls=Command)
@click.argument("name", type=click.Choice(NAMES), required=False, metavar="[NAME]")
@JSON
@DEBUG
def schema(name: str | None, as_json: bool) -> None:
    """Print the JSON Schema of a command's --json, of manifest.json or of a JSON report; without NAME, list them.

    The schemas are a contract: keys are added, but none is removed and none changes its meaning without a new
    schema_version. The converting commands share the schema convert; with --dry-run, their output follows plan.
    """
    if name is None:
        titles = [(each, str(load(each)["title"])) for each in NAMES]
        if as_json:
            print_json({"ok": True, "schemas": [{"name": each, "title": title} for each, title in titles]})
        else:
            emit(table(titles))
    elif as_json:
        print_json({"ok": True, "name": name, "schema": load(name)})
    else:
        emit(json.dumps(load(name), indent=2))
