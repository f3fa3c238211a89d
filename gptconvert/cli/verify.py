"""``gptconvert verify``."""

from __future__ import annotations

from typing import Any

import click

from gptconvert.cli import options
from gptconvert.cli.output import Progress, emit, note, print_json
from gptconvert.cli.reports import REPORT, digested, digested_files, recording
from gptconvert.errors import VerificationError


@click.command(cls=options.Command)
@click.argument("source")
@click.argument("artifact", type=click.Path())
@options.options_of("source", "checkpoint")
@options.options_of("run", only=("seed", "eval_text", "max_kl", "strict"))
@options.own(
    "--full", is_flag=True, group="Verification", help="Test all lengths up to the context; slow for large models."
)
@REPORT
@options.JSON
@options.QUIET
@options.VERBOSE
@options.DEBUG
def verify(source: str, artifact: str, full: bool, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
    """Check ARTIFACT, a directory or graph exported by any program, against the checkpoint SOURCE.

    The exit code is 0 if every weight equals the checkpoint's, every output is within rounding noise, and the
    configuration and tokenizer of a directory agree with the checkpoint; otherwise 5. Weights that another program
    stored in an unknown form are judged by the outputs, and a note names them. Quantised graphs of gptconvert must
    also stay within --max-kl; to measure those of other programs, use gptconvert quality.
    """
    options.quieten()
    from gptconvert.inspection import open_checkpoint, summary
    from gptconvert.pipeline import verify_export

    progress = Progress(quiet or as_json)
    chosen = options.chosen(given, verify="full" if full else "default")
    with recording(given, "verify", artifact, source) as record:
        try:
            report = verify_export(source, artifact, chosen, progress=progress)
        finally:
            progress.close()
        message = "the artifact does not compute what the checkpoint computes"
        if report.misses_limit:
            message = "quantisation loses more than --max-kl allows"
        error = VerificationError(message, path=artifact)
        record.error = None if report.passed else error
        if record.wanted:
            checkpoint = open_checkpoint(source, chosen)
            record.add(**summary(checkpoint))
            record.add(artifact=artifact, source={"files": digested(checkpoint)}, files=digested_files(artifact))
            record.add(verification=report.as_dict(), notes=list(report.notes))
    for text in report.notes:
        note(text, quiet)
    if as_json:
        failed = {} if report.passed else {"error": error.as_dict()}
        print_json({"ok": report.passed, **failed, "verification": report.as_dict(), "notes": list(report.notes)})
    else:
        emit(report.table(verbose=verbose))
    if not report.passed:
        raise click.exceptions.Exit(error.exit_code)
