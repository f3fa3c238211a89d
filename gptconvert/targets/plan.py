"""What a target hands to the writer: files, and in them which tensor goes where. Planned before any byte is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gptconvert.checkpoint import Checkpoint
from gptconvert.tensors import LazyTensor

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
    """

    name: str
    tensor: LazyTensor
    offset: int
    weight: str | None = None


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
class TargetOptions:
    """Choices that change what is written.

    Attributes:
        dtype: storage asked for: ``fp32``, ``fp16``, ``bf16``; None keeps each tensor as it is.
        opset: ONNX operator set.
        kv_cache: whether the ONNX graph takes and returns keys and values.
        single_file: whether ONNX weights go inside the graph file.
        max_shard_size: bytes of one safetensors file.
        xla: whether the SavedModel also gets compiled signatures of fixed shapes.
    """

    dtype: str | None = None
    opset: int = 21
    kv_cache: bool = True
    single_file: bool = False
    max_shard_size: int = 5_000_000_000
    xla: bool = False


@dataclass(frozen=True)
class Target:
    """One output format.

    Attributes:
        name: as in ``--to``.
        title: for people.
        plan: the files it writes for a checkpoint (weights already cast to the dtype asked for).
        requires: (module, extra) that must be installed.
        families: names of the families it writes; empty: all.
        libraries: installed distributions that have a hand in the bytes.
    """

    name: str
    title: str
    plan: Callable[[Checkpoint, TargetOptions], tuple[PlannedFile, ...]]
    requires: tuple[tuple[str, str], ...] = ()
    families: frozenset[str] = field(default_factory=frozenset)
    libraries: tuple[str, ...] = ()
