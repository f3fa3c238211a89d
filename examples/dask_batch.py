"""Run a list of conversions on a Dask cluster, and print each result as it arrives.

    python examples/dask_batch.py [JOBS]

JOBS is a list for ``gptconvert batch``: examples/jobs.jsonl by default, which converts fixtures of a clone. The
cluster is two workers on this machine; for others, pass the address of their scheduler. Finished jobs are skipped
when the program runs again. The exit code is that of the worst job.
"""

from __future__ import annotations

import json
import subprocess
import sys

from distributed import LocalCluster

JOBS = "examples/jobs.jsonl"


def main(jobs: str = JOBS) -> int:
    """Start a cluster, run the jobs on it, and return the exit code."""
    resources = {"MEMORY": 4e9}  # bytes per worker; a job starts only where what it needs is left
    with LocalCluster(2, threads_per_worker=1, resources=resources, dashboard_address=None) as cluster:
        command = [sys.executable, "-m", "gptconvert", "batch", jobs, "--dask", cluster.scheduler_address, "-q"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as batch:
            for line in batch.stdout or ():  # in order of completion
                result = json.loads(line)
                reason = f": {result['error']['message']}" if result["error"] else ""
                print(f"{result['status']} {result['output']} in {result['seconds']} s{reason}", flush=True)
    return batch.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
