"""``gptconvert batch``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from gptconvert.cli import options
from gptconvert.cli.output import emit, emit_error, note, print_json, table
from gptconvert.errors import GptConvertError, UsageError, printable

if TYPE_CHECKING:
    from gptconvert.batch.jobs import Entry
    from gptconvert.batch.results import Record

GROUP = "Batch"
EPILOG = """\b
JOBS is JSON Lines, or YAML (.yaml, .yml) with a list; - reads JSON Lines
from standard input. A job has these keys, of which two are required:
  source   path, hub repository or URL (s3://, gs://, hf://, file:// …)
  output   directory or URL
  format   hf, openai-tf …; detected by default
  targets  list of formats to write; onnx by default
  options  fields of gptconvert.Options, such as {"dtype": "fp16"}
  memory   what the job needs, such as "8GiB"; estimated by default

\b
Results are JSON Lines on stdout, in order of completion; a table follows on
stderr. The exit code is that of the worst job: 5 if any fails verification.

\b
Examples:
  gptconvert batch jobs.jsonl --jobs 4 > results.jsonl
  gptconvert batch jobs.yaml --shard $SLURM_ARRAY_TASK_ID/8
  gptconvert batch jobs.jsonl --dask tcp://scheduler:8786
"""


class Shard(click.ParamType):  # type: ignore[type-arg]  # click 8.1 cannot subscript it
    """``I/N``: the part of a list that one machine runs."""

    name = "shard"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        index, _, count = value.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            self.fail(f"{value!r} is not a shard: I/N, with I from 0 to N - 1, such as 0/4", param, ctx)
        return int(index), int(count)


@click.command(cls=options.Command, epilog=EPILOG)
@click.argument("path", metavar="JOBS", type=click.Path(allow_dash=True))
@options.option("force")
@options.own(
    "-j",
    "--jobs",
    type=click.IntRange(1),
    metavar="N",
    group=GROUP,
    default_text="1",
    help="Run at most N jobs at a time.",
)
@options.own(
    "--memory",
    type=options.size_in_bytes,
    metavar="SIZE",
    group=GROUP,
    default_text="most of what is free",
    help="Start a job only if all that run need no more memory than this together.",
)
@options.own(
    "--retry",
    type=click.IntRange(0),
    metavar="N",
    group=GROUP,
    default_text="0",
    help="Start a job again, up to N times, if it was killed, or failed for a reason that may pass.",
)
@options.own("--shard", type=Shard(), group=GROUP, help="Run every Nth job, from the Ith, which counts from 0.")
@options.own(
    "--dask",
    metavar="ADDRESS",
    group=GROUP,
    help="Run the jobs on the workers of this Dask scheduler, or of that in a scheduler file.",
)
@options.own("--strict", is_flag=True, group=GROUP, help="Run nothing if a line of JOBS is bad.")
@options.own("--alone", is_flag=True, group=GROUP, hidden=True, help="Run the job on standard input in this process.")
@options.JSON
@options.QUIET
@options.DEBUG
def batch(path: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Run the conversions that JOBS lists, each in a process of its own.

    A job whose output is up to date is skipped: same source, options and versions, and files that match their
    SHA256SUMS. So a batch that was interrupted continues where it ended.
    """
    options.quieten()
    if given["alone"]:
        _alone()
        return
    if given["dask"] is not None and (given["jobs"] or given["memory"]):
        hint = "the workers decide: dask worker --nthreads 4 --resources MEMORY=100e9"
        raise UsageError("--jobs and --memory have no effect with --dask", hint=hint)
    from gptconvert.batch.jobs import read_jobs, shard

    entries = [_forced(entry, given["force"]) for entry in read_jobs(path)]
    if given["strict"] and any(entry.error for entry in entries):
        raise _bad_lines(entries)
    _run(shard(entries, *(given["shard"] or (0, 1))), given, as_json, quiet)


def _alone() -> None:
    """Run one job; its result, or its error, is the object of ``--json``."""
    from gptconvert.batch.alone import run_alone
    from gptconvert.batch.jobs import parse_job
    from gptconvert.batch.process import read_job_line

    print_json(run_alone(parse_job(read_job_line())).as_dict())


def _forced(entry: Entry, force: bool) -> Entry:
    if entry.job is None or not force:
        return entry
    job = dataclasses.replace(entry.job, options=dataclasses.replace(entry.job.options, force=True))
    return dataclasses.replace(entry, job=job)


def _bad_lines(entries: Sequence[Entry]) -> UsageError:
    errors = [entry.error for entry in entries if entry.error is not None]
    lines = [f"{each}{f' ({each.hint})' if each.hint else ''}" for each in errors[:20]]
    lines += [f"and {len(errors) - 20} more"] * (len(errors) > 20)
    hint = "nothing was run, because of --strict; mend the lines"
    return UsageError("\n  ".join([f"{len(errors)} of {len(entries)} jobs are bad", *lines]), hint=hint)


def _run(entries: Sequence[Entry], given: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Run the jobs, and print their results.

    Raises:
        click.exceptions.Exit: a job failed; with the code of the worst.
    """
    from gptconvert.batch.results import failure, rows, summary, worst
    from gptconvert.publish import journal

    records, begun = list[Any](), time.monotonic()

    def add(record: Record) -> None:
        records.append(record)
        if record.status == "converted":
            journal.record("published", record.output)
        if not as_json:
            emit(record.as_json())

    try:
        for entry in entries:
            if entry.error is not None:
                add(failure(entry.error).of(entry))
        _runner(entries, add, given, quiet)()
    finally:
        if not quiet:
            left = len(entries) - len(records)
            shown = [tuple(printable(cell)[:100] for cell in row) for row in rows(records)]
            lines = [table(shown, right=(0, 2))] * bool(records)
            emit_error("\n".join([*lines, summary(records, time.monotonic() - begun, left)]))
    code = worst(record.exit_code for record in records)
    if as_json:
        print_json({"ok": code == 0, **_error(records, code), "jobs": [record.as_dict() for record in records]})
    if code:
        raise click.exceptions.Exit(code)


def _runner(entries: Sequence[Entry], add: Callable[[Record], None], given: dict[str, Any], quiet: bool) -> Any:
    """The function that runs the jobs: here, or on a cluster."""
    retry = given["retry"] or 0
    if given["dask"] is None:
        from gptconvert.batch.local import LocalBatch
        from gptconvert.batch.memory import available

        memory = given["memory"] or available()
        return LocalBatch(entries, add, jobs=given["jobs"] or 1, memory=memory, retry=retry).run
    from gptconvert.batch.cluster import ClusterBatch, connect

    client = connect(given["dask"])

    def run() -> None:
        with closing(client):
            ClusterBatch(entries, add, client, retry=retry, note=lambda text: note(text, quiet)).run()

    return run


def _error(records: Sequence[Record], code: int) -> dict[str, object]:
    """The field ``error`` of ``--json``, if a job failed."""
    if not code:
        return {}
    failed = sum(record.status == "failed" for record in records)
    error = GptConvertError(f"{failed} of {len(records)} jobs failed")
    kinds = [record.error["kind"] for record in records if record.error and record.exit_code == code]
    return {"error": {**error.as_dict(), "exit_code": code, "kind": kinds[0]}}
