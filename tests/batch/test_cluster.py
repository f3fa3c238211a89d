"""Jobs on a Dask cluster: corrupt sources, dying workers, a scheduler that is killed, bytes equal to a serial run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gptconvert
from gptconvert.batch import cluster
from gptconvert.batch.jobs import parse_job
from tests.batch.test_jobs import listed
from tests.batch.test_local import until
from tests.commands import TINY, command, tree
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc")

MEMORY = 1000
#: Number of jobs that succeed.
GOOD = 12
SOURCES = ("hf-safetensors", "hf-bin", "openai-tf")
#: A file system whose sources kill the worker: the parent of the supervisor of the job's process.
KILLER = """
import os, signal
from fsspec import AbstractFileSystem

class Killer(AbstractFileSystem):
    protocol = "killer"
    def isdir(self, path):
        with open(f"/proc/{os.getppid()}/stat") as file:
            worker = int(file.read().rpartition(")")[2].split()[1])
        os.kill(worker, signal.SIGKILL)
        signal.pause()
"""


@contextmanager
def dask_cluster(directory: Path, workers: int, threads: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a cluster, and its process. Its jobs can open ``killer://`` sources."""
    packages = directory / "packages"
    (packages / "killer-1.dist-info").mkdir(parents=True, exist_ok=True)
    (packages / "killer-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: killer\nVersion: 1\n")
    (packages / "killer-1.dist-info/entry_points.txt").write_text("[fsspec.specs]\nkiller = killer:Killer\n")
    (packages / "killer.py").write_text(KILLER)
    words = [sys.executable, "-m", "tests.batch.cluster_process", *map(str, (workers, threads, MEMORY))]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"}
    process = subprocess.Popen(
        words, env=environment, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill() if process.poll() is None and sys.exc_info()[0] else process.stdin.close()


def job(source: object, output: Path, **more: Any) -> dict[str, Any]:
    quick = {"targets": ["safetensors"], "options": {"verify": None}, "memory": 100}
    return {"source": str(source), "output": str(output), **quick, **more}


def twenty(directory: Path, root: Path) -> dict[int, str]:
    """Write jobs.jsonl with 20 lines; returns what becomes of each."""
    for i in range(3):
        broken = Path(shutil.copytree(TINY / "hf-safetensors", directory / f"corrupt{i}"))
        with (broken / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    lines = [(job(TINY / SOURCES[i % 3], root / f"good{i:02}"), "converted") for i in range(GOOD)]
    odd = [
        *((job(directory / f"corrupt{i}", root / f"corrupt{i}"), "3") for i in range(3)),
        (job("killer://source", root / "killer"), "137"),
        (job(TINY / "hf-bin", root / "large", memory=MEMORY + 1), "6"),
        *((job(TINY / "hf-bin", root / f"good{i:02}"), "2") for i in (GOOD - 2, GOOD - 1, GOOD - 1)),
    ]
    lines[4:4] = odd[:5]
    lines += odd[5:]
    listed(directory, *(line for line, _ in lines))
    return {number: result for number, (_, result) in enumerate(lines, 1)}


def outputs(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if not path.name.startswith(".")}


def results(out: str) -> dict[int, dict[str, Any]]:
    records = list(map(json.loads, out.splitlines()))
    found = {record["line"]: record for record in records}
    assert len(found) == len(records), "one result for each line"
    return found


@pytest.mark.slow
def test_twenty_jobs_a_killed_scheduler_and_a_rerun(tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "out"
    root.mkdir()
    expected = twenty(tmp_path, root)
    with dask_cluster(tmp_path, 2, 1) as (address, process):
        killing = threading.Thread(target=lambda: (until(lambda: len(outputs(root)) >= 3), process.kill()))
        killing.start()
        first = command(capsys, "batch", tmp_path / "jobs.jsonl", "--dask", address)
        killing.join()
    assert first.code == 6
    assert "the connection to the Dask scheduler is lost" in first.err and "not finished" in first.err
    until(
        lambda: not [name for name in os.listdir(root) if name.startswith(".")]
    )  # the workers have ended their jobs
    done = outputs(root)
    assert 3 <= len(done) < 9
    assert {line: r["status"] for line, r in results(first.out).items() if r["status"] == "converted"}

    with dask_cluster(tmp_path, 1, 2) as (address, _):
        again = command(capsys, "batch", tmp_path / "jobs.jsonl", "--dask", address)
    found = results(again.out)
    assert again.code == 137
    assert {n: r["status"] if r["ok"] else str(r["exit_code"]) for n, r in found.items()} == {
        n: "skipped" if result == "converted" and Path(found[n]["output"]).name in done else result
        for n, result in expected.items()
    }
    (killer,) = [record for record in found.values() if record["exit_code"] == 137]
    assert killer["error"]["message"].startswith("KilledWorker")
    assert all(record["worker"].startswith("tcp://") for record in found.values() if record["ok"])
    counts = Counter(record["status"] for record in found.values())
    assert f"{counts['converted']} converted, {counts['skipped']} skipped, 8 failed" in again.err
    assert outputs(root) == {f"good{i:02}" for i in range(GOOD)}
    assert len(os.listdir(root)) == GOOD

    options = gptconvert.Options(targets=("safetensors",), verify=None)
    serial = [tree(Path(gptconvert.convert(TINY / name, tmp_path / name, options).output)) for name in SOURCES]
    assert [i for i in range(GOOD) if tree(root / f"good{i:02}") != serial[i % 3]] == []


@pytest.mark.slow
def test_ctrl_c_stops_the_jobs_of_the_workers(tmp_path: Path) -> None:
    root = tmp_path / "out"
    root.mkdir()
    path = listed(tmp_path, *(job(TINY / "hf-bin", root / name, options={}, targets=["onnx"]) for name in "ab"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with dask_cluster(tmp_path, 1, 1) as (address, _):
        words = [sys.executable, "-m", "gptconvert", "batch", path, "--dask", address]
        with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as running:
            until(lambda: os.listdir(root))
            running.send_signal(signal.SIGINT)
            err = running.communicate(timeout=30)[1]
        assert running.returncode == 130
        assert "interrupted; nothing was published" in err and "2 not finished" in err
        assert os.listdir(root) == []


def test_shards_together_are_the_whole_list(tmp_path: Path, capsys: Any) -> None:
    path = listed(tmp_path, *(job(TINY / SOURCES[i], tmp_path / f"out/{i}") for i in range(3)))
    for i, names in enumerate(({"0", "2"}, {"0", "1", "2"})):
        assert command(capsys, "batch", path, "--shard", f"{i}/2", "--jobs", 2).code == 0
        assert outputs(tmp_path / "out") == names


def test_a_scheduler_that_cannot_be_reached(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.CONNECT < 9
    monkeypatch.setattr(cluster, "CONNECT", 0.5)
    path = listed(tmp_path, job(TINY / "hf-bin", tmp_path / "out"))
    cases = {"tcp://127.0.0.1:1": (6, "cannot be reached"), "nonsense": (2, "not an address of a Dask scheduler")}
    (tmp_path / "scheduler.json").write_text("{}")
    cases[str(tmp_path / "scheduler.json")] = (2, "has no `address`")
    for address, (code, part) in cases.items():
        done = command(capsys, "batch", path, "--dask", address)
        assert (done.code, part in done.err) == (code, True), done.err
        assert "1 not finished" in done.err


def test_without_distributed(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    done = command(capsys, "batch", listed(tmp_path, job("x", tmp_path / "o")), "--dask", "tcp://127.0.0.1:1")
    assert done.code == 4
    assert "pip install 'dask[distributed]" in done.err


def test_a_worker_with_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(address="tcp://w"))
    found = cluster.run_on_worker(parse_job(job("x", Path("o"))).as_dict(), "0.0.1")
    assert (found["exit_code"], found["worker"]) == (4, "tcp://w")
    assert found["error"]["expected"] == "0.0.1"
