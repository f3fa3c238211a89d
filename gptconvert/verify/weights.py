"""Rule 1: every exported weight is its source, byte for byte, in the orientation in which it is used.

Bytes are compared, which says all that equal digests say and also where they differ. No tolerance, nothing run.
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

from gptconvert.model.export import Export
from gptconvert.model.tensors import Array, LazyTensor
from gptconvert.model.transforms import transpose
from gptconvert.publish.source_reader import ReadBack


class Pair(NamedTuple):
    """A stored tensor: the weight it belongs to, its name in the file, what it should be, and what it is."""

    weight: str
    name: str
    expected: LazyTensor
    found: LazyTensor


@dataclass
class WeightReport:
    """What rule 1 found.

    Attributes:
        expected: how many weights the checkpoint has.
        equal: how many were found, equal.
        nbytes: bytes of these.
        problems: one line for each tensor that is missing, different or not expected.
        strict: whether a weight not found counts as a problem. It does in our own files; in anyone else's, weights
            may have been fused or folded, and the outputs decide.
    """

    expected: int
    strict: bool = True
    equal: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, object]:
        """For ``--json`` and the manifest."""
        return {
            "ok": self.ok,
            "weights": self.expected,
            "equal": self.equal,
            "bytes": self.nbytes,
            "every_weight_required": self.strict,
            "problems": list(self.problems),
        }


def first_difference(expected: LazyTensor, found: LazyTensor, stop: threading.Event | None = None) -> int | None:
    """Index, in the flattened tensor, of the first element whose bytes differ; both have one type and shape.

    Raises:
        StoppedError: ``stop`` was set.
    """
    with ReadBack(stop) as written:
        place = found.segments()
        blocks = found.chunks() if place is None else (np.frombuffer(b, np.uint8) for b in written.blocks(place))
        return _first_difference(expected.chunks(), blocks, expected.dtype.itemsize)


def _first_difference(a: Iterator[Array], b: Iterator[Array], itemsize: int) -> int | None:
    position = 0
    for left, right in _side_by_side(a, b):
        if not _same_bytes(left, right):
            return (position + int(np.argmax(left != right))) // itemsize
        position += len(left)
    return None


def _side_by_side(a: Iterator[Array], b: Iterator[Array]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Two streams of arrays as pairs of byte runs of equal length."""
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
    """Eight bytes at a time: as fast as memory."""
    whole = len(a) // 8 * 8
    return bool(
        np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64)) and np.array_equal(a[whole:], b[whole:])
    )


def difference(name: str, expected: LazyTensor, found: LazyTensor, stop: threading.Event | None = None) -> str | None:
    """In what two tensors differ, in words; None: in nothing."""
    if expected.shape != found.shape:
        return f"{name}: expected shape {list(expected.shape)}, found {list(found.shape)}"
    if expected.dtype != found.dtype:
        return f"{name}: expected {expected.dtype}, found {found.dtype}"
    turned = _lies_turned(expected) and _lies_turned(found)
    if turned:
        expected, found = transpose(expected), transpose(found)
    index = first_difference(expected, found, stop)
    if index is None:
        return None
    where = [int(i) for i in np.unravel_index(index, expected.shape)] if expected.shape else []
    where = where[::-1] if turned else where
    return f"{name}: differs from its source, first at element {where}"


def _lies_turned(tensor: LazyTensor) -> bool:
    """Whether a tensor's bytes lie in a file in the order of its transpose."""
    return tensor.segments() is None and len(tensor.shape) == 2 and transpose(tensor).segments() is not None


def compare(
    report: WeightReport,
    pairs: Iterable[Pair],
    advance: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> WeightReport:
    """Compare pairs and count them in, some tensors at a time.

    Args:
        report: added to, and returned.
        pairs: what to compare.
        advance: told bytes done.
        stop: when set by another thread, comparing ends with :class:`StoppedError`.
    """
    largest_first = sorted(pairs, key=lambda pair: -pair.expected.nbytes)

    def judge(pair: Pair) -> str | None:
        verdict = difference(pair.name, pair.expected, pair.found, stop)
        if advance is not None:
            advance(pair.expected.nbytes)
        return verdict

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        verdicts = list(pool.map(judge, largest_first))
    different = {pair.weight for pair, verdict in zip(largest_first, verdicts, strict=True) if verdict is not None}
    report.equal += len({pair.weight for pair in largest_first} - different)
    report.nbytes += sum(
        p.expected.nbytes for p, verdict in zip(largest_first, verdicts, strict=True) if verdict is None
    )
    report.problems += sorted(verdict for verdict in verdicts if verdict is not None)
    return report


def in_one_piece(pairs: Iterable[Pair]) -> dict[str, LazyTensor]:
    """The weights, by name, that lie in one run of a source's bytes, fit to be used from there as the file's own."""
    return {
        name: expected
        for _, name, expected, found in pairs
        if len(place := expected.segments() or ()) == 1
        and place[0].offset % expected.dtype.itemsize == 0
        and (expected.shape, expected.dtype) == (found.shape, found.dtype)
    }


def pairs_of(export: Export, found: Mapping[str, LazyTensor], report: WeightReport) -> list[Pair]:
    """What an export should have stored beside what is there under the same names.

    What should be stored is derived from the checkpoint's weights, not from the tensors that were planned. Missing
    names are counted as problems.
    """
    pairs = []
    stored = {placed.weight for placed in export.placed}
    report.problems += [f"{name}: not stored" for name in export.checkpoint.weights if name not in stored]
    for placed in export.placed:
        if placed.name not in found:
            report.problems.append(f"{placed.name}: not in the file")
            continue
        weight = export.checkpoint.weights[str(placed.weight)]
        expected = transpose(weight) if placed.transposed else weight
        pairs.append(Pair(str(placed.weight), placed.name, expected, found[placed.name]))
    return pairs
