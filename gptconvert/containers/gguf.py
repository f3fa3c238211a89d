"""The GGUF container (llama.cpp), version 3: metadata, a table of tensors, then their bytes, each aligned.

Only the head is read: metadata and the table. The checks are those of llama.cpp (``ggml/src/gguf.cpp``) plus limits
on counts, and messages name the key or tensor. Shapes here are those of NumPy, outermost axis first; the file stores
them reversed. A model may be split into files ``NAME-00001-of-0000N.gguf``, of which the first has the metadata.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from gptconvert.containers.untrusted import explain_file, file_beside, file_size
from gptconvert.errors import FETCH_AGAIN, InputError, UnsupportedError, short_repr
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import LazyTensor, Segment, Shape, Stored

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
#: Versions that are read: 3 differs from 2 only in that it may be big-endian.
VERSIONS = (2, 3)
#: Most metadata keys, tensors, elements of all arrays together, bytes of a key or tensor name, axes, and files.
MAX_KEYS, MAX_TENSORS, MAX_ELEMENTS, MAX_NAME, MAX_RANK, MAX_FILES = 4096, 50_000, 4_000_000, 65_535, 4, 1000
#: Most bytes of the head, and largest alignment.
MAX_HEAD, MAX_ALIGNMENT = 512 << 20, 1 << 20
MAX_SIZE = 1 << 63

#: Number → struct's code of a scalar.
SCALARS: Mapping[int, str] = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
#: Python type of a value to write → its number. Sizes and ids are uint32, as llama.cpp expects them.
WRITTEN: Mapping[type, int] = {bool: 7, int: 4, float: 6, str: STRING}
UINT16, INT32 = 2, 5

Scalar = bool | int | float | str
Value = Scalar | list[bool] | list[int] | list[float] | list[str]


@dataclass(frozen=True)
class TensorType:
    """How elements are stored.

    Attributes:
        name: llama.cpp's.
        number: in files.
        block: elements of a row stored together.
        nbytes: of a block.
        dtype: of plain elements; None for blocks.
    """

    name: str
    number: int
    block: int
    nbytes: int
    dtype: np.dtype[np.generic] | None = None


#: Types that this program reads or writes.
TYPES: Mapping[str, TensorType] = {
    row.name: row
    for row in (
        TensorType("F32", 0, 1, 4, np.dtype("<f4")),
        TensorType("F16", 1, 1, 2, np.dtype("<f2")),
        TensorType("BF16", 30, 1, 2, BFLOAT16),
        TensorType("F64", 28, 1, 8, np.dtype("<f8")),
        TensorType("Q4_0", 2, 32, 18),
        TensorType("Q5_0", 6, 32, 22),
        TensorType("Q8_0", 8, 32, 34),
    )
}
#: Other types: number → (name, elements, bytes) of a block. Their layout is checked, but they are not decoded.
OTHERS: Mapping[int, tuple[str, int, int]] = {
    3: ("Q4_1", 32, 20),
    7: ("Q5_1", 32, 24),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
_BY_NUMBER: Mapping[int, TensorType] = {row.number: row for row in TYPES.values()} | {
    number: TensorType(name, number, block, nbytes) for number, (name, block, nbytes) in OTHERS.items()
}
#: Name of one file of several.
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
#: Keys of a file of several: its index from 0, the number of files, and of tensors in all of them.
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    Attributes:
        type: how its elements are stored.
        shape: outermost axis first.
        stored: its elements; of block types, its bytes as uint8 [..., bytes of a row].
    """

    type: TensorType
    shape: Shape
    stored: LazyTensor


@dataclass(frozen=True)
class GgufModel:
    """The head of a model's file or files.

    Attributes:
        files: paths.
        metadata: of the first file.
        tensors: of all files, in order.
    """

    files: tuple[str, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor] = field(repr=False)


def split_name(stem: str, index: int, count: int) -> str:
    """Name of file ``index``, from 0, of a model that is stored in ``count`` files."""
    return f"{stem}.gguf" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.gguf"


def is_later_file(path: str) -> bool:
    """Whether a name is that of the second or a later file of a split model."""
    match = _SPLIT.fullmatch(os.path.basename(path))
    return match is not None and int(match[2]) > 1


def begins_as_gguf(path: str) -> bool:
    """Whether a regular file begins with the format's magic bytes."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: str | os.PathLike[str]) -> GgufModel:
    """Read the head of a model's file, and of all others if it is split; ``path`` is then the first file.

    Raises:
        InputError: a file is missing, damaged or not a GGUF file.
        UnsupportedError: the format's version, byte order or a tensor type is unknown.
        UnsafeInputError: a file is not a regular file, or one of several links out of the directory.
    """
    path = os.fspath(path)
    metadata, tensors = _read_file(path)
    count = metadata.get(SPLIT_COUNT, 1)
    if type(count) is not int or not 1 <= count <= MAX_FILES:
        raise InputError(
            "wrong value", path=path, item=SPLIT_COUNT, expected=f"1 to {MAX_FILES}", found=short_repr(count)
        )
    files = [path, *(_later_files(path, metadata, count) if count > 1 else ())]
    for index, other in enumerate(files[1:], 1):
        keys, more = _read_file(other)
        _check_number(keys, index, count, other)
        repeated = next((name for name in more if name in tensors), None)
        if repeated is not None:
            raise InputError("two files have a tensor of this name", path=other, item=repeated)
        tensors |= more
    total = metadata.get(SPLIT_TENSORS, len(tensors))
    if count > 1 and total != len(tensors):
        raise InputError(
            "the files do not have all tensors", path=path, expected=short_repr(total), found=len(tensors)
        )
    return GgufModel(tuple(files), metadata, tensors)


def _later_files(path: str, metadata: Mapping[str, Value], count: int) -> list[str]:
    """The paths of the other files of a split model.

    Raises:
        InputError: ``path`` is not the first file, or another is missing.
    """
    match = _SPLIT.fullmatch(os.path.basename(path))
    if match is None or int(match[3]) != count:
        expected = split_name("NAME", 0, count)
        raise InputError(
            f"the model is split into {count} files, but this is not the name of one of them",
            path=path,
            expected=expected,
            hint="give the files the names that they had",
        )
    _check_number(metadata, 0, count, path)
    return [file_beside(path, split_name(match[1], index, count), "a file of the model") for index in range(1, count)]


def _check_number(metadata: Mapping[str, Value], index: int, count: int, path: str) -> None:
    found = metadata.get(SPLIT_NUMBER), metadata.get(SPLIT_COUNT)
    if found != (index, count):
        first = "pass the first file, whose name ends in -00001-of-" if index == 0 else None
        raise InputError(
            "not the expected file of the split model",
            path=path,
            expected=f"{SPLIT_NUMBER} {index}, {SPLIT_COUNT} {count}",
            found=short_repr(found),
            hint=first and f"{first}{count:05d}.gguf",
        )


def _read_file(path: str) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            head = _Head(file, path, size)
            tensors, keys = head.begin()
            metadata = head.metadata(keys)
            entries = [head.entry() for _ in range(tensors)]
            return metadata, _placed(entries, head.position, _alignment(metadata, path), path, size)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error


class _Head:
    """Reads the head of a file from its start, within limits.

    Attributes:
        position: offset of the next byte.
    """

    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self.file, self.path, self.size = file, path, size
        self.position, self._elements = 0, 0

    def begin(self) -> tuple[int, int]:
        """Check magic and version; returns the number of tensors and of keys."""
        start = self._bytes(min(8, self.size))
        if start[:4] != MAGIC:
            explained = explain_file(self.path, {"gguf"})
            message = f"this file {explained}" if explained else "not a GGUF file"
            raise InputError(message, path=self.path, expected="a GGUF file", found=repr(start[:4]))
        version = int.from_bytes(start[4:].ljust(4, b"\0"), "little")
        if version not in VERSIONS:
            swapped = int.from_bytes(start[4:], "big") in VERSIONS
            raise UnsupportedError(
                "big-endian GGUF files are not supported" if swapped else "unknown version of GGUF",
                path=self.path,
                expected=f"version {' or '.join(map(str, VERSIONS))}",
                found=f"version {version}",
            )
        tensors, keys = self._number("Q"), self._number("Q")
        for count, most, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "metadata keys")):
            if count > most:
                raise InputError(f"too many {what}", path=self.path, expected=f"at most {most}", found=count)
        return tensors, keys

    def metadata(self, count: int) -> dict[str, Value]:
        """The metadata."""
        found: dict[str, Value] = {}
        for _ in range(count):
            key = self._text("a metadata key", MAX_NAME)
            if key in found:
                raise InputError("the metadata has a key twice", path=self.path, item=key)
            found[key] = self._value(self._number("I"), key)
        return found

    def entry(self) -> tuple[str, TensorType, Shape, int]:
        """One line of the table of tensors: name, type, shape, offset in the data."""
        name = self._text("a tensor's name", MAX_NAME)
        rank = self._number("I")
        if rank > MAX_RANK:
            raise InputError("too many axes", path=self.path, item=name, expected=f"at most {MAX_RANK}", found=rank)
        shape = tuple(self._number("Q") for _ in range(rank))[::-1]
        number, offset = self._number("I"), self._number("Q")
        if number not in _BY_NUMBER:
            known = ", ".join(sorted(row.name for row in _BY_NUMBER.values()))
            raise UnsupportedError("unknown tensor type", path=self.path, item=name, expected=known, found=number)
        return name, _BY_NUMBER[number], shape, offset

    def _value(self, number: int, key: str) -> Value:
        if number in SCALARS:
            return self._scalar(number, key)
        if number == STRING:
            return self._text(key, self.size)
        if number != ARRAY:
            raise InputError("unknown type of metadata", path=self.path, item=key, found=number)
        of, count = self._number("I"), self._number("Q")
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            expected = f"at most {MAX_ELEMENTS} elements in all arrays"
            raise InputError("too much metadata", path=self.path, item=key, expected=expected, found=count)
        if of == STRING:
            return [self._text(key, self.size) for _ in range(count)]
        if of not in SCALARS:
            raise InputError("unknown type of metadata in an array", path=self.path, item=key, found=of)
        dtype = np.dtype(SCALARS[of]).newbyteorder("<")
        if SCALARS[of] == "?":
            dtype = np.dtype(np.uint8)
        numbers: list[int] = np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()
        return [value != 0 for value in numbers] if SCALARS[of] == "?" else numbers

    def _scalar(self, number: int, key: str) -> Scalar:
        value: Scalar = self._number("B" if SCALARS[number] == "?" else SCALARS[number])
        return value != 0 if SCALARS[number] == "?" else value

    def _text(self, what: str, most: int) -> str:
        length = self._number("Q")
        if length > most:
            raise InputError(f"{what} is too long", path=self.path, expected=f"at most {most} bytes", found=length)
        data = self._bytes(length)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{what} is not UTF-8 text", path=self.path, found=short_repr(data)) from error

    def _number(self, code: str) -> int:
        value: int
        (value,) = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))
        return value

    def _bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > MAX_HEAD:
            raise InputError("too much metadata", path=self.path, expected=f"at most {MAX_HEAD} bytes", found=end)
        data = self.file.read(count) if end <= self.size else b""
        if len(data) < count:
            need = f"at least {end} bytes"
            raise InputError(
                "file is truncated", path=self.path, expected=need, found=f"{self.size} bytes", hint=FETCH_AGAIN
            )
        self.position = end
        return data


def _alignment(metadata: Mapping[str, Value], path: str) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise InputError(
            "wrong value",
            path=path,
            item="general.alignment",
            expected=f"a power of two up to {MAX_ALIGNMENT}",
            found=short_repr(value),
        )
    return value


def _placed(
    entries: Sequence[tuple[str, TensorType, Shape, int]], head: int, alignment: int, path: str, size: int
) -> dict[str, GgufTensor]:
    """The tensors, checked to be stored one after the other, each aligned."""
    start, position = head + -head % alignment, 0
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in entries:
        if name in tensors:
            raise InputError("two tensors have this name", path=path, item=name)
        nbytes = _nbytes(name, kind, shape, path)
        if offset != position:
            raise InputError(
                "tensor is not where the one before it ends", path=path, item=name, expected=position, found=offset
            )
        if start + offset + nbytes > size:
            need = f"{start + offset + nbytes} bytes"
            raise InputError("file is truncated", path=path, item=name, expected=need, found=f"{size} bytes")
        parts = (Segment(path, start + offset, nbytes),) if nbytes else ()
        dtype, width = kind.dtype or np.dtype(np.uint8), shape
        if kind.dtype is None:
            width = (*shape[:-1], shape[-1] // kind.block * kind.nbytes) if shape else (kind.nbytes,)
        tensors[name] = GgufTensor(kind, shape, Stored(parts, dtype, width))
        position = offset + nbytes + -nbytes % alignment
    if entries and size > start + position:
        raise InputError(
            f"{size - start - position} bytes follow the last tensor",
            path=path,
            expected=f"{start + position} bytes",
            found=f"{size} bytes",
        )
    return tensors


def _nbytes(name: str, kind: TensorType, shape: Shape, path: str) -> int:
    if (shape[-1] if shape else 1) % kind.block:
        expected = f"rows of a multiple of {kind.block} elements, as {kind.name} needs"
        raise InputError("wrong shape", path=path, item=name, expected=expected, found=str(list(shape)))
    count = 1
    for factor in (*shape, kind.nbytes):
        count *= factor
        if count >= MAX_SIZE:
            raise InputError("size overflows 63 bits", path=path, item=name, found=str(list(shape)))
    return count // kind.block


def head_bytes(
    metadata: Mapping[str, Value | tuple[int, int]], tensors: Iterable[tuple[str, TensorType, Shape, int]]
) -> bytes:
    """The bytes before the data of a file, padded to the alignment.

    Args:
        metadata: key → value; a pair of (type number, integer) for integers of another type than uint32.
        tensors: name, type, shape and offset in the data, in the order of the data.
    """
    entries = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    for name, kind, shape, offset in entries:
        parts += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])]
        parts.append(struct.pack("<IQ", kind.number, offset))
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value | tuple[int, int]) -> bytes:
    if isinstance(value, tuple):
        number, integer = value
        return struct.pack(f"<I{SCALARS[number]}", number, integer)
    if not isinstance(value, list):
        return struct.pack("<I", WRITTEN[type(value)]) + _element(value)
    of = INT32 if value and type(value[0]) is int else WRITTEN[type(value[0])] if value else STRING
    head = struct.pack("<IIQ", ARRAY, of, len(value))
    if of == INT32:
        return head + np.asarray(value, "<i4").tobytes()
    return head + b"".join(map(_element, value))


def _element(value: Scalar) -> bytes:
    return _text(value) if isinstance(value, str) else struct.pack(f"<{SCALARS[WRITTEN[type(value)]]}", value)
