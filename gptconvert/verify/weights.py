"""Rule 1: every exported weight is its source, byte for byte, in the orientation in which it is used.

Bytes are compared, which says all that equal digests say and also where they differ. No tolerance, nothing run.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.checkpoint import Checkpoint
from gptconvert.publish.source_reader import ReadBack
from gptconvert.tensors import BFLOAT16, Array, LazyTensor
from gptconvert.transforms import cast, transpose
from gptconvert.verify.onnx_file import OnnxFile

#: An initializer that is no weight may be a constant of this many elements; anything larger has no business there.
MOST_CONSTANT_ELEMENTS = 4096
#: Types that weights are stored in.
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)

#: Name, the weight as it should be in the file, and as it is.
Pair = tuple[str, LazyTensor, LazyTensor]


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
    largest_first = sorted(pairs, key=lambda pair: -pair[1].nbytes)

    def judge(pair: Pair) -> str | None:
        verdict = difference(*pair, stop)
        if advance is not None:
            advance(pair[1].nbytes)
        return verdict

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        verdicts = list(pool.map(judge, largest_first))
    for (_, expected, _), verdict in zip(largest_first, verdicts, strict=True):
        if verdict is None:
            report.equal, report.nbytes = report.equal + 1, report.nbytes + expected.nbytes
    report.problems += sorted(verdict for verdict in verdicts if verdict is not None)
    return report


def pair_up(file: OnnxFile, weights: Mapping[str, LazyTensor]) -> tuple[WeightReport, list[Pair]]:
    """What is to be compared in one of our own ONNX files, by name; the report says what there is nothing to compare
    with.
    """
    report, pairs = WeightReport(len(weights)), list[Pair]()
    flips = orientations(file.model.graph)
    for name, weight in weights.items():
        found, uses = file.initializers.get(name), flips.get(name, {False})
        if found is None:
            report.problems.append(f"{name}: not in the graph")
        elif len(uses) > 1:
            report.problems.append(f"{name}: used both as it is and transposed")
        else:
            pairs.append((name, transpose(weight) if uses == {True} else weight, found))
    for name, tensor in file.initializers.items():
        if name not in weights and tensor.size > MOST_CONSTANT_ELEMENTS:
            report.problems.append(f"{name}: not a weight of this model")
    return report, pairs


def orientations(graph: Any) -> dict[str, set[bool]]:
    """Initializer → whether its matrix products take it as [in, out], the transpose of the canonical weight.

    A ``Gemm`` says so in ``transB``; a ``MatMul`` always does. Casts and transposes on the way are followed.
    """
    uses: dict[str, set[bool]] = {}
    origin: dict[str, tuple[str, bool]] = {tensor.name: (tensor.name, False) for tensor in graph.initializer}
    for node in graph.node:  # topological order, as ONNX demands
        if node.op_type in ("Cast", "Identity", "Transpose") and node.input[0] in origin:
            name, flipped = origin[node.input[0]]
            origin[node.output[0]] = name, flipped ^ (node.op_type == "Transpose")
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in origin:
            name, flipped = origin[node.input[1]]
            as_is = any(a.name == "transB" and a.i for a in node.attribute)
            uses.setdefault(name, set()).add(as_is == flipped)
        elif node.op_type == "Gather" and node.input[0] in origin:
            name, flipped = origin[node.input[0]]
            uses.setdefault(name, set()).add(flipped)
    return uses


def in_one_piece(pairs: Iterable[Pair]) -> dict[str, LazyTensor]:
    """The weights, by name, that lie in one run of a source's bytes, fit to be used from there as the file's own."""
    return {
        name: expected
        for name, expected, found in pairs
        if len(place := expected.segments() or ()) == 1
        and place[0].offset % expected.dtype.itemsize == 0
        and (expected.shape, expected.dtype) == (found.shape, found.dtype)
    }


def match_by_content(file: OnnxFile, weights: Mapping[str, LazyTensor]) -> tuple[WeightReport, list[Pair]]:
    """How many weights stand somewhere in the file, in either orientation. Most comparisons end at once, and so
    nothing is left to be compared.
    """
    report = WeightReport(len(weights), strict=False)
    free = dict(file.initializers)
    for weight in weights.values():
        ways = [weight, transpose(weight)] if len(weight.shape) == 2 else [weight]
        for name, tensor in free.items():
            if any(difference(name, way, tensor) is None for way in ways):
                report.equal, report.nbytes = report.equal + 1, report.nbytes + weight.nbytes
                del free[name]
                break
    return report, []


def as_stored(checkpoint: Checkpoint, tensors: Iterable[LazyTensor]) -> Checkpoint:
    """The checkpoint in the type in which ``tensors`` are, most of them: rounding on storage is no error.

    A checkpoint of several types stays as it is where there is as much of each among ``tensors``.
    """
    sizes, own = _bytes_by_type(tensors), _bytes_by_type(checkpoint.weights.values())
    dtype = max(FLOATS, key=lambda d: sizes[d])
    if not sizes[dtype] or all(sizes[d] >= nbytes for d, nbytes in own.items()):
        return checkpoint
    weights = {name: cast(weight, dtype) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def _bytes_by_type(tensors: Iterable[LazyTensor]) -> dict[np.dtype[np.generic], int]:
    """Type that weights are stored in → bytes."""
    sizes = dict.fromkeys(FLOATS, 0)
    for tensor in tensors:
        dtype = tensor.dtype.newbyteorder("=")
        if dtype in sizes:
            sizes[dtype] += tensor.nbytes
    return sizes
