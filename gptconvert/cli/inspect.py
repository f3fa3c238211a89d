"""``gptconvert inspect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from gptconvert.cli import options
from gptconvert.cli.config_summary import config_summary
from gptconvert.cli.output import emit, human_bytes, note, print_json, table
from gptconvert.errors import printable

#: Dropped names listed per reason.
MAX_DROPPED = 4
#: Outcomes of the entries of the source directory, in display order, and the characters for each.
OUTCOMES = ("read", "carried", "not needed", "left behind")
MAX_WIDTH = 64


@click.command(cls=options.Command)
@click.argument("source")
@options.options_of("source", "checkpoint")
@options.own(
    "--tensors/--no-tensors",
    default=None,
    group=options.DISPLAY,
    show_default=True,
    default_text="one line per kind of tensor",
    help="List every tensor, or no tensors.",
)
@options.JSON
@options.QUIET
@options.DEBUG
def inspect(source: str, tensors: bool | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show SOURCE's configuration, tensors, sizes and types, its files, and what a conversion would drop.

    Only headers are read, so this is fast for checkpoints of any size.
    """
    options.quieten()
    from gptconvert.inspection import inspect as run

    found = run(source, options.chosen(given))
    if as_json:
        print_json({"ok": True, **found})
        return
    for text in found["notes"]:
        note(text, quiet)
    emit("\n\n".join(filter(None, _sections(found, tensors))))


def _sections(found: Mapping[str, Any], tensors: bool | None) -> list[str]:
    size = f"{found['parameters']:,} parameters, {human_bytes(found['size'])}, {', '.join(found['dtypes'])}"
    revision = f", revision {printable(found['revision'])}" if found["revision"] else ""
    head = f"{found['title']}  ({found['format']}{revision})\n  {size}"
    tokenizer = ", ".join(found["tokenizer"]) or "none"
    rows = [*config_summary(found["config"], found["special_ids"]), ("tokenizer", tokenizer)]
    rows += _files(found["inventory"])
    summary = table([(key, printable(text)) for key, text in rows])
    listed = "" if tensors is False else _tensor_table(found["tensors"], every=bool(tensors))
    return [head, summary, listed, _dropped(found["dropped"], every=bool(tensors))]


def _tensor_table(tensors: Sequence[Mapping[str, Any]], *, every: bool) -> str:
    """One line per tensor, or per kind of tensor: the same name in all layers, with one type and shape."""
    from gptconvert.model.names import grouped

    kinds: dict[tuple[str, str], dict[str, int]] = {}
    for t in tensors:
        kinds.setdefault((t["dtype"], "×".join(map(str, t["shape"])) or "scalar"), {})[t["name"]] = t["size"]
    lines = {}  # first name → line; used to keep the order of the file
    for (dtype, shape), sizes in kinds.items():
        for name, names in ({n: [n] for n in sizes} if every else grouped(sizes, to="..")).items():
            nbytes = human_bytes(sum(sizes[n] for n in names))
            lines[names[0]] = (printable(name), dtype, shape, nbytes)
    rows = [lines[t["name"]] for t in tensors if t["name"] in lines]
    return table([("tensor", "type", "shape", "size" if every else "total size"), *rows], right=(3,))


def _dropped(dropped: Mapping[str, str], *, every: bool) -> str:
    """The dropped tensors by reason: all names, or the first few kinds."""
    from gptconvert.model.names import grouped

    reasons: dict[str, list[str]] = {}
    for name, why in dropped.items():
        reasons.setdefault(why, []).append(name)
    lines = ["Would be dropped"] if reasons else []
    for why, names in reasons.items():
        shown = names if every else list(grouped(names, to=".."))
        most = len(shown) if every else MAX_DROPPED
        lines.append(f"  {len(names)} {'tensor' if len(names) == 1 else 'tensors'}: {why}")
        lines += [f"    {printable(name)}" for name in shown[:most]]
        lines += [f"    … {len(shown) - most} more kinds (--tensors lists all)"] if len(shown) > most else []
    return "\n".join(lines)


def _files(entries: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """The entries of the source directory by outcome, each list cut to one line."""
    rows = []
    for outcome in OUTCOMES:
        names = [printable(entry["name"]) for entry in entries if entry["outcome"] == outcome]
        shown = len(names)
        while shown > 1 and len(_listed(names, shown)) > MAX_WIDTH:
            shown -= 1
        rows += [(outcome, _listed(names, shown))] if names else []
    return rows


def _listed(names: Sequence[str], shown: int) -> str:
    more = [f"… {len(names) - shown} more (--json lists all)"] if len(names) > shown else []
    return ", ".join([*names[:shown], *more])
