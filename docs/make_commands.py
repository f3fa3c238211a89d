"""Write docs/commands.md from the command line's own help: ``python docs/make_commands.py``, or ``make docs``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from gptconvert.cli import COMMANDS, group
from gptconvert.cli.options import DISPLAY, GROUPS

PAGE = Path(__file__).with_name("commands.md")
#: The command with the most options. Others that share an option refer to it.
MAIN = "convert"

HEAD = """# Commands and options

Generated from the command line's help by `make docs`; a test checks that it is current. `gptconvert COMMAND --help`
prints the same. What scripts depend on is on another page: [exit codes, output, environment](cli.md).
"""


def render() -> str:
    """Return the page."""
    order = sorted(COMMANDS, key=lambda name: name != MAIN)
    return "\n".join([HEAD, *(line for name in order for line in _command(name))])


def _command(name: str) -> Iterator[str]:
    command, context = _found(name)
    yield from (f"## {name}", "", f"`{command.get_usage(context).removeprefix('Usage: ')}`", "")
    yield from (_escaped(inspect.cleandoc(command.help or "")), "")
    if command.epilog:
        yield from ("```", _without_marks(command.epilog), "```", "")
    main, whole = {} if name == MAIN else _options(MAIN), []
    for section, rows in _options(name).items():
        shared = [flags for flags in rows if rows[flags] == main.get(section, {}).get(flags)]
        own = [row for flags, row in rows.items() if flags not in shared]
        if len(shared) == len(main.get(section, rows)):
            whole.append(section)
        elif shared:
            yield f"{section}, as in [{MAIN}](#{MAIN}): {', '.join(_name(flags) for flags in shared)}.\n"
        if own:
            yield from (f"| {section} | | default |", "| --- | --- | --- |", *own, "")
    if whole:
        yield f"All options of [{MAIN}](#{MAIN}) under {', '.join(whole)}.\n"


def _found(name: str) -> tuple[click.Command, click.Context]:
    parent = click.Context(group, info_name="gptconvert")
    command = group.get_command(parent, name)
    assert command is not None, name
    return command, click.Context(command, parent, info_name=name)


def _options(name: str) -> dict[str, dict[str, str]]:
    """Section of the help → flags → row of the table."""
    command, context = _found(name)
    sections: dict[str, dict[str, str]] = {section: {} for section in GROUPS}
    for parameter in command.params:
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            flags, text = record
            about, _, default = text.partition("  [default: ")
            row = f"| `{_cell(flags)}` | {_cell(_escaped(about))} | {_cell(default.removesuffix(']'))} |"
            sections[getattr(parameter, "group", DISPLAY)][flags] = row
    return {section: rows for section, rows in sections.items() if rows}


def _name(flags: str) -> str:
    """The long flag alone: ``-o, --output DIR`` → ``--output``."""
    return "`" + re.findall(r"--[\w-]+", flags)[0] + "`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _escaped(text: str) -> str:
    """Flags as code; paragraphs on one line each; nothing else that Markdown would interpret."""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return re.sub(r"(?<![\w`-])(--?[a-z][\w-]*)", r"`\1`", "\n\n".join(paragraphs).replace("*", r"\*"))


def _without_marks(epilog: str) -> str:
    """Without the marks that keep click from wrapping lines."""
    return "\n".join(line for line in inspect.cleandoc(epilog).splitlines() if line != "\b").strip()


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
