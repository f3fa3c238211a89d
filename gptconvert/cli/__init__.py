"""The command line: one module per command, imported only when the command runs, to keep ``--help`` fast."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from gptconvert.cli.limits import limit_error
from gptconvert.cli.output import SIGPIPE, StreamError, emit, emit_error, flush, lost, note, print_json
from gptconvert.errors import (
    GptConvertError,
    InputError,
    OutputError,
    UnsupportedError,
    VerificationError,
    printable,
    reason,
)
from gptconvert.version import __version__

if TYPE_CHECKING:
    from gptconvert.publish.journal import Journal

#: command → (module, one-line help). The module defines the command, or builds it with ``format_command``.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "openai-tf": ("convert", "Convert OpenAI's own checkpoints: GPT-2 bundles, GPT-1 arrays."),
    "hf": ("convert", "Convert a Hugging Face directory or hub repository."),
    "mesh-tf": ("convert", "Convert GPT-Neo's original checkpoint (Mesh-TensorFlow)."),
    "mesh-jax": ("convert", "Convert GPT-J's original checkpoint (mesh-transformer-jax)."),
    "neox": ("convert", "Convert a GPT-NeoX checkpoint (DeepSpeed)."),
    "nanogpt": ("convert", "Convert a nanoGPT checkpoint (ckpt.pt)."),
    "llmc": ("convert", "Convert an llm.c model file (.bin)."),
    "megatron": ("convert", "Convert a Megatron-LM GPT-2 checkpoint."),
    "gguf": ("convert", "Convert a GGUF file of llama.cpp."),
    "convert": ("convert", "Convert any supported checkpoint; the format is detected."),
    "batch": ("batch", "Run a list of conversions, on this machine or a cluster."),
    "inspect": ("inspect", "Show configuration and tensors; reads headers only."),
    "verify": ("verify", "Check an existing export against its checkpoint."),
    "quality": ("quality", "Measure what an export loses against its checkpoint."),
    "push": ("push", "Upload a verified export to the Hugging Face hub."),
    "generate": ("generate", "Continue a text with an exported model."),
    "web": ("web", "Add a page that writes with the model in a browser."),
    "formats": ("formats", "List the supported formats, models and targets."),
    "schema": ("schema", "Print the JSON Schema of a command's output."),
}
#: Commands that write no output.
READING = frozenset({"inspect", "verify", "quality", "generate", "formats", "schema"})
#: Import name → distribution, where they differ.
PACKAGES: Mapping[str, str] = {"yaml": "pyyaml", "google_crc32c": "google-crc32c"}
#: System errors that the user can mend → the hint.
SYSTEM_ERRORS: Mapping[int, str] = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EROFS: "choose an output on a file system that can be written",
}
EPILOG = """\b
Exit codes: 0 ok, 2 usage, 3 input invalid, 4 unsupported, 5 verification failed
(nothing published), 6 output, 7 unsafe input refused, 130/143 interrupted.

\b
Examples:
  gptconvert openai-tf ./model.ckpt --to onnx
  gptconvert hf distilgpt2 --to onnx --to safetensors -o distilgpt2-export
  gptconvert inspect ./models/124M

\b
Documentation: https://github.com/gptconvert/gptconvert/tree/main/docs
"""


class LazyGroup(click.Group):
    """A group that imports a command's module on lookup, and suggests a command for a misspelled one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """``--version --json``: the flag is not an option of the group, whose commands have it."""
        shows_version = "--version" in args and not any(arg in COMMANDS for arg in args)
        ctx.meta["gptconvert.as_json"] = shows_version and is_json(args)
        return super().parse_args(ctx, [arg for arg in args if not (shows_version and arg == "--json")])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"gptconvert.cli.{COMMANDS[name][0]}")
        command: click.Command = getattr(module, name, None) or module.format_command(name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f" Did you mean {near[0]}?" if near else f" Commands: {', '.join(COMMANDS)}."
            if not near and ("/" in name or os.path.exists(name)):
                hint = f" To convert it: gptconvert convert {printable(name)}"
            raise click.UsageError(f"No such command {printable(name)!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,  # scripts set GPTCONVERT_VERSION
    callback=lambda ctx, _, given: _show_version(ctx) if given and not ctx.resilient_parsing else None,
    help="Show the version; with --json, those of the libraries too.",
)
@click.option("--debug", is_flag=True, allow_from_autoenv=False, help="Show the traceback of an error.")
@click.pass_context
def group(ctx: click.Context, debug: bool) -> None:
    """Convert GPT checkpoints to ONNX, safetensors and TensorFlow, and prove each export equal to its checkpoint."""
    ctx.obj = {"debug": debug}


def _show_version(ctx: click.Context) -> None:
    """Print the version and end."""
    if ctx.meta["gptconvert.as_json"]:
        from gptconvert.reporting.document import environment

        found = environment()
        print_json({"ok": True, "name": "gptconvert", "version": found.pop("gptconvert"), **found})
    else:
        emit(f"gptconvert, version {__version__}")
    ctx.exit()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code: the entry point."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # √ and × are not in every encoding
    sys.exit(run(args))


def run(args: list[str]) -> int:
    """Run a command line; returns its exit code. Every error becomes one message on stderr."""
    from gptconvert.publish import journal, signals

    lost.clear()
    begun = journal.begin()
    try:
        with signals.raising():
            code = _run(args)
    except signals.Interrupted as error:
        code = interrupted(error.signum, outcome(begun, args), is_json(args))
    if "stdout" in lost and not code:
        note("standard output is closed, so the result was not printed")
    flush()
    return code or (OutputError.exit_code if "stderr" in lost else 0)


def _run(args: list[str]) -> int:
    """Run a command line; returns its exit code.

    Raises:
        Interrupted: by a signal. The staged files are removed.
    """
    from gptconvert.publish import signals

    debug = _given("--debug", args) or _is_on("GPTCONVERT_DEBUG")
    as_json = is_json(args)
    args = _bare_verify([arg for arg in args if arg != "--debug"])
    try:
        done = group.main(args, prog_name="gptconvert", standalone_mode=False, auto_envvar_prefix="GPTCONVERT")
        return done if isinstance(done, int) else 0  # click returns the code of `Exit`
    except click.ClickException as error:
        if as_json:
            report(GptConvertError(error.format_message()), error.exit_code, as_json=True, kind="usage")
        else:
            with contextlib.suppress(OSError):
                error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        return interrupted(signal.SIGINT, "", as_json)
    except GptConvertError as error:
        signals.check()  # libraries turn an interrupted import into an error of their own
        if debug:
            raise
        reported = limit_error(error) or error
        report(reported, reported.exit_code, as_json)
        return reported.exit_code
    except SystemExit as error:
        from gptconvert.publish.signals import Interrupted

        if isinstance(error, Interrupted):
            raise
        if isinstance(error.__context__, BrokenPipeError):  # click exits with 1
            return 128 + SIGPIPE
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        # Not Exception: some libraries raise other classes (pyo3's PanicException).
        signals.check()
        if debug:
            raise
        explained, code = _explained(error)
        report(explained, code, as_json)
        return code


def interrupted(number: int, consequence: str, as_json: bool) -> int:
    """Report that a signal ended the command, and what follows from it, if anything; returns the exit code."""
    code = 128 + number
    report(GptConvertError(joined("interrupted", consequence)), code, as_json, kind="interrupted")
    return code


def joined(*clauses: str | None) -> str:
    """The clauses that are not empty, in one sentence."""
    return "; ".join(filter(None, clauses))


def _explained(error: BaseException) -> tuple[GptConvertError, int]:
    """An exception that no other code explains, as an error for the user, with its exit code."""
    explained: GptConvertError | None = limit_error(error) or _missing_package(error)
    if explained is None and isinstance(error, OSError):
        explained = _system_error(error)
    if explained is not None:
        return explained, explained.exit_code
    hint = "this is a bug in gptconvert; please rerun with --debug and report it"
    return GptConvertError(f"{type(error).__name__}: {error}", hint=hint), 1


def _system_error(error: OSError) -> GptConvertError:
    """The error for a file operation that failed where no better message is known."""
    path = None if error.filename is None else os.fsdecode(error.filename)
    hint = SYSTEM_ERRORS.get(error.errno or 0)
    kind = InputError if hint is None and path is not None else OutputError
    return kind(reason(error), path=path, hint=hint)


def outcome(begun: Journal, args: Sequence[str]) -> str:
    """``nothing was published``, or what was; and what an upload left on the hub. Empty if ``args`` only read."""
    if next((arg for arg in args if not arg.startswith("-")), "") in READING:
        return ""
    published = [printable(path) for path in begun.values("published")]
    remote = [printable(state) for state in begun.values("remote")[-1:]]
    return f"{', '.join(published)} was published" if published else "; ".join(remote or ["nothing was published"])


def _leftovers() -> list[str]:
    """Retry to remove staged files that could not be removed; returns a sentence on those that still cannot."""
    if "gptconvert.publish.staging" not in sys.modules:
        return []
    from gptconvert.publish.staging import clean_up_again

    left = clean_up_again()
    return [f"could not be removed: {', '.join(map(printable, left))}"] if left else []


def is_json(args: Sequence[str]) -> bool:
    """Whether ``--json`` is given."""
    return _given("--json", args)


def _missing_package(error: BaseException) -> UnsupportedError | None:
    """The error for a package that is missing or broken; None for any other exception."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if package in ("", "gptconvert", "reference_model"):
        return None
    what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
    return UnsupportedError(
        f"the Python package {package} {what}", hint=f"pip install {PACKAGES.get(package, package)}"
    )


def _given(flag: str, args: Sequence[str]) -> bool:
    """Whether a flag is among the arguments, or set by its command's variable."""
    command = next((arg for arg in args if arg in COMMANDS), "")
    return flag in args or _is_on(f"GPTCONVERT_{command}_{flag.strip('-')}".replace("-", "_").upper())


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off", "f", "n")


def _bare_verify(args: list[str]) -> list[str]:
    """Give a bare ``--verify`` its default level, lest click take the next argument as the level."""
    levels = {"default", "full"}
    return [
        "--verify=default" if arg == "--verify" and following not in levels else arg
        for arg, following in zip(args, [*args[1:], ""], strict=False)
    ]


def report(error: GptConvertError, code: int, as_json: bool, kind: str | None = None) -> None:
    """Print the error on stderr; with ``--json``, also as the JSON object on stdout."""
    from gptconvert.publish import journal

    if isinstance(error, StreamError) and (published := journal.begin().values("published")):
        error.hint = f"the work is done: {', '.join(published)} is published"
    error.hint = "; ".join([*filter(None, (error.hint,)), *_leftovers()]) or None
    if as_json:
        fields = {**error.as_dict(), "exit_code": code, **({"kind": kind} if kind else {})}
        verification = {"verification": error.report} if isinstance(error, VerificationError) else {}
        with contextlib.suppress(OSError, OutputError):  # stdout may be what failed
            print_json({"ok": False, "error": fields, **verification})
    color = False if os.environ.get("NO_COLOR") else None  # None: colors on terminals only
    emit_error(f"{click.style('error:', fg='red', bold=True)} {error}", color)
    if error.hint:
        emit_error(f"  hint: {printable(error.hint)}")
