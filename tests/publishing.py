"""One small conversion through staging, writer and manifest, for tests that interrupt it everywhere.

Run as a program, it is the process that dies: ``python -m tests.publishing ROOT SCENARIO`` forks one child after the
other and kills the n-th at its n-th operation, until one survives; what it finds after each goes to stdout as JSON.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import PlannedFile, place
from gptconvert.model.tensors import Cast, Transposed
from gptconvert.publish import fileops
from gptconvert.publish.manifest import Recipe, check_inputs_unchanged, manifest_files, snapshot
from gptconvert.publish.staging import Staging
from gptconvert.publish.writer import write_and_digest, write_files
from tests.helpers import openai_checkpoint

#: scenario → the output's place below the root, and whether something is there to be replaced.
SCENARIOS = {
    "new": ("out", False),
    "new-parents": ("a/b/out", False),
    "replace": ("out", True),
    "replace-without-exchange": ("out", True),
}
OLD = {"old.txt": b"the old output", "sub/more.bin": bytes(range(256))}

Tree = dict[str, bytes]


def prepare(root: Path, scenario: str) -> tuple[Checkpoint, Path]:
    """An empty root with a checkpoint and, if the scenario says so, an old output; that and the output's path."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "source").mkdir(parents=True)
    where, exists = SCENARIOS[scenario]
    for name, content in OLD.items() if exists else ():
        (root / where / name).parent.mkdir(parents=True, exist_ok=True)
        (root / where / name).write_bytes(content)
    return openai_checkpoint(root / "source", n_layer=1), root / where


def plan(checkpoint: Checkpoint) -> list[PlannedFile]:
    """A file of raw copies, one of computed tensors, one without tensors."""
    names = sorted(checkpoint.weights)
    raw, raw_end = place([(n, checkpoint.weights[n], n) for n in names], start=5)
    half = [(n, Cast(checkpoint.weights[n], np.dtype(np.float16)), n) for n in names if "ln_" in n]
    turned = [(f"{n}.T", Transposed(checkpoint.weights[n]), n) for n in ("wte.weight", "wpe.weight")]
    made, made_end = place([*half, *turned])
    return [
        PlannedFile.of_bytes("config.json", b"{}\n"),
        PlannedFile("onnx/model.onnx_data", raw_end + 3, b"head!", raw),
        PlannedFile("model_fp16.bin", made_end, b"", made),
    ]


def convert(checkpoint: Checkpoint, output: Path) -> None:
    """The whole of it, once; an old output is replaced."""
    files = plan(checkpoint)
    before = snapshot(checkpoint.source.files)
    with Staging(output, inputs=checkpoint.source.files, force=True) as staging:
        staging.require_space(sum(file.nbytes for file in files))
        written = write_and_digest(staging.path, files, checkpoint)
        write_files(staging.path, manifest_files(checkpoint, files, written, Recipe(("onnx",), {"dtype": None})))
        check_inputs_unchanged(before)
        staging.publish()


def tree(directory: Path) -> Tree:
    """Relative path → content of every file; empty if there is no such directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def leftovers(root: Path) -> list[str]:
    """What lies below the root and should not."""
    parents = {"a", "a/b"} if (root / "a" / "b" / "out").exists() else set()
    known = {"source", "out", "a/b/out", *parents}
    inside = ("source/", "out/", "a/b/out/")
    names = [str(p.relative_to(root)) for p in sorted(root.rglob("*"))]
    return [name for name in names if name not in known and not name.startswith(inside)]


@contextmanager
def faults(act: Callable[[int, str, int], int], scenario: str) -> Iterator[list[str]]:
    """Within: ``act(number, operation, nbytes)`` at every operation; yields the list of operations so far."""
    seen: list[str] = []

    def fault(operation: str, nbytes: int) -> int:
        seen.append(operation)
        if operation == "exchange" and scenario == "replace-without-exchange":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return act(len(seen) - 1, operation, nbytes)

    fileops.fault, before = fault, fileops.fault
    try:
        yield seen
    finally:
        fileops.fault = before


def kill_everywhere(root: Path, scenario: str) -> list[dict[str, object]]:
    """For n = 0, 1, …: kill a conversion at operation n, look, convert again, look again."""
    checkpoint, output = prepare(root, scenario)
    convert(checkpoint, output)
    new, old = tree(output), OLD if SCENARIOS[scenario][1] else {}
    reports: list[dict[str, object]] = []
    for n in itertools.count():
        checkpoint, output = prepare(root, scenario)
        died = _run_and_kill(checkpoint, output, scenario, n)
        found = tree(output)
        state = "new" if found == new else "old" if found == old else "absent" if not found else "damaged"
        convert(checkpoint, output)
        reports.append({"n": n, "died": died, "state": state, "left": leftovers(root), "redone": tree(output) == new})
        if not died:
            return reports
    raise AssertionError("unreachable")


def _run_and_kill(checkpoint: Checkpoint, output: Path, scenario: str, n: int) -> bool:
    child = os.fork()
    if child == 0:
        with faults(lambda i, _, nbytes: os.kill(os.getpid(), signal.SIGKILL) or 0 if i == n else nbytes, scenario):
            convert(checkpoint, output)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    json.dump(kill_everywhere(Path(sys.argv[1]), sys.argv[2]), sys.stdout)
