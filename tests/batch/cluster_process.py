"""A Dask cluster in a process of its own, so that a test can kill its scheduler.

    python -m tests.batch.cluster_process WORKERS THREADS MEMORY

Prints the scheduler's address, and ends with its standard input.
"""

from __future__ import annotations

import sys

import dask
import distributed


def main(workers: int, threads: int, memory: int) -> None:
    """Run the cluster. A job may kill one worker before Dask gives it up; so the tests stay short."""
    dask.config.set({"distributed.scheduler.allowed-failures": 0, "distributed.comm.timeouts.connect": "5s"})
    settings = {"dashboard_address": None, "silence_logs": 50, "host": "127.0.0.1"}
    resources = {"MEMORY": memory} if memory else None
    with distributed.LocalCluster(workers, threads, processes=True, resources=resources, **settings) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
