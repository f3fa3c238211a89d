"""``gptconvert quality``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from gptconvert.cli import options
from gptconvert.cli.output import Progress, emit, human_bytes, note, print_json, table
from gptconvert.cli.reports import REPORT, digested, digested_files, recording
from gptconvert.errors import VerificationError

if TYPE_CHECKING:
    from gptconvert.quality import Measured
    from gptconvert.verify.quality import Quality

HEAD = ("", "size", "KL mean", "99.9 %", "largest", "top-1", "in top-5", "perplexity")


@click.command(cls=options.Command)
@click.argument("artifact", type=click.Path())
@options.own(
    "--against",
    metavar="SOURCE",
    group="Source",
    help="Compare with this checkpoint: a path or a hub repository.",
    default_text="the directory's own weights",
)
@options.options_of("source", "checkpoint")
@options.options_of("run", only=("eval_text", "max_kl", "strict"))
@REPORT
@options.JSON
@options.QUIET
@options.DEBUG
def quality(artifact: str, against: str | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure what the ONNX graphs in ARTIFACT lose against their checkpoint, whichever program wrote them.

    For each graph: the Kullback-Leibler divergence of its predictions from the checkpoint's in nats per token
    (mean, 99.9 % and largest), how often both find the same token most likely, and the perplexity of both. The exit
    code is 5 if a mean divergence exceeds --max-kl, or a graph fails to run or computes NaN. Quantised graphs of
    gptconvert have a limit by default, 0.01 for q8 and 0.2 for q4; those of other programs have none.
    """
    options.quieten()
    from gptconvert.inspection import open_checkpoint, summary
    from gptconvert.quality import measure_quality

    progress = Progress(quiet or as_json)
    chosen = options.chosen(given)
    with recording(given, "quality", artifact, against or artifact) as record:
        try:
            found = measure_quality(artifact, against, chosen, progress=progress)
        finally:
            progress.close()
        error = record.error = _error(found, artifact)
        if record.wanted:
            checkpoint = open_checkpoint(against or artifact, chosen)
            record.add(**summary(checkpoint))
            record.add(artifact=artifact, source={"files": digested(checkpoint)}, files=digested_files(artifact))
            record.add(graphs=[each.as_dict() for each in found])
    if as_json:
        failed = {} if error is None else {"error": error.as_dict()}
        print_json({"ok": error is None, **failed, "graphs": [each.as_dict() for each in found]})
    else:
        rows = [HEAD, *(_row(each) for each in found)]
        emit(table(rows, right=range(1, len(HEAD))))
        tokens = max(each.quality.tokens for each in found)
        note(f"measured on {tokens} tokens: {found[0].quality.about}", quiet)
    if error is not None:
        raise click.exceptions.Exit(error.exit_code) if as_json else error


def _error(found: Sequence[Measured], artifact: str) -> VerificationError | None:
    """The failed graphs, each with the reason; None if there are none."""
    failed = [f"{each.path}: {_reason(each.quality)}" for each in found if not each.quality.ok]
    return VerificationError("\n  ".join(failed), path=artifact) if failed else None


def _reason(quality: Quality) -> str:
    if quality.figures is None:
        return quality.problem
    layers = ", ".join(name for name, _ in quality.layers)
    where = f"; most is lost in {layers}" if layers else ""
    return f"the mean divergence is {quality.figures.kl_mean:.2g}, more than {quality.limit:g}{where}"


def _row(each: Measured) -> tuple[str, ...]:
    figures, size = each.quality.figures, human_bytes(each.size)
    if figures is None:
        return (each.path, size, *["-"] * (len(HEAD) - 2))
    source, export = figures.perplexity or (None, None)
    return (
        each.path,
        size,
        f"{figures.kl_mean:.2g}",
        f"{figures.kl_high:.2g}",
        f"{figures.kl_max:.2g}",
        f"{figures.top1:.1%}",
        f"{figures.top5:.1%}",
        "-" if source is None else f"{source:.4g} → {export:.4g}",
    )
