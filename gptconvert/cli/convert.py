"""``gptconvert convert``, and one command per source format (``openai-tf``, ``hf`` …)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import click

from gptconvert.cli import options
from gptconvert.cli.output import Progress, emit, human_bytes, note, print_json, table
from gptconvert.cli.reports import REPORT, recording
from gptconvert.cli.sources import ALWAYS, FORMAT_COMMANDS
from gptconvert.errors import printable

if TYPE_CHECKING:
    from gptconvert.model.checkpoint import Checkpoint
    from gptconvert.pipeline import Plan, Result

CONVERTING = options.stack(
    options.own(
        "-o",
        "--output",
        type=click.Path(),
        metavar="DIR",
        group="Output",
        show_default=True,
        default_text="./NAME-gptconvert",
        help="Publish this directory.",
    ),
    options.options_of("output"),
    options.NO_VERIFY,
    options.options_of("run"),
    options.own(
        "--reuse",
        is_flag=True,
        group="Output",
        help="Keep an output that is up to date: of the same source, options and versions, and undamaged.",
    ),
    options.own("--dry-run", is_flag=True, group="Output", help="Print what would be written, without writing it."),
    REPORT,
    options.JSON,
    options.QUIET,
    options.VERBOSE,
    options.DEBUG,
)


def format_command(name: str) -> click.Command:
    """The command for one checkpoint format, with the options that apply to the format."""
    described = FORMAT_COMMANDS[name]

    def run(source: str, **given: Any) -> None:
        _convert(source, name, given)

    run.__doc__ = described.about
    opening = options.options_of("source", "checkpoint", only=described.reads | ALWAYS)
    command = click.command(name, cls=options.Command, epilog=described.epilog)
    decorated: Any = options.stack(command, click.argument("source"), opening, CONVERTING)(run)
    return cast("click.Command", decorated)


@click.command("convert", cls=options.Command)
@click.argument("source")
@options.options_of("source", "checkpoint")
@CONVERTING
def convert(source: str, **given: Any) -> None:
    """Convert SOURCE; the format is detected.

    Options that do not apply to the detected format are errors.
    """
    _convert(source, None, given)


def _convert(source: str, format: str | None, given: dict[str, Any]) -> None:
    options.quieten()
    from gptconvert import pipeline
    from gptconvert.inspection import open_checkpoint, summary

    quiet, as_json = given["quiet"], given["as_json"]
    chosen = options.chosen(given)
    output = given["output"] or default_output(source)
    if given["dry_run"]:
        with recording(given, "plan", output, source) as record:
            checkpoint = open_checkpoint(source, chosen, format=format)
            planned = pipeline.plan(checkpoint)
            notes = [*planned.notes, *pipeline.check_output(planned, output)]
            record.add(output=output, **{**planned.as_dict(), "notes": notes, **summary(checkpoint)})
        for text in notes:
            note(text, quiet)
        if as_json:
            print_json({"ok": True, "dry_run": True, "output": output, **planned.as_dict(), "notes": notes})
        else:
            emit(describe_plan(planned, output))
        return
    progress = Progress(quiet or as_json)
    with recording(given, "convert", output, source) as record:
        checkpoint = open_checkpoint(source, chosen, format=format)
        record.add(output=output, **summary(checkpoint))
        if given["reuse"] and (current := _current(checkpoint, output, given)):
            record.keep()
            if as_json:
                print_json({"ok": True, **current})
            else:
                emit(f"{printable(output)} is up to date")
            return
        try:
            result = pipeline.convert(checkpoint, output, progress=progress)
        finally:
            progress.close()
        record.add(**result.as_dict())
    for text in result.notes:
        note(text, quiet)
    if as_json:
        print_json({"ok": True, **result.as_dict()})
    else:
        emit(describe_result(result, verbose=given["verbose"]))


def _current(checkpoint: Checkpoint, output: str, given: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a result, from the manifest of an output that is up to date; None if it is not, or not there.

    Reports are part of it: their figures are in no other file.
    """
    from gptconvert.batch.current import difference, open_in, read_manifest

    if not os.path.isdir(output) or not os.listdir(output):
        return None
    opened = open_in(output)
    missing = [f"{path} is missing" for path in given["report"] if not os.path.isfile(path)]
    reason, manifest = next(iter(missing), difference(checkpoint, opened)), read_manifest(opened)
    if reason is not None or manifest is None:
        note(f"{output} is not up to date: {reason}", given["quiet"])
        return None
    return {
        "output": output,
        "family": checkpoint.config.family,
        "task": checkpoint.config.task,
        "source": manifest["source"],
        "files": manifest["files"],
        "verification": manifest["verification"],
        "notes": list(checkpoint.notes),
    }


def default_output(source: str) -> str:
    """``./NAME-gptconvert``, NAME from the source; beside the source if the current directory is inside it."""
    path = os.path.abspath(source)
    if not os.path.isdir(path):
        stem = os.path.basename(path).split(".")[0]
        generic = stem in ("model", "checkpoint", "pytorch_model")
        path = os.path.dirname(path) if generic else os.path.join(os.path.dirname(path), stem)
    name = f"{os.path.basename(path) or 'model'}-gptconvert"
    inside = os.path.isdir(source) and os.path.commonpath([os.getcwd(), path]) == path
    return os.path.join(os.path.dirname(path), name) if inside else name


def describe_plan(planned: Plan, output: str) -> str:
    """The table that a dry run prints."""
    rows = [("file", "size", "tensors", "copied as stored", "transformed")]
    for entry in planned.as_dict()["files"]:  # type: ignore[attr-defined]
        has_tensors = bool(entry["tensors"])
        rows.append(
            (
                entry["path"],
                "" if entry["size"] is None else human_bytes(entry["size"]),
                str(entry["tensors"]) if has_tensors else "",
                human_bytes(entry["copied"]) if has_tensors else "",
                str(len(entry["transformed"])) if has_tensors else "",
            )
        )
    head = f"Would write {human_bytes(planned.nbytes)} to {printable(output)}"
    return f"{head}\n{table(rows, right=(1, 2, 3, 4))}"


def describe_result(result: Result, *, verbose: bool = False) -> str:
    """The text that a conversion prints: the model, the verification, the files."""
    from gptconvert.families.registry import family_named

    config = result.checkpoint.config
    parameters = sum(weight.size for weight in result.checkpoint.weights.values())
    lines = [f"{family_named(config.family).title}: {parameters:,} parameters, {config.n_layer} layers"]
    lines.append(result.report.table(verbose=verbose) if result.report else "not verified (--no-verify)")
    lines.append(f"{printable(result.output)}/")
    lines.append(
        table([(f.path, human_bytes(f.nbytes)) for f in sorted(result.files, key=lambda f: f.path)], right=(1,))
    )
    return "\n".join(lines)
