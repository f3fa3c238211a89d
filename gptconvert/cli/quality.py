"""``gptconvert quality``."""

from __future__ import annotations

from typing import Any

import click

from gptconvert.cli import options
from gptconvert.cli.output import Progress, emit, human_bytes, note, print_json, table
from gptconvert.errors import VerificationError

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
@options.JSON
@options.QUIET
@options.DEBUG
def quality(artifact: str, against: str | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure what the ONNX graphs in ARTIFACT lose against their checkpoint, whichever program wrote them.

    For each graph: the Kullback-Leibler divergence of its predictions from the checkpoint's in nats per token
    (mean, 99.9 % and largest), how often both find the same token most likely, and the perplexity of both. The exit
    code is 5 if a mean divergence exceeds --max-kl.
    """
    options.quieten()
    from gptconvert.quality import measure_quality

    progress = Progress(quiet or as_json)
    try:
        found = measure_quality(artifact, against, options.chosen(given), progress=progress)
    finally:
        progress.close()
    bad = [each.path for each in found if not each.quality.ok]
    error = VerificationError(f"the divergence exceeds the limit: {', '.join(bad)}", path=artifact)
    if as_json:
        failed = {"error": error.as_dict()} if bad else {}
        print_json({"ok": not bad, **failed, "graphs": [each.as_dict() for each in found]})
    else:
        rows = [HEAD, *(_row(each) for each in found)]
        emit(table(rows, right=range(1, len(HEAD))))
        note(f"measured on {found[0].quality.tokens} tokens: {found[0].quality.about}", quiet)
    if bad:
        raise error if not as_json else click.exceptions.Exit(error.exit_code)


def _row(each: Any) -> tuple[str, ...]:
    figures = each.quality
    source, export = figures.perplexity or (None, None)
    return (
        each.path,
        human_bytes(each.size),
        f"{figures.kl_mean:.2g}",
        f"{figures.kl_high:.2g}",
        f"{figures.kl_max:.2g}",
        f"{figures.top1:.1%}",
        f"{figures.top5:.1%}",
        "-" if source is None else f"{source:.4g} → {export:.4g}",
    )
