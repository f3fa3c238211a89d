"""An export as a value: its files and the offset of every tensor in them. Planned before any byte is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import LazyTensor

#: Alignment in bytes of tensors in files laid out here (a cache line, and enough for any SIMD width).
ALIGNMENT = 64


@dataclass(frozen=True)
class Placed:
    """A tensor at an offset in a file.

    Attributes:
        name: its name in that file.
        tensor: the tensor whose row-major bytes are written.
        offset: bytes from the start of the file.
        weight: the canonical weight that it stores (two files may store one weight under two names), or None.
        transposed: whether it stores the weight's transpose.
        part: the part of a quantised weight that it stores; empty if it stores the whole weight.
    """

    name: str
    tensor: LazyTensor
    offset: int
    weight: str | None = None
    transposed: bool = False
    part: str = ""


#: Returns the bytes of a file. Its arguments are a function that returns the unmasked CRC-32C of a placed tensor,
#: blocking until the tensor's file is written, and a cancellation event; once it is set, the call should raise soon.
Finish = Callable[[Callable[[Placed], int], threading.Event], bytes]


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: ``head`` first, then tensors at their offsets, with zeros between them.

    Attributes:
        path: relative to the output directory, with forward slashes.
        nbytes: final size; with ``finish``, an estimate for disk space and progress.
        head: the bytes at offset 0; the whole file if it has no tensors.
        tensors: by increasing offset.
        finish: returns the file's bytes if they are slow to compute, or record checksums of other files' tensors. One
            background thread calls these in plan order from the start of writing; their files are written last.
    """

    path: str
    nbytes: int
    head: bytes = b""
    tensors: tuple[Placed, ...] = ()
    finish: Finish | None = None

    @classmethod
    def of_bytes(cls, path: str, content: bytes) -> PlannedFile:
        """A small file with known content."""
        return cls(path, len(content), content)


def place(
    tensors: Iterable[tuple[str, LazyTensor, str | None]], start: int = 0, alignment: int = ALIGNMENT
) -> tuple[tuple[Placed, ...], int]:
    """Place each (name, tensor, weight) in order from ``start``, aligned.

    Returns:
        the placed tensors and the offset after the last.
    """
    placed, offset = [], start
    for name, tensor, weight in tensors:
        offset += -offset % alignment
        placed.append(Placed(name, tensor, offset, weight))
        offset += tensor.nbytes
    return tuple(placed), offset


@dataclass(frozen=True)
class Export:
    """One artifact of a conversion, from plan to manifest.

    Attributes:
        target: as in ``--to``.
        path: of the artifact, relative to the output: a graph file, a weights file or index, or a directory.
        checkpoint: with its weights as stored in the artifact (decoded if the encoding is lossy).
        files: all files of the artifact.
        variant: of the target (``fp16``); empty for the base.
        notes: what the user should know about this artifact, one sentence each.
        shared: files of another export that the artifact uses too.
    """

    target: str
    path: str
    checkpoint: Checkpoint
    files: tuple[PlannedFile, ...]
    variant: str = ""
    notes: tuple[str, ...] = ()
    shared: tuple[PlannedFile, ...] = ()

    @property
    def placed(self) -> tuple[Placed, ...]:
        """Every tensor that stores a weight, or a part of one."""
        return tuple(
            placed for file in (*self.files, *self.shared) for placed in file.tensors if placed.weight is not None
        )
