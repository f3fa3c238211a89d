"""Planned files, the check that they were written as planned, and a minimal published output."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.export import PlannedFile, place
from gptconvert.model.tensors import Cast, LazyTensor, Segment, Stored, Transposed, filled
from gptconvert.model.transforms import concatenate, take_rows
from gptconvert.publish.staging import Staging
from gptconvert.publish.writer import WrittenFile
from tests.helpers import content, stored_tensors

F32 = np.dtype(np.float32)


def sha(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def stored(path: Path, *sizes: int, seed: int = 0) -> list[Stored]:
    """Float32 vectors packed from the start of a new file."""
    values = np.random.default_rng(seed).normal(size=sum(sizes)).astype(np.float32)
    path.write_bytes(values.tobytes())
    starts = np.cumsum([0, *sizes[:-1]]) * 4
    pairs = zip(starts, sizes, strict=True)
    return [Stored((Segment(str(path), int(start), 4 * n),), F32, (n,)) for start, n in pairs]


def planned(
    path: str, tensors: list[LazyTensor], head: bytes = b"", alignment: int = 1, tail: int = 0
) -> PlannedFile:
    """Consecutive tensors ``t0``, ``t1``, …"""
    placed, end = place([(f"t{i}", t, None) for i, t in enumerate(tensors)], len(head), alignment)
    return PlannedFile(path, end + tail, head, placed)


def check(directory: Path, file: PlannedFile, written: WrittenFile) -> None:
    """Assert that the file on disk is the planned one, and that its record is correct."""
    data = (directory / file.path).read_bytes()
    assert data == content(file)
    assert (written.path, written.nbytes, written.sha256) == (file.path, len(data), sha(data))
    for placed in file.tensors:
        if placed.tensor.segments() is None:
            part = data[placed.offset : placed.offset + placed.tensor.nbytes]
            assert written.computed[placed.name] == sha(part)


def make_files(directory: Path) -> list[PlannedFile]:
    """Copied, transposed, cast, sliced, stacked, filled, empty; padded and not; from two source files."""
    rng = np.random.default_rng(1)
    floats = {"a": rng.normal(size=(7, 5)).astype("f4"), "b": rng.normal(size=(9, 5)).astype("f4")}
    a, b = stored_tensors(directory / "s1", floats).values()
    (c,) = stored_tensors(directory / "s2", {"c": rng.integers(0, 99, (4, 6)).astype("i2")}).values()
    swapped = Stored(a.segments() or (), np.dtype(">f4"), a.shape)
    mixed = [
        a,
        b,
        Transposed(b),
        Cast(a, BFLOAT16),
        take_rows(b, [(2, 4), (0, 1)]),
        concatenate([a, take_rows(a, [(1, 3)])]),
        filled(1.0, F32, (3,)),
        filled(2.0, F32, ()),
        filled(0.0, F32, (0, 4)),
        swapped,
        c,
    ]
    return [
        planned("deep/er/mixed.bin", mixed, b"head", alignment=64, tail=13),
        planned("deep/packed.bin", [c, a, b]),
        PlannedFile.of_bytes("small.json", b"{}"),
        PlannedFile.of_bytes("empty", b""),
    ]


def publish(output: Path, content: bytes = b"new", **options: object) -> Staging:
    """Publish a directory with one file."""
    with Staging(output, **options) as staging:  # type: ignore[arg-type]
        (Path(staging.path) / "file").write_bytes(content)
        staging.publish()
    return staging


def names(directory: Path) -> list[str]:
    """The sorted names in a directory."""
    return sorted(path.name for path in directory.iterdir())
