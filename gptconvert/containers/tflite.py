"""The LiteRT (TensorFlow Lite) model file: a FlatBuffer of operators, tensors and the bytes of constants.

Only what describes constants and signatures is read; the bytes of constants stay in the file. Every offset is checked
against the file's size, so a damaged file ends in an error that names it.
Format: tensorflow/compiler/mlir/lite/schema/schema.fbs (field numbers below are the order of fields there).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.untrusted import explain_file, file_size
from gptconvert.errors import FETCH_AGAIN, InputError, UnsupportedError
from gptconvert.model.tensors import Segment, Shape, Stored, map_segment

MAGIC, VERSION = b"TFL3", 3
#: Largest file: offsets are signed 32-bit numbers.
MAX_BYTES = (1 << 31) - 1
#: Most graphs, and most tensors, operators, inputs or axes in one list.
MAX_GRAPHS, MAX_ITEMS = 64, 1_000_000
#: Type number → NumPy type, of the types that are read.
TYPES: Mapping[int, np.dtype[np.generic]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    2: np.dtype("<i4"),
    3: np.dtype("u1"),
    4: np.dtype("<i8"),
    6: np.dtype("?"),
    9: np.dtype("i1"),
}
#: Number of an operator that is not built in.
CUSTOM = 32


@dataclass(frozen=True)
class TfliteTensor:
    """A tensor of a graph.

    Attributes:
        name: of the tensor; those that share a constant may have the names of all its users, separated by ``;``.
        dtype: None for a type that is not read.
        shape: -1 for a size that is not fixed.
        buffer: number of its constant; 0 if it has none.
        stored: the constant; None if it has none.
        scales: of a quantised constant, one for each index of ``axis``; None for others.
        zeros: the codes of zero, one for each scale; None for others.
        axis: along which the scales differ.
    """

    name: str
    dtype: np.dtype[np.generic] | None
    shape: Shape
    buffer: int
    stored: Stored | None
    scales: Stored | None
    zeros: Stored | None
    axis: int


@dataclass(frozen=True)
class TfliteGraph:
    """A graph.

    Attributes:
        tensors: all its tensors.
        operators: number of each operator.
    """

    tensors: tuple[TfliteTensor, ...]
    operators: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """A signature: the graph it runs, and the numbers of the tensors by which it is called."""

    graph: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


@dataclass(frozen=True)
class TfliteModel:
    """A model file.

    Attributes:
        path: of the file.
        nbytes: of the file.
        graphs: its graphs.
        signatures: name → signature.
    """

    path: str
    nbytes: int
    graphs: tuple[TfliteGraph, ...]
    signatures: Mapping[str, Signature]

    @cached_property
    def constant_bytes(self) -> int:
        """Bytes of all constants."""
        sizes = {t.buffer: t.stored.nbytes for g in self.graphs for t in g.tensors if t.stored is not None}
        return sum(sizes.values())


def read_tflite(path: str) -> TfliteModel:
    """Read a model file.

    Raises:
        InputError: it is not one, or is damaged.
        UnsupportedError: it is of another version, or stores constants outside the FlatBuffer.
    """
    size = file_size(path)
    if not 8 <= size <= MAX_BYTES:
        expected = f"8 to {MAX_BYTES} bytes"
        raise InputError("not a LiteRT model", path=path, expected=expected, found=f"{size} bytes", hint=FETCH_AGAIN)
    data = map_segment(Segment(path, 0, size))
    if data[4:8].tobytes() != MAGIC:
        explained = explain_file(path, {"tflite"})
        message = f"this file {explained}" if explained else "not a LiteRT model"
        raise InputError(message, path=path, expected="a .tflite file", found=repr(data[:8].tobytes()))
    try:
        return _model(_Table.root(data, path), path, size)
    except (struct.error, IndexError, ValueError, UnicodeDecodeError) as error:
        raise InputError("the file is damaged or truncated", path=path, found=error, hint=FETCH_AGAIN) from error


@dataclass(frozen=True)
class _Table:
    """A table of the FlatBuffer: field number → value, by an index stored before it."""

    data: NDArray[np.uint8]
    path: str
    start: int

    @classmethod
    def root(cls, data: NDArray[np.uint8], path: str) -> _Table:
        return cls(data, path, _unpack(data, "I", 0))

    def _field(self, number: int) -> int:
        """Position of a field; 0 if it is absent."""
        index = self.start - _unpack(self.data, "i", self.start)
        if 4 + 2 * number >= _unpack(self.data, "H", index):
            return 0
        offset = _unpack(self.data, "H", index + 4 + 2 * number)
        return self.start + offset if offset else 0

    def number(self, field: int, code: str) -> int:
        """A number; 0 if it is absent."""
        at = self._field(field)
        return _unpack(self.data, code, at) if at else 0

    def vector(self, field: int, itemsize: int, most: int = MAX_ITEMS) -> tuple[int, int]:
        """Position and length of a list; (0, 0) if it is absent."""
        at = self._field(field)
        if not at:
            return 0, 0
        at += _unpack(self.data, "I", at)
        count = _unpack(self.data, "I", at)
        if count > most or at + 4 + count * itemsize > len(self.data):
            raise ValueError(f"a list of {count} items at {at}")
        return at + 4, count

    def numbers(self, field: int) -> list[int]:
        """A list of int32."""
        at, count = self.vector(field, 4)
        return [_unpack(self.data, "i", at + 4 * i) for i in range(count)]

    def text(self, field: int) -> str:
        """A text; empty if it is absent."""
        at, count = self.vector(field, 1)
        return self.data[at : at + count].tobytes().decode()

    def tables(self, field: int, most: int = MAX_ITEMS) -> Iterator[_Table]:
        """A list of tables."""
        at, count = self.vector(field, 4, most)
        for place in range(at, at + 4 * count, 4):
            yield _Table(self.data, self.path, place + _unpack(self.data, "I", place))

    def table(self, field: int) -> _Table | None:
        """A table; None if it is absent."""
        at = self._field(field)
        return _Table(self.data, self.path, at + _unpack(self.data, "I", at)) if at else None

    def stored(self, field: int, dtype: np.dtype[np.generic]) -> Stored | None:
        """A list of numbers, left in the file; None if it is absent or empty."""
        at, count = self.vector(field, dtype.itemsize, MAX_BYTES)
        return Stored((Segment(self.path, at, count * dtype.itemsize),), dtype, (count,)) if count else None


def _unpack(data: NDArray[np.uint8], code: str, at: int) -> int:
    if at < 0:
        raise ValueError(f"offset {at}")
    value: int = struct.unpack_from(f"<{code}", data.data, at)[0]
    return value


def _model(root: _Table, path: str, size: int) -> TfliteModel:
    if (version := root.number(0, "I")) != VERSION:
        expected, found = f"version {VERSION}", f"version {version}"
        raise UnsupportedError("unknown version of LiteRT's format", path=path, expected=expected, found=found)
    codes = [max(code.number(0, "b"), code.number(3, "i")) for code in root.tables(1)]
    buffers = list(root.tables(4))
    graphs = tuple(
        TfliteGraph(
            tuple(_tensor(table, buffers) for table in graph.tables(0)),
            tuple(codes[operator.number(0, "I")] for operator in graph.tables(3)),
        )
        for graph in root.tables(2, MAX_GRAPHS)
    )
    signatures = {table.text(2): _signature(table, graphs) for table in root.tables(7, MAX_GRAPHS)}
    return TfliteModel(path, size, graphs, signatures)


def _signature(table: _Table, graphs: tuple[TfliteGraph, ...]) -> Signature:
    graph = table.number(4, "I")
    sides = [{entry.text(0): entry.number(1, "I") for entry in table.tables(field)} for field in (0, 1)]
    if any(number >= len(graphs[graph].tensors) for side in sides for number in side.values()):
        raise ValueError("a signature names a tensor that does not exist")
    return Signature(graph, *sides)


def _tensor(table: _Table, buffers: list[_Table]) -> TfliteTensor:
    name, dtype, number = table.text(3), TYPES.get(table.number(1, "b")), table.number(2, "I")
    fixed, signature = tuple(table.numbers(0)), tuple(table.numbers(7))
    quantisation, buffer = table.table(4), buffers[number]
    if buffer.number(1, "Q") > 1:
        raise UnsupportedError("constants outside the FlatBuffer are not supported", path=table.path, item=name)
    raw = None if dtype is None else buffer.stored(0, np.dtype(np.uint8))
    stored = None
    if raw is not None and dtype is not None:
        if math.prod(fixed) * dtype.itemsize != raw.nbytes or min(fixed, default=0) < 0:
            raise ValueError(f"{name}: {raw.nbytes} bytes for the shape {list(fixed)}")
        stored = Stored(raw.parts, dtype, fixed)
    scales = None if quantisation is None else quantisation.stored(2, np.dtype("<f4"))
    zeros = None if quantisation is None else quantisation.stored(3, np.dtype("<i8"))
    axis = 0 if quantisation is None else quantisation.number(6, "i")
    return TfliteTensor(name, dtype, signature or fixed, number, stored, scales, zeros, axis)
