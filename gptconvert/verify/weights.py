"""Rule 1: every exported weight equals its source, byte for byte, in the orientation in which it is used.

Bytes are compared rather than digests, so that a difference can be located. No tolerance; nothing is run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptconvert.model.blocks import Quantised
from gptconvert.model.export import Export
from gptconvert.model.tensors import Array, LazyTensor
from gptconvert.model.transforms import transpose
from gptconvert.publish.source_reader import ReadBack


class Pair(NamedTuple):
    """A stored tensor: the weight it belongs to, its name in the file, its expected and its actual content."""

    weight: str
    name: str
    expected: LazyTensor
    found: LazyTensor


@dataclass(frozen=True)
class Compared:
    """The result for one stored tensor.

    Attributes:
        weight: canonical name of the weight that it belongs to.
        tensor: its name in the file; None if the weight is not stored in a known form.
        dtype: element type, as expected.
        shape: as expected.
        size: bytes.
        ok: whether it is equal; None if only the outputs were compared.
    """

    weight: str
    tensor: str | None
    dtype: str
    shape: tuple[int, ...]
    size: int
    ok: bool | None

    def as_dict(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {**vars(self), "shape": list(self.shape)}


@dataclass
class WeightReport:
    """Result of rule 1.

    Attributes:
        expected: how many weights the checkpoint has.
        equal: how many are stored unchanged.
        nbytes: bytes of the tensors that are equal.
        problems: one line for each tensor that is missing, different or unexpected.
        strict: whether a missing weight is a problem. It is in our own files; other exporters may fuse or fold
            weights, and there the outputs decide.
        outputs_only: the weights that are stored in no known form, so that the outputs alone vouch for them.
        compared: the result for every stored tensor.
    """

    expected: int
    strict: bool = True
    equal: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    outputs_only: list[str] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def as_dict(self, figures: bool = False) -> dict[str, object]:
        """Plain values for ``--json`` and, without ``figures``, the manifest."""
        return {
            "ok": self.ok,
            "weights": self.expected,
            "equal": self.equal,
            "bytes": self.nbytes,
            "every_weight_required": self.strict,
            "problems": list(self.problems),
            **({} if self.strict else {"outputs_only": list(self.outputs_only)}),
            **({"tensors": [each.as_dict() for each in self.compared]} if figures else {}),
        }


def first_difference(expected: LazyTensor, found: LazyTensor, stop: threading.Event | None = None) -> int | None:
    """Index, in the flattened tensor, of the first element whose bytes differ; None if all are equal.

    Both tensors have the same type and shape.

    Raises:
        StoppedError: ``stop`` was set.
    """
    with ReadBack(stop) as written:
        segments = found.segments()
        blocks = (
            found.chunks() if segments is None else (np.frombuffer(b, np.uint8) for b in written.blocks(segments))
        )
        return _first_difference(expected.chunks(), blocks, expected.dtype.itemsize)


def _first_difference(a: Iterator[Array], b: Iterator[Array], itemsize: int) -> int | None:
    position = 0
    for left, right in _side_by_side(a, b):
        if not _same_bytes(left, right):
            return (position + int(np.argmax(left != right))) // itemsize
        position += len(left)
    return None


def _side_by_side(a: Iterator[Array], b: Iterator[Array]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Split two streams of arrays into pairs of byte runs of equal length."""
    left = right = np.empty(0, np.uint8)
    while True:
        if not len(left):
            left = _bytes(next(a, None))
        if not len(right):
            right = _bytes(next(b, None))
        n = min(len(left), len(right))
        if not n:
            return
        yield left[:n], right[:n]
        left, right = left[n:], right[n:]


def _bytes(array: Array | None) -> NDArray[np.uint8]:
    if array is None:
        return np.empty(0, np.uint8)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _same_bytes(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    """Compare eight bytes at a time, which is as fast as memory."""
    whole = len(a) // 8 * 8
    return bool(
        np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64)) and np.array_equal(a[whole:], b[whole:])
    )


def difference(name: str, expected: LazyTensor, found: LazyTensor, stop: threading.Event | None = None) -> str | None:
    """The first difference between two tensors, as text; None if they are equal."""
    if expected.shape != found.shape:
        return f"{name}: expected shape {list(expected.shape)}, found {list(found.shape)}"
    if expected.dtype != found.dtype:
        return f"{name}: expected {expected.dtype}, found {found.dtype}"
    transposed = _stored_transposed(expected) and _stored_transposed(found)
    if transposed:
        expected, found = transpose(expected), transpose(found)
    index = first_difference(expected, found, stop)
    if index is None:
        return None
    where = [int(i) for i in np.unravel_index(index, expected.shape)] if expected.shape else []
    where = where[::-1] if transposed else where
    return f"{name}: differs from its source, first at element {where}"


def _stored_transposed(tensor: LazyTensor) -> bool:
    """Whether a tensor's bytes are stored in the order of its transpose."""
    return tensor.segments() is None and len(tensor.shape) == 2 and transpose(tensor).segments() is not None


def compare(
    report: WeightReport,
    pairs: Iterable[Pair],
    advance: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> WeightReport:
    """Compare pairs, several at a time, and add the results to a report.

    Args:
        report: extended and returned.
        pairs: the tensors to compare.
        advance: called with the number of bytes done.
        stop: cancels the comparison when set.

    Raises:
        StoppedError: ``stop`` was set.
    """
    largest_first = sorted(pairs, key=lambda pair: -pair.expected.nbytes)

    def judge(pair: Pair) -> str | None:
        verdict = difference(pair.name, pair.expected, pair.found, stop)
        if advance is not None:
            advance(pair.expected.nbytes)
        return verdict

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        verdicts = list(pool.map(judge, largest_first))
    report.compared += [
        Compared(p.weight, p.name, p.expected.dtype.name, p.expected.shape, p.expected.nbytes, verdict is None)
        for p, verdict in zip(largest_first, verdicts, strict=True)
    ]
    different = {pair.weight for pair, verdict in zip(largest_first, verdicts, strict=True) if verdict is not None}
    report.equal += len({pair.weight for pair in largest_first} - different)
    report.nbytes += sum(
        p.expected.nbytes for p, verdict in zip(largest_first, verdicts, strict=True) if verdict is None
    )
    report.problems += sorted(verdict for verdict in verdicts if verdict is not None)
    return report


def in_one_piece(pairs: Iterable[Pair]) -> dict[str, LazyTensor]:
    """The weights, by name, usable from the source in place of the file's: contiguous, aligned, of the same type."""
    return {
        name: expected
        for _, name, expected, found in pairs
        if len(segments := expected.segments() or ()) == 1
        and segments[0].offset % expected.dtype.itemsize == 0
        and (expected.shape, expected.dtype) == (found.shape, found.dtype)
    }


def pairs_of(export: Export, found: Mapping[str, LazyTensor], report: WeightReport) -> list[Pair]:
    """Pair each tensor that an export should store with the one stored under its name.

    The expected tensors come from the checkpoint's weights, not from the plan. Missing names are added to the
    report's problems.
    """
    pairs = []
    stored = {placed.weight for placed in export.placed}
    report.problems += [f"{name}: not stored" for name in export.checkpoint.weights if name not in stored]
    for placed in export.placed:
        if placed.name not in found:
            report.problems.append(f"{placed.name}: not in the file")
            continue
        weight = export.checkpoint.weights[str(placed.weight)]
        if placed.part and isinstance(weight, Quantised):
            expected = weight.parts[placed.part]
        else:
            expected = transpose(weight) if placed.transposed else weight
        pairs.append(Pair(str(placed.weight), placed.name, expected, found[placed.name]))
    return pairs
