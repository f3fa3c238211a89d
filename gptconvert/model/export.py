"""An export as a value: its files, and in them which tensor goes where. Planned before any byte is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import LazyTensor

#: Tensors start at multiples of this many bytes in the files we lay out (a cache line, and any SIMD width).
ALIGNMENT = 64


@dataclass(frozen=True)
class Placed:
    """A tensor at a place in a file.

    Attributes:
        name: its name in that file.
        tensor: whose row-major bytes go there.
        offset: bytes from the start of the file.
        weight: the canonical weight it holds (two files may hold one weight under two names); None: none.
        transposed: whether it holds the weight's transpose.
    """

    name: str
    tensor: LazyTensor
    offset: int
    weight: str | None = None
    transposed: bool = False


#: Makes the bytes of a file. Is given a function for the unmasked CRC32C of a placed tensor, which waits until the
#: file that holds it is written, and an event: once that is set nobody wants the bytes, and it should raise soon.
Finish = Callable[[Callable[[Placed], int], threading.Event], bytes]


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written: ``head`` first, then tensors at their offsets, zeros between.

    Attributes:
        path: relative to the output directory, with forward slashes.
        nbytes: final size; with ``finish`` an estimate, good for room and progress.
        head: the bytes at offset 0; the whole file if it holds no tensors.
        tensors: by increasing offset.
        finish: for a file that takes long to make, or that records the checksums of other files' tensors: returns
            its bytes. All are called in plan order, by one thread, from the moment writing begins; the files are
            written after all others.
    """

    path: str
    nbytes: int
    head: bytes = b""
    tensors: tuple[Placed, ...] = ()
    finish: Finish | None = None

    @classmethod
    def of_bytes(cls, path: str, content: bytes) -> PlannedFile:
        """A small file known in full."""
        return cls(path, len(content), content)


def place(
    tensors: Iterable[tuple[str, LazyTensor, str | None]], start: int = 0, alignment: int = ALIGNMENT
) -> tuple[tuple[Placed, ...], int]:
    """Lay (name, tensor, weight) one after the other from ``start``, aligned.

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
        checkpoint: with its weights as the artifact stores them (decoded, where the encoding is lossy).
        files: everything the artifact consists of.
        variant: of the target (``fp16``); empty for the base.
    """

    target: str
    path: str
    checkpoint: Checkpoint
    files: tuple[PlannedFile, ...]
    variant: str = ""

    @property
    def placed(self) -> tuple[Placed, ...]:
        """Every tensor that stores a weight, or a part of one."""
        return tuple(placed for file in self.files for placed in file.tensors if placed.weight is not None)
