"""Click options for the table in :mod:`gptconvert.model.options`, and options of the command line alone."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from gptconvert.cli.output import note
from gptconvert.errors import UsageError, printable
from gptconvert.model.option_info import Group, OptionInfo, Stage, parse_size
from gptconvert.model.options import DEFAULTS, FIELDS, INFO, Options
from gptconvert.targets.registry import TARGETS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

DISPLAY = "Display"
#: Sections of the help, in order.
GROUPS: tuple[str, ...] = (
    *get_args(Group),
    *("Batch", "Page", "Repository", "Model card"),
    *("Prompts", "Runtime", "Choice of tokens", "Length", "Several texts"),
    DISPLAY,
)
#: Parameters that may be empty: the scope of names without a prefix.
MAY_BE_EMPTY = ("prompt", "scope")
#: Environment variable of a library → the level at which it reports errors only. It is read at import.
LEVELS = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR", "HF_HUB_VERBOSITY": "error"}
#: Width of the flags column; longer flags get a line to themselves.
FLAGS_WIDTH = 24
#: Replaces "-" while lines are wrapped, so that flags and names are not split.
UNBROKEN_HYPHEN = "\N{NON-BREAKING HYPHEN}"


class Option(click.Option):
    """An option in a section of the help, optionally with a text that describes its default."""

    def __init__(self, *args: Any, group: str, default_text: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group, self.default_text = group, default_text

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value of the option's variable, which is named after its flag: ``--to`` is ``GPTCONVERT_HF_TO``."""
        flag = max(self.opts, key=len)
        return os.environ.get(variable(ctx.auto_envvar_prefix or "", flag)) or None

    def get_help_extra(self, ctx: click.Context) -> Any:
        """The text in brackets: only the default. The help text states ranges where they matter."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        if self.default_text is not None:
            extra["default"] = self.default_text
        return extra


class Command(click.Command):
    """A command whose help lists its options by section."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments, which reports show."""
        ctx.meta["gptconvert.arguments"] = [*filter(None, [ctx.info_name]), *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, unless a value is empty or a variable of the command names no option.

        Raises:
            click.UsageError: one of these, which mostly come from scripts with a misspelled or unset variable.
        """
        for parameter in self.get_params(ctx):
            value = ctx.params.get(parameter.name or "")
            if parameter.name not in MAY_BE_EMPTY and (value == "" or (isinstance(value, tuple) and "" in value)):
                raise click.BadParameter("the text is empty; is a shell variable unset?", ctx, parameter)
        self._check_variables(ctx)
        return super().invoke(ctx)

    def _check_variables(self, ctx: click.Context) -> None:
        prefix, bare = f"{ctx.auto_envvar_prefix}_", f"{ctx.auto_envvar_prefix}".partition("_")[0]
        flags = [max(p.opts, key=len) for p in self.get_params(ctx) if isinstance(p, Option)]
        known = {variable(bare, flag): variable(prefix[:-1], flag) for flag in flags if flag != "--debug"}
        for name in sorted(name for name, value in os.environ.items() if value):
            if name.startswith(prefix) and name not in {*known.values(), f"{prefix}DEBUG"}:
                ends = [each.removeprefix(prefix) for each in known.values()]
                near = difflib.get_close_matches(name.removeprefix(prefix).removeprefix("NO_"), ends, 1)
                hint = f" Did you mean {prefix}{near[0]}?" if near else ""
                raise click.UsageError(
                    f"{printable(name)} is set, but {ctx.info_name} has no such option.{hint}", ctx
                )
            if name in known:
                note(
                    f"{name} is set and has no effect; the variable is {known[name]}", ctx.params.get("quiet", False)
                )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                flags, text = record
                group = getattr(parameter, "group", DISPLAY)  # click's --help option has no group
                sections[group].append((flags.ljust(FLAGS_WIDTH), text.replace("-", UNBROKEN_HYPHEN)))
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records, col_max=FLAGS_WIDTH)
        formatter.buffer = [text.replace(UNBROKEN_HYPHEN, "-") for text in formatter.buffer]


def variable(prefix: str, flag: str) -> str:
    """The environment variable of an option."""
    return f"{prefix}_{flag.lstrip('-').replace('-', '_').upper()}"


class Targets(click.ParamType):  # type: ignore[type-arg]  # click 8.1 cannot subscript it
    """Target names, one or several separated by commas."""

    name = "target"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(TARGETS)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(value.replace(",", " ").split())
        wrong = next((name for name in names if name not in TARGETS), None if names else value)
        if wrong is not None:
            self.fail(f"{wrong!r} is not one of {', '.join(TARGETS)}", param, ctx)
        return names

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [rv]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in TARGETS if name.startswith(incomplete)]


def size_in_bytes(value: str | int) -> int:
    """Parse ``5GB``, ``500MB``, ``1GiB`` or a number of bytes."""
    try:
        return parse_size(str(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def stack(*decorators: Decorator) -> Decorator:
    """Combine decorators; the help lists their options in the order given."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda f, d: d(f), reversed(decorators), function)

    return apply


def own(*declarations: str, group: str, **settings: Any) -> Decorator:
    """An option that is not a field of :class:`Options`."""
    return click.option(*declarations, cls=Option, group=group, **settings)


def option(name: str) -> Decorator:
    """The option for a field of :class:`Options`."""
    info, default = INFO[name], DEFAULTS[name]
    settings: dict[str, Any] = {"help": info.help, "default_text": info.default_text, "show_default": True}
    flag = info.flag
    if name == "targets":
        settings |= {"multiple": True, "type": Targets()}
    elif isinstance(default, tuple):
        metavar = f"[{'|'.join(map(str, info.choices))}]" if info.choices else info.metavar
        settings |= {"multiple": True, "type": _type(info), "metavar": metavar, "show_default": False}
    elif info.is_flag:
        flag = flag if default is False else f"{flag}/{_negated(flag)}"
        settings |= {"is_flag": True, "show_default": bool(default)}
    elif name == "verify":  # the level is optional
        settings |= {"is_flag": False, "flag_value": default, "type": _type(info)}
    else:
        settings |= {"type": _type(info), "metavar": info.metavar}
    return own(flag, name, group=info.group, default=default, **settings)


def options_of(*stages: Stage, only: Iterable[str] = FIELDS) -> Decorator:
    """The options of these stages that are in ``only``, in the table's order."""
    chosen = {*only}
    return stack(*(option(name) for name in FIELDS if INFO[name].stage in stages and name in chosen))


def _negated(flag: str) -> str:
    return flag.replace("--", "--no-", 1)


def _type(info: OptionInfo) -> Any:
    """The click type that checks an option's value."""
    if info.metavar == "N":
        numbers: Any = info.choices or (info.minimum, None)
        return click.IntRange(numbers[0], numbers[-1])
    if info.choices:
        return click.Choice([str(choice) for choice in info.choices])
    kinds: dict[str, Any] = {
        "X": click.FLOAT,
        "SIZE": size_in_bytes,
        "FILE": click.Path(),
        "DIR": click.Path(file_okay=False),
    }
    return kinds.get(info.metavar or "", click.STRING)


NO_VERIFY = own("--no-verify", is_flag=True, group="Verification", help="Skip verification.")
JSON = own("--json", "as_json", is_flag=True, group=DISPLAY, help="Print one JSON object on stdout and nothing else.")
QUIET = own("-q", "--quiet", is_flag=True, group=DISPLAY, help="Do not print progress or notes.")
VERBOSE = own("-v", "--verbose", is_flag=True, group=DISPLAY, help="Print the figures of every probe group.")
DEBUG = own("--debug", is_flag=True, expose_value=False, group=DISPLAY, help="Show the traceback of an error.")


def chosen(given: dict[str, Any], **more: object) -> Options:
    """The :class:`Options` among a command's parameters.

    Raises:
        UsageError: options contradict each other, or do not apply to the targets.
    """
    values = {name: given[name] for name in FIELDS if name in given} | more
    if "targets" in values:
        values["targets"] = tuple(dict.fromkeys(name for names in values["targets"] for name in names))
    named = _named_on_the_command_line()
    if given.get("no_verify"):
        if "verify" in named:
            raise UsageError(f"--no-verify contradicts --verify {values['verify']}", hint="drop one of them")
        values["verify"] = None
    options = Options(**values)
    options.check_targets(named)
    return options


def _named_on_the_command_line() -> frozenset[str]:
    context = click.get_current_context()
    return frozenset(
        name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    )


def quieten() -> None:
    """Keep libraries from writing to stderr."""
    for name, level in LEVELS.items():
        os.environ.setdefault(name, level)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in ("huggingface_hub", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
