"""Commands that campaigns run on copies of a small checkpoint, and what they may leave."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
SOURCE = FIXTURES / "tiny-gpt2" / "openai-tf"
OLD = {"old.txt": b"the old output", "sub/more.bin": bytes(range(256))}

Tree = dict[str, bytes]


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary directory with a copy of the checkpoint, ``source``; in memory where possible."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        shutil.copytree(SOURCE, Path(root) / "source", ignore=shutil.ignore_patterns("golden.npz"))
        yield Path(root)


def write_old(output: Path) -> None:
    """Write an output for ``--force`` to replace."""
    for name, content in OLD.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)


def tree(directory: Path) -> Tree:
    """Relative path → content of every file; empty if the directory does not exist."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def leftovers(root: Path, *known: str) -> list[str]:
    """Names in ``root`` besides the source, the output ``out`` and those ``known``."""
    return sorted({path.name for path in root.iterdir()} - {"source", "out", *known})
