"""One small conversion through staging, writer and manifest, and file systems with planted faults to run it on.

Run as a program, this is the process that gets killed: ``python -m tests.publishing ROOT SCENARIO`` forks one child
after the other and kills the n-th at its n-th operation, until one survives. It prints what it found after each as
JSON.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import PlannedFile, place
from gptconvert.model.tensors import Cast, Transposed
from gptconvert.publish.file_system import COPY_METHODS, OS, CopyMethod, FileSystem
from gptconvert.publish.io_settings import IoSettings
from gptconvert.publish.manifest import Recipe, check_inputs_unchanged, manifest_files, snapshot
from gptconvert.publish.staging import Staging
from gptconvert.publish.writer import write_and_digest, write_files
from tests.helpers import openai_checkpoint

#: scenario → path of the output below the root, and whether it replaces an old output.
SCENARIOS = {
    "new": ("out", False),
    "new-parents": ("a/b/out", False),
    "replace": ("out", True),
    "replace-without-exchange": ("out", True),
}
OLD = {"old.txt": b"the old output", "sub/more.bin": bytes(range(256))}

Tree = dict[str, bytes]
#: (number of the operation, its name, bytes to move) → bytes that it may move; or raises what the system would.
Act = Callable[[int, str, int], int]


class FaultyFileSystem(FileSystem):
    """Calls ``act`` before every operation.

    Attributes:
        seen: names of the operations so far.
    """

    def __init__(self, act: Act, scenario: str = "", copy_methods: tuple[CopyMethod, ...] = COPY_METHODS) -> None:
        super().__init__(copy_methods)
        self.act, self.scenario = act, scenario
        self.seen: list[str] = []

    def _before(self, operation: str, nbytes: int = 0) -> int:
        self.seen.append(operation)
        if operation == "exchange" and self.scenario == "replace-without-exchange":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return self.act(len(self.seen) - 1, operation, nbytes)

    def make_directory(self, path: str) -> None:
        self._before("mkdir")
        super().make_directory(path)

    def create(self, path: str) -> int:
        self._before("create")
        return super().create(path)

    def open_source(self, path: str) -> int:
        self._before("open")
        return super().open_source(path)

    def close(self, descriptor: int) -> None:
        try:
            self._before("close")
        finally:  # Linux closes the file even if it reports an error
            super().close(descriptor)

    def free_bytes(self, path: str) -> int:
        self._before("statvfs")
        return super().free_bytes(path)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        self._before("allocate")
        super().allocate(descriptor, nbytes)

    def write_some(self, descriptor: int, data: memoryview, offset: int) -> int:
        return super().write_some(descriptor, data[: self._before("write", len(data))], offset)

    def truncate(self, descriptor: int, nbytes: int) -> None:
        self._before("truncate")
        super().truncate(descriptor, nbytes)

    def read(self, descriptor: int, nbytes: int, offset: int) -> bytes:
        return super().read(descriptor, self._before("read", nbytes), offset)

    def read_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        return super().read_into(descriptor, buffer[: self._before("read", len(buffer))], offset)

    def copy(self, source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
        return super().copy(source, source_offset, target, target_offset, self._before("copy", nbytes))

    def sync(self, descriptor: int) -> None:
        self._before("fsync")
        super().sync(descriptor)

    def sync_path(self, path: str) -> None:
        self._before("fsync")
        super().sync_path(path)

    def rename(self, source: str, target: str) -> None:
        self._before("rename")
        super().rename(source, target)

    def exchange(self, first: str, second: str) -> None:
        self._before("exchange")
        super().exchange(first, second)

    def remove_directory(self, path: str) -> None:
        self._before("rmdir")
        super().remove_directory(path)

    def remove_tree(self, path: str) -> None:
        self._before("remove")
        super().remove_tree(path)

    def remove_file(self, path: str) -> None:
        self._before("unlink")
        super().remove_file(path)

    def lock(self, path: str) -> int | None:
        self._before("lock")
        return super().lock(path)


def file_system(**operations: Callable[..., Any]) -> FileSystem:
    """A file system in which the named operations are replaced."""
    faulty = FileSystem()
    for name, operation in operations.items():
        assert hasattr(FileSystem, name), f"there is no operation {name} to replace"
        setattr(faulty, name, operation)
    return faulty


def failing(code: int) -> Callable[..., Any]:
    """An operation that raises what the system would."""

    def fail(*_: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def at_most(limit: int) -> Act:
    """For :class:`FaultyFileSystem`: every read, write and copy falls short of more bytes than this."""
    return lambda number, operation, nbytes: min(nbytes, limit)


def prepare(root: Path, scenario: str) -> tuple[Checkpoint, Path]:
    """Empty the root, and create a checkpoint and, if the scenario has one, an old output; returns also its path."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "source").mkdir(parents=True)
    where, exists = SCENARIOS[scenario]
    for name, content in OLD.items() if exists else ():
        (root / where / name).parent.mkdir(parents=True, exist_ok=True)
        (root / where / name).write_bytes(content)
    return openai_checkpoint(root / "source", n_layer=1), root / where


def plan(checkpoint: Checkpoint) -> list[PlannedFile]:
    """A file of copied tensors, one of computed tensors, one without tensors."""
    names = sorted(checkpoint.weights)
    copied, copied_end = place([(n, checkpoint.weights[n], n) for n in names], start=5)
    half = [(n, Cast(checkpoint.weights[n], np.dtype(np.float16)), n) for n in names if "ln_" in n]
    transposed = [(f"{n}.T", Transposed(checkpoint.weights[n]), n) for n in ("wte.weight", "wpe.weight")]
    computed, computed_end = place([*half, *transposed])
    return [
        PlannedFile.of_bytes("config.json", b"{}\n"),
        PlannedFile("onnx/model.onnx_data", copied_end + 3, b"head!", copied),
        PlannedFile("model_fp16.bin", computed_end, b"", computed),
    ]


def convert(checkpoint: Checkpoint, output: Path, operations: FileSystem = OS) -> None:
    """The whole conversion, once; replaces an old output."""
    files, settings = plan(checkpoint), IoSettings(operations)
    before = snapshot(checkpoint.source.files)
    with Staging(output, inputs=checkpoint.source.files, force=True, file_system=operations) as staging:
        staging.require_space(sum(file.nbytes for file in files))
        written = write_and_digest(staging.path, files, checkpoint, settings=settings)
        described = manifest_files(checkpoint, files, written, Recipe(("onnx",), {"dtype": None}))
        write_files(staging.path, described, settings=settings)
        check_inputs_unchanged(before)
        staging.publish()


def tree(directory: Path) -> Tree:
    """Relative path → content of every file; empty if the directory does not exist."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def leftovers(root: Path) -> list[str]:
    """What is below the root and should not be."""
    parents = {"a", "a/b"} if (root / "a" / "b" / "out").exists() else set()
    known = {"source", "out", "a/b/out", *parents}
    inside = ("source/", "out/", "a/b/out/")
    names = [str(p.relative_to(root)) for p in sorted(root.rglob("*"))]
    return [name for name in names if name not in known and not name.startswith(inside)]


def kill_everywhere(root: Path, scenario: str) -> list[dict[str, object]]:
    """For n = 0, 1, …: kill a conversion at operation n, record the state, convert again, record it again."""
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
    def act(number: int, operation: str, nbytes: int) -> int:
        if number == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return nbytes

    child = os.fork()
    if child == 0:
        convert(checkpoint, output, FaultyFileSystem(act, scenario))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    json.dump(kill_everywhere(Path(sys.argv[1]), sys.argv[2]), sys.stdout)
