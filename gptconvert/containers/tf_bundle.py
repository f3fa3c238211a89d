"""TensorFlow checkpoints of version 2 ("tensor bundles"), without TensorFlow.

``PREFIX.index`` describes the tensors (:mod:`gptconvert.containers.tf_index`); ``PREFIX.data-00000-of-00001`` … store
their bytes, row-major, back to back. Opening reads the index and the data files' sizes; a tensor's bytes are read on
use.
"""

from __future__ import annotations

import glob
import math
import os
import struct
from collections.abc import Iterable

import numpy as np

from gptconvert.containers.crc import crc32c, mask
from gptconvert.containers.protobuf import varint
from gptconvert.containers.tf_index import (
    COPY_AGAIN,
    DTYPES,
    NOT_NUMERIC,
    WHOLE,
    Entry,
    Extent,
    Extents,
    Index,
    piece_key,
    read_index,
)
from gptconvert.containers.untrusted import explain_file, file_size
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.tensors import FileChecksum, LazyTensor, Segment, Shape, Stored, TensorSet
from gptconvert.model.transforms import concatenate


def read_bundle(prefix: str) -> TensorSet:
    """Every numeric tensor of the checkpoint ``prefix``, lazily. The notes list the tensors that are skipped.

    Raises:
        InputError: the index is missing or corrupt, data files are missing or truncated.
        UnsupportedError: a later bundle version, or a data type that numpy does not have.
        UnsafeInputError: a file of the checkpoint is not a regular file.
    """
    return bundle_tensors(read_index(prefix))


def string_scalar(content: bytes) -> tuple[bytes, int]:
    """A scalar string tensor as a data file stores it, and its CRC-32C.

    Layout: length as varint, masked checksum of the length, content. Both checksums cover the length as four bytes.
    Source: tensorflow/core/util/tensor_bundle/tensor_bundle.cc, ``WriteStringTensor``.
    """
    length = struct.pack("<I", len(content))
    guard = struct.pack("<I", mask(crc32c(length)))
    return varint(len(content)) + guard + content, crc32c(length + guard + content)


def bundle_tensors(index: Index) -> TensorSet:
    """The lazy tensors of an index already read. Raises as :func:`read_bundle`."""
    reader, tensors, skipped = _Tensors(index), {}, []
    for name, entry in index.tensors.items():
        if entry.data_type in NOT_NUMERIC:
            skipped.append(f"{name} holds {NOT_NUMERIC[entry.data_type]}, not numbers: skipped")
        else:
            tensors[name] = reader.tensor(name, entry)
    stray = index.pieces.keys() - reader.claimed
    if stray:
        raise InputError(
            "the index holds pieces that belong to no variable", path=index.path, found=repr(min(stray))[2:-1]
        )
    shards = _check_data_files(index)
    return TensorSet(tensors, (index.path, *shards), tuple(skipped), tuple(reader.checksums))


class _Tensors:
    """Turns entries into lazy tensors; ``checksums`` and ``claimed`` collect checksums and keys of the pieces."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.claimed: set[bytes] = set()
        self.checksums: list[FileChecksum] = []

    def tensor(self, name: str, entry: Entry) -> LazyTensor:
        """The tensor of ``entry``, its pieces joined."""
        return self._joined(name, entry) if entry.slices else self._stored(name, entry)

    def _stored(self, name: str, entry: Entry) -> Stored:
        dtype = self._dtype(name, entry)
        expected = math.prod(entry.shape) * dtype.itemsize
        if entry.nbytes != expected:
            raise InputError(
                f"the index is inconsistent: {dtype} of shape {list(entry.shape)}",
                path=self.index.path,
                item=name,
                expected=f"{expected} bytes",
                found=f"{entry.nbytes} bytes",
            )
        segment = Segment(self.index.shard_path(entry.shard), entry.offset, entry.nbytes)
        return Stored((segment,), dtype, entry.shape, entry.crc32c)

    def _dtype(self, name: str, entry: Entry) -> np.dtype[np.generic]:
        dtype, swapped = DTYPES.get(entry.data_type), self.index.big_endian
        if dtype is None:
            raise UnsupportedError(
                f"values of data type {entry.data_type} are not supported",
                path=self.index.path,
                item=name,
            )
        return dtype.newbyteorder(">") if swapped and dtype.itemsize > 1 else dtype

    def _joined(self, name: str, entry: Entry) -> LazyTensor:
        """The pieces of a partitioned variable, concatenated along the axis it was split on."""
        pieces = [(extents, self._ranges(name, extents, entry.shape)) for extents in entry.slices]
        axis = self._split_axis(name, entry.shape, [ranges for _, ranges in pieces])
        parts, position = [], 0
        for extents, ranges in sorted(pieces, key=lambda piece: piece[1][axis]):
            start, length = ranges[axis]
            if start != position:
                raise self._wrong(name, f"its pieces leave a gap or overlap at {position} of axis {axis}")
            parts.append(self._piece(name, entry, extents, ranges))
            position += length
        if position != entry.shape[axis]:
            raise self._wrong(name, f"its pieces end at {position} of {entry.shape[axis]} on axis {axis}")
        return concatenate(parts, axis)

    def _ranges(self, name: str, extents: Extents, shape: Shape) -> Extents:
        """(start, length) per axis, with :data:`WHOLE` replaced by the axis's length."""
        if len(extents) != len(shape):
            raise self._wrong(name, f"a piece of rank {len(extents)} in a variable of shape {list(shape)}")
        sized = zip(extents, shape, strict=True)
        ranges = tuple((start, size if length == WHOLE else length) for (start, length), size in sized)
        if any(start < 0 or length < 1 for start, length in ranges):
            raise self._wrong(name, f"a piece {_as_text(ranges)} in a variable of shape {list(shape)}")
        return ranges

    def _split_axis(self, name: str, shape: Shape, pieces: list[Extents]) -> int:
        """The one axis along which the pieces differ from the whole; 0 if none does."""
        axes = {axis for ranges in pieces for axis, extent in enumerate(ranges) if extent != (0, shape[axis])}
        if len(axes) > 1:
            raise UnsupportedError(
                f"a variable partitioned along several axes ({', '.join(map(str, sorted(axes)))}) is not supported",
                path=self.index.path,
                item=name,
                hint="save it again from a graph without the partitioner",
            )
        if not shape:
            raise self._wrong(name, "a scalar stored in pieces")
        return min(axes, default=0)

    def _piece(self, name: str, whole: Entry, extents: Extents, ranges: Extents) -> Stored:
        key, title = piece_key(name, extents), f"{name} {_as_text(ranges)}"
        piece = self.index.pieces.get(key)
        if piece is None:
            raise self._wrong(title, "this piece is missing")
        if piece.shape != tuple(length for _, length in ranges) or piece.data_type != whole.data_type or piece.slices:
            raise self._wrong(title, "this piece's shape or type does not match the variable's")
        self.claimed.add(key)
        stored = self._stored(title, piece)
        self.checksums += [FileChecksum(part, "crc32c", piece.crc32c, title) for part in stored.parts]
        return stored

    def _wrong(self, name: str, what: str) -> InputError:
        return InputError(f"the index is inconsistent: {what}", path=self.index.path, item=name)


def _as_text(ranges: Iterable[Extent]) -> str:
    """The ranges as ``[0:49, 0:24]``."""
    return "[" + ", ".join(f"{start}:{start + length}" for start, length in ranges) + "]"


def _check_data_files(index: Index) -> list[str]:
    """The data files in use, checked to be present, regular and long enough. The error names all missing ones."""
    ends: dict[int, tuple[int, str]] = {}
    for name, entry in _owners(index):
        ends[entry.shard] = max(ends.get(entry.shard, (0, "")), (entry.offset + entry.nbytes, name))
    paths = {number: index.shard_path(number) for number in sorted(ends)}
    missing = [path for path in paths.values() if not os.path.lexists(path)]
    if missing:
        raise _missing(index, missing, len(paths))
    for number, path in paths.items():
        size, (end, name) = file_size(path), ends[number]
        if size < end:
            explained = explain_file(path, allow={"zeros"})
            raise InputError(
                f"this file {explained}" if explained else f"file is truncated: {name} extends past its end",
                path=path,
                expected=f"{end} bytes",
                found=f"{size} bytes",
                hint=COPY_AGAIN,
            )
    return list(paths.values())


def _missing(index: Index, missing: list[str], total: int) -> InputError:
    beside = sorted(os.path.basename(path) for path in glob.glob(glob.escape(index.prefix) + ".data-*"))
    names = ", ".join(os.path.basename(path) for path in missing[:20])
    return InputError(
        f"{len(missing)} of {total} data files are missing: {names}{' …' if len(missing) > 20 else ''}",
        path=index.prefix,
        found=", ".join(beside[:20]) or "no data file of this checkpoint",
        hint="copy all files of the checkpoint into one directory",
    )


def _owners(index: Index) -> Iterable[tuple[str, Entry]]:
    """Entries that own bytes, with their names in error messages."""
    yield from ((name, entry) for name, entry in index.tensors.items() if not entry.slices)
    yield from ((repr(key)[2:-1], entry) for key, entry in index.pieces.items())
