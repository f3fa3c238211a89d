"""``python -m benchmarks batch``: throughput of ``gptconvert batch`` against the number of jobs that run at a time.

Each job converts the same checkpoint to an output of its own. With ``--dask``, as many workers of a
Dask cluster on this machine run the jobs. One machine has one disk and few cores, so the figures show what the batch
itself costs and where the machine is saturated, not how a cluster scales.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.checkpoints import SIZES, openai_checkpoint
from benchmarks.measure import Run, run

COMMAND = [sys.executable, "-m", "gptconvert", "batch"]


def main(arguments: Sequence[str]) -> None:
    """Measure and print one row at a time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks batch", description=__doc__)
    parser.add_argument("--size", default="124M", choices=SIZES, help="the checkpoint")
    parser.add_argument("--count", type=int, default=8, help="number of jobs")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="jobs at a time")
    parser.add_argument("--to", default="safetensors", help="target")
    parser.add_argument("--verify", action="store_true", help="verify the exports")
    parser.add_argument("--dask", action="store_true", help="run the jobs on a Dask cluster of this machine")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data", help="directory for checkpoints")
    given = parser.parse_args(arguments)
    directory = given.data / "batch"
    directory.mkdir(parents=True, exist_ok=True)
    try:
        source = openai_checkpoint(given.size, given.data)
        jobs = _jobs(source, directory, given)
        engine = "Dask" if given.dask else "--jobs"
        title = f"{given.count} × {given.size} → {given.to}, {'' if given.verify else 'not '}verified, {engine}"
        print(f"| {title} | seconds | jobs per minute | × first | RssAnon peak, MiB |")
        print("|" + " --- |" * 5, flush=True)
        first = 0.0
        for workers in given.workers:
            shutil.rmtree(directory / "out", ignore_errors=True)
            os.sync()  # keep earlier writes out of the measured time
            measured = _measure(jobs, workers, dask=given.dask)
            rate = 60 * given.count / measured.seconds
            first = first or rate
            figures = f"{measured.seconds:.1f} | {rate:.1f} | {rate / first:.2f} | {measured.anon_mib:.0f}"
            print(f"| {workers} at a time | {figures} |", flush=True)
    finally:
        shutil.rmtree(directory)


def _jobs(source: Path, directory: Path, given: argparse.Namespace) -> Path:
    options = {} if given.verify else {"verify": None}
    lines = [
        {"source": str(source), "output": str(directory / "out" / str(i)), "targets": [given.to], "options": options}
        for i in range(given.count)
    ]
    path = directory / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _measure(jobs: Path, workers: int, *, dask: bool) -> Run:
    """Run all jobs. With ``dask``, memory is that of the client alone, and starting the cluster is not measured."""
    with ExitStack() as stack:
        words = ["--jobs", str(workers)]
        if dask:
            from distributed import LocalCluster

            cluster = LocalCluster(workers, threads_per_worker=1, dashboard_address=None, silence_logs=50)
            words = ["--dask", stack.enter_context(cluster).scheduler_address]
        measured = run([*COMMAND, str(jobs), *words, "-q"])
    if measured.code:
        raise SystemExit(f"the batch exited with {measured.code}:\n{measured.output}")
    return measured
