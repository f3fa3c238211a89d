"""Jobs on this machine: processes, memory, retries, signals. Most tests replace the program that runs a job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptconvert.batch import process
from gptconvert.batch.jobs import Entry, parse_job
from gptconvert.batch.local import LocalBatch
from gptconvert.batch.memory import GIB, MIB, available, estimate, source_size
from gptconvert.batch.results import Record
from tests.batch.test_jobs import listed
from tests.commands import TINY, command, tree
from tests.helpers import ROOT

#: Begins a program that replaces the one of a job: its input is `job`, its answers `done()` and `failed(code)`.
PRELUDE = """
import json, os, signal, sys, time
job = json.loads(sys.stdin.readline())
name = os.path.basename(job["output"])
def done(): print(json.dumps({"ok": True, "status": "converted", "size": 7}))
def failed(code, message="it failed"):
    print(json.dumps({"ok": False, "error": {"kind": "output", "exit_code": code, "message": message}}))
    sys.exit(code)
def log(text): open(LOG, "a").write(text + "\\n")
"""
FREE = 1 << 30

Program = Callable[[str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Replace the program that runs a job; returns its log."""

    def replace(code: str) -> Path:
        log = tmp_path / "log"
        (tmp_path / "program.py").write_text(f"LOG = {str(log)!r}\n{PRELUDE}\n{code}")
        monkeypatch.setattr(process, "COMMAND", (sys.executable, "-S", str(tmp_path / "program.py")))
        return log

    return replace


def entries(*jobs: dict[str, Any]) -> list[Entry]:
    given = [{"source": "model.ckpt", "output": f"out/{i}", **job} for i, job in enumerate(jobs)]
    return [Entry(i, job["source"], job["output"], parse_job(job)) for i, job in enumerate(given, 1)]


def run(*jobs: dict[str, Any], **settings: Any) -> list[Record]:
    records: list[Record] = []
    LocalBatch(entries(*jobs), records.append, **{"jobs": 2, "memory": FREE, **settings}).run()
    return records


def test_results_are_in_order_of_completion(program: Program) -> None:
    program("time.sleep(0.5 * (name == '0')); done()")
    first, second = run({"memory": 1}, {"memory": 1})
    assert (first.line, second.line) == (2, 1)
    assert (first.status, first.details["size"], first.attempts) == ("converted", 7, 1)
    assert second.seconds > 0.5


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGBUS])
def test_a_process_that_is_killed_takes_one_job_only(program: Program, signum: int) -> None:
    program(f"name == '0' and os.kill(os.getpid(), {int(signum)})\ndone()")
    found = {record.line: record for record in run({"memory": 1}, {"memory": 1})}
    assert found[1].exit_code == 128 + signum
    assert found[1].error is not None and f"killed by {signal.Signals(signum).name}" in found[1].error["message"]
    assert found[2].status == "converted"


def test_a_process_that_reports_nothing(program: Program) -> None:
    program("print('{}'); sys.exit('no module named x')")
    (record,) = run({"memory": 1})
    assert (record.status, record.exit_code) == ("failed", 1)
    assert record.error is not None and record.error["message"].endswith("(exit code 1): no module named x")


@pytest.mark.parametrize(
    ("code", "retry", "attempts", "exit_code"), [(6, 2, 2, 0), (6, 0, 1, 6), (3, 1, 2, 0), (5, 2, 1, 5), (2, 2, 1, 2)]
)
def test_retry(program: Program, code: int, retry: int, attempts: int, exit_code: int) -> None:
    log = program(f"n = os.path.exists(LOG); log(name)\nif not n: failed({code})\ndone()")
    (record,) = run({"memory": 1}, retry=retry)
    assert (record.attempts, record.exit_code) == (attempts, exit_code)
    assert log.read_text().split() == ["0"] * attempts


def test_retries_end(program: Program) -> None:
    program("failed(6)")
    (record,) = run({"memory": 1}, retry=2)
    assert (record.attempts, record.exit_code) == (3, 6)


def test_a_locked_output_is_waited_for(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program("n = os.path.exists(LOG); log(name)\nif not n: failed(6, 'locked by pid 1')\ndone()")
    (record,) = run({"memory": 1})
    assert (record.status, record.attempts) == ("converted", 1)
    monkeypatch.setattr(process, "PATIENCE", 0.0)
    program("failed(6, 'locked by pid 1')")
    assert run({"memory": 1})[0].exit_code == 6


def test_memory_is_never_exceeded_and_small_jobs_go_ahead(program: Program) -> None:
    log = program("log('+' + name); time.sleep(0.3); log('-' + name); done()")
    needs = [60, 60, 30, 101, 40, 100]
    records = run(*({"memory": need} for need in needs), jobs=4, memory=100)
    failed = [record for record in records if record.status == "failed"]
    assert [record.line for record in failed] == [4]
    assert failed[0].exit_code == 6 and failed[0].attempts == 0
    assert failed[0].error is not None and "more memory than the batch may use" in failed[0].error["message"]
    running, together = dict[str, int](), 1
    for event in log.read_text().split():
        if event[0] == "+":
            running[event[1:]] = needs[int(event[1:])]
        else:
            del running[event[1:]]
        assert sum(running.values()) <= 100, running
        together = max(together, len(running))
    assert together >= 2
    assert log.read_text().split()[:2] in (["+0", "+2"], ["+2", "+0"]), "the second job does not fit beside the first"


def test_at_most_n_jobs_at_a_time_share_the_cores(program: Program) -> None:
    log = program("log('+' + os.environ.get('OMP_NUM_THREADS', '')); time.sleep(0.2); log('-'); done()")
    run(*({"memory": 1} for _ in range(5)), jobs=2)
    text = log.read_text()
    depth, most = 0, 0
    for event in text.split():
        depth += 1 if event[0] == "+" else -1
        most = max(most, depth)
    assert most == 2
    assert os.environ["OMP_NUM_THREADS"] in text, "the user's setting stays"


def test_an_error_in_the_batch_stops_the_jobs(program: Program) -> None:
    """As when stdout is closed: nothing goes on in the background."""
    log = program("log('+')\nif name == '0': time.sleep(0.3); done(); sys.exit()\nsys.stdin.read(); log('stopped')")

    def emit(_: Record) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        LocalBatch(entries({"memory": 1}, {"memory": 1}), emit, jobs=2, memory=FREE).run()
    assert log.read_text().split()[-1] == "stopped"


def test_a_job_that_does_not_stop_is_killed(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE", 0.3)
    log = program("log(str(os.getpid()))\nif name == '0': time.sleep(0.3); done(); sys.exit()\ntime.sleep(60)")

    def emit(_: Record) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        LocalBatch(entries({"memory": 1}, {"memory": 1}), emit, jobs=2, memory=FREE).run()
    for pid in log.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
            os.waitpid(int(pid), 0)
            raise ProcessLookupError


@pytest.mark.parametrize(
    ("size", "options", "targets", "most"),
    [
        # RssAnon as measured in docs/performance.md, in MiB.
        (498 * 10**6, {}, "onnx", 1103),
        (6_230 * 10**6, {}, "onnx", 487),
        (12_100 * 10**6, {}, "onnx", 1553),
        (498 * 10**6, {"quantize": ["q8", "q4"]}, "onnx", 1491),
        (6_230 * 10**6, {"verify": None}, "onnx", 144),
        (6_230 * 10**6, {"verify": None}, "tf", 480),
    ],
)
def test_estimates_exceed_what_was_measured(size: int, options: dict[str, Any], targets: str, most: int) -> None:
    job = parse_job({"source": "m", "output": "o", "targets": targets, "options": options})
    assert most * MIB < estimate(job, size) < most * MIB + 2.5 * GIB


def test_sizes_of_local_sources(tmp_path: Path) -> None:
    def size(source: object) -> int:
        return source_size(parse_job({"source": str(source), "output": "o"}))

    (tmp_path / "sub").mkdir()
    for name, nbytes in {"model.ckpt.index": 3, "model.ckpt.data": 40, "other": 500, "sub/x": 6000}.items():
        (tmp_path / name).write_bytes(bytes(nbytes))
    assert size(tmp_path) == 6543
    assert size(tmp_path / "model.ckpt") == 43
    assert size(tmp_path / "missing") == size(tmp_path / "missing/too") == size("gpt2") == 0


def test_there_is_memory() -> None:
    assert 10 * MIB < available() < 1 << 50


# --- The command ----------------------------------------------------------------------------------------------------


def job(source: str, output: Path, **options: Any) -> dict[str, object]:
    return {"source": str(TINY / source), "output": str(output), "targets": ["safetensors"], "options": options}


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    """Results as JSON Lines, the table on stderr; a second run skips what is there."""
    lines = (job("hf-safetensors", tmp_path / "a", verify=None), {"source": "x"}, job("missing", tmp_path / "c"))
    path = listed(tmp_path, *lines)
    done = command(capsys, "batch", path, "--jobs", 2)
    assert done.code == 3
    found = {record["line"]: record for record in map(json.loads, done.out.splitlines())}
    assert sorted(found) == [1, 2, 3]
    assert [found[line]["status"] for line in (1, 2, 3)] == ["converted", "failed", "failed"]
    assert [found[line]["exit_code"] for line in (1, 2, 3)] == [0, 2, 3]
    assert (found[1]["family"], found[1]["verified"], found[1]["ok"]) == ("gpt2", False, True)
    assert found[3]["error"]["message"] == "no such file or directory"
    assert "1 converted, 2 failed" in done.err
    assert "exit 3: no such file or directory" in done.err
    before = tree(tmp_path / "a")
    words = ("--to", "safetensors", "--no-verify", "-o", tmp_path / "d")
    assert command(capsys, "hf", TINY / "hf-safetensors", *words).code == 0
    assert before == tree(tmp_path / "d")

    again = command(capsys, "batch", path, "--json", "-q")
    assert (again.code, again.err) == (3, "")
    assert (again.json["ok"], again.json["error"]["exit_code"], again.json["error"]["kind"]) == (False, 3, "input")
    statuses = {record["line"]: record["status"] for record in again.json["jobs"]}
    assert statuses == {1: "skipped", 2: "failed", 3: "failed"}
    same = next(record for record in again.json["jobs"] if record["line"] == 1)
    assert same["manifest_sha256"] == found[1]["manifest_sha256"]


def test_strict_runs_nothing(tmp_path: Path, capsys: Any) -> None:
    path = listed(tmp_path, job("hf-safetensors", tmp_path / "a"), {"sorce": "x"})
    done = command(capsys, "batch", path, "--strict")
    assert (done.code, done.out) == (2, "")
    assert "1 of 2 jobs are bad" in done.err and "line 2: unknown key `sorce`" in done.err
    assert not (tmp_path / "a").exists()


def test_a_shard_of_bad_lines(tmp_path: Path, capsys: Any) -> None:
    path = listed(tmp_path, "a", "b", "c")
    done = command(capsys, "batch", path, "--shard", "1/2")
    assert [json.loads(line)["line"] for line in done.out.splitlines()] == [2]
    for wrong in ("2/2", "1", "a/b", "-1/2", "0/0"):
        assert command(capsys, "batch", path, "--shard", wrong).code == 2


def test_options_that_contradict(tmp_path: Path, capsys: Any) -> None:
    path = listed(tmp_path, "a")
    done = command(capsys, "batch", path, "--dask", "tcp://x:1", "--jobs", 2)
    assert done.code == 2 and "--jobs and --memory have no effect with --dask" in done.err


def start(path: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "gptconvert", "batch", path],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], object], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux supervises conversions")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_batch_leaves_finished_jobs_and_nothing_else(tmp_path: Path, signum: signal.Signals) -> None:
    root = tmp_path / "out"
    root.mkdir()
    second = {**job("hf-safetensors", root / "b"), "targets": ["onnx"]}
    path = listed(tmp_path, job("hf-safetensors", root / "a", verify=None), second, job("hf-bin", root / "c"))
    with start(path) as running:
        until(lambda: any(name.startswith(".b") for name in os.listdir(root)))
        running.send_signal(signum)
        out, err = running.communicate(timeout=30)
    assert [json.loads(line)["output"] for line in out.splitlines()] == [str(root / "a")]
    until(lambda: os.listdir(root) == ["a"])
    assert running.returncode == (130 if signum == signal.SIGINT else -9)
    if signum == signal.SIGINT:
        assert "1 converted, 2 not finished" in err
        assert f"interrupted; {root / 'a'} was published" in err
