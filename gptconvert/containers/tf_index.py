"""The index of a TensorFlow checkpoint of version 2, ``PREFIX.index``, which names what the data files hold.

A sorted table: the empty key has the header, every other key is a tensor's name and has its entry (type, shape,
shard, offset, size, checksum). A partitioned variable has an entry without bytes under its name, and one for each
piece under a key that begins with a zero byte. :func:`index_bytes` writes what TensorFlow's own Saver does, byte for
byte.

Sources: tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/util/tensor_bundle, and for the keys of
pieces tensorflow/core/lib/strings/ordered_code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gptconvert.containers.crc import mask, unmask
from gptconvert.containers.leveldb import read_table, write_table
from gptconvert.containers.protobuf import (
    MalformedError,
    Message,
    bytes_field,
    fixed32_field,
    integer_field,
)
from gptconvert.containers.untrusted import explain_file, read_small
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.dtypes import ELEMENT_TYPES
from gptconvert.model.tensors import Shape

#: tensorflow.DataType → numpy type, and the way back.
DTYPES: Mapping[int, np.dtype[np.generic]] = {
    row.tensorflow: row.dtype for row in ELEMENT_TYPES if row.tensorflow is not None
}
DATA_TYPES: Mapping[np.dtype[np.generic], int] = {dtype: number for number, dtype in DTYPES.items()}
DT_STRING = 7
#: tensorflow.DataType of what is not an array of numbers, in words.
NOT_NUMERIC: Mapping[int, str] = {DT_STRING: "strings", 20: "a resource handle", 21: "a variant"}

#: An index of 580 tensors has 20 KB; one of a million would have 40 MB.
MAX_INDEX_BYTES = 64 << 20
#: numpy's own limits.
MAX_RANK, MAX_ELEMENTS = 64, 1 << 58
#: Bundle format version that is read and written (``kTensorBundleVersion``).
VERSION = 1
#: Length of an extent that takes the whole axis.
WHOLE = -1
#: What to do about an index or a data file that is damaged or cut off.
COPY_AGAIN = "copy or download the checkpoint again"

Extent = tuple[int, int]
Extents = tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One BundleEntryProto.

    Attributes:
        data_type: tensorflow.DataType.
        shape: of the tensor, or of the whole variable where ``slices`` says that it is stored in pieces.
        offset: of the first byte in the data file.
        nbytes: stored bytes.
        crc32c: of these bytes, unmasked.
        shard: number of the data file.
        slices: (start, length) per axis of every piece, as written: a length may be :data:`WHOLE`. Empty for a
            tensor stored whole.
    """

    data_type: int
    shape: Shape
    offset: int
    nbytes: int
    crc32c: int
    shard: int = 0
    slices: tuple[Extents, ...] = ()


@dataclass(frozen=True)
class Index:
    """An index, read and checked; the data files have not been looked at.

    Attributes:
        prefix: path without ``.index``.
        shards: number of data files.
        big_endian: byte order of the data.
        tensors: tensor name → entry, by ascending name.
        pieces: table key of a piece of a partitioned variable → entry.
    """

    prefix: str
    shards: int
    big_endian: bool
    tensors: Mapping[str, Entry]
    pieces: Mapping[bytes, Entry]

    def shard_path(self, number: int) -> str:
        """The data file of that number."""
        return f"{self.prefix}.data-{number:05d}-of-{self.shards:05d}"

    @property
    def path(self) -> str:
        """The index file."""
        return self.prefix + ".index"


def read_index(prefix: str) -> Index:
    """The index of the checkpoint ``prefix``, every block's checksum compared.

    Raises:
        InputError: missing, truncated, damaged, or something else altogether.
        UnsupportedError: a later bundle version.
        UnsafeInputError: not a regular file.
    """
    path = prefix + ".index"
    data = read_small(path, MAX_INDEX_BYTES, "a checkpoint index")
    try:
        table = dict(read_table(data))
        if b"" not in table:
            raise MalformedError("has no header")
        shards, big_endian = _header(table.pop(b""), path)
        parsed = {key: _entry(key, value, shards) for key, value in table.items()}
        named = {key.decode("utf-8"): entry for key, entry in parsed.items() if not key.startswith(b"\x00")}
    except UnicodeDecodeError as error:
        raise InputError("the index holds a tensor name that is not UTF-8", path=path) from error
    except MalformedError as error:
        explained = explain_file(path)
        raise InputError(
            f"this file {explained}" if explained else f"the index {error}",
            path=path,
            expected="the index of a TensorFlow checkpoint" if explained else None,
            hint=COPY_AGAIN,
        ) from error
    pieces = {key: entry for key, entry in parsed.items() if key.startswith(b"\x00")}
    return Index(prefix, shards, big_endian, named, pieces)


def _header(value: bytes, path: str) -> tuple[int, bool]:
    """Number of shards and whether the data are big-endian, from a BundleHeaderProto."""
    header = Message(value)
    shards, endianness = header.integer(1), header.integer(2)
    required = header.message(3).integer(2)
    if required > VERSION:
        raise UnsupportedError(
            f"the checkpoint asks for a reader of bundle version {required}", path=path, expected=VERSION
        )
    if not 0 < shards < 100_000:
        raise MalformedError(f"says that there are {shards} data files")
    if endianness not in (0, 1):
        raise MalformedError(f"says byte order {endianness}")
    return shards, endianness == 1


def _entry(key: bytes, value: bytes, shards: int) -> Entry:
    """One entry from its BundleEntryProto."""
    name = repr(key)[2:82]
    try:
        message = Message(value)
        shape = _shape(message.raw(2))
        entry = Entry(
            data_type=message.integer(1),
            shape=shape,
            offset=message.integer(4),
            nbytes=message.integer(5),
            crc32c=unmask(message.integer(6) & 0xFFFFFFFF),
            shard=message.integer(3),
            slices=tuple(_extents(piece) for piece in message.messages(7)),
        )
    except MalformedError as error:
        raise MalformedError(f"has a damaged entry for {name}, which {error}") from error
    if not 0 <= entry.shard < shards:
        raise MalformedError(f"puts {name} into data file {entry.shard} of {shards}")
    if entry.offset < 0 or entry.nbytes < 0:
        raise MalformedError(f"puts {name} at offset {entry.offset} with {entry.nbytes} bytes")
    return entry


@lru_cache(maxsize=1024)  # a GPT's tensors have some ten shapes
def _shape(raw: bytes) -> Shape:
    """A TensorShapeProto's sizes."""
    message = Message(raw)
    shape = tuple(size.integer(1) for size in message.messages(2))
    definite = not message.integer(3) and all(size >= 0 for size in shape)
    if not definite or len(shape) > MAX_RANK or math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise MalformedError(f"has no shape that a tensor can have: {str(list(shape))[:80]}")
    return shape


def _extents(message: Message) -> Extents:
    """A TensorSliceProto's (start, length) per axis."""
    return tuple((extent.integer(1), extent.integer(2, WHOLE)) for extent in message.messages(1))


def index_bytes(tensors: Mapping[str, Entry], shards: int = 1, pieces: Mapping[bytes, Entry] | None = None) -> bytes:
    """A whole ``.index`` file, the bytes described as little-endian.

    Args:
        tensors: tensor name → entry.
        shards: number of data files.
        pieces: :func:`piece_key` of a piece of a partitioned variable → entry.
    """
    version = integer_field(1, VERSION)  # the producer's; the least version of a reader is 0
    rows = {b"": integer_field(1, shards) + bytes_field(3, version)}
    rows |= {name.encode(): _entry_bytes(entry) for name, entry in tensors.items()}
    rows |= {key: _entry_bytes(entry) for key, entry in (pieces or {}).items()}
    return write_table(sorted(rows.items()))


def _entry_bytes(entry: Entry) -> bytes:
    """One entry as a BundleEntryProto."""
    sizes = b"".join(bytes_field(2, integer_field(1, size)) for size in entry.shape)
    fields = (
        integer_field(1, entry.data_type),
        bytes_field(2, sizes),
        integer_field(3, entry.shard),
        integer_field(4, entry.offset),
        integer_field(5, entry.nbytes),
        # A variable in pieces has no bytes of its own, and so no checksum.
        b"" if entry.slices else fixed32_field(6, mask(entry.crc32c)),
        *(bytes_field(7, _extents_bytes(extents)) for extents in entry.slices),
    )
    return b"".join(fields)


def _extents_bytes(extents: Extents) -> bytes:
    """(start, length) per axis as a TensorSliceProto."""
    return b"".join(bytes_field(1, _extent_bytes(*extent)) for extent in extents)


def _extent_bytes(start: int, length: int) -> bytes:
    """One axis's extent, where the length, unlike other numbers, is written even if it is 0."""
    return integer_field(1, start) + (b"" if length == WHOLE else integer_field(2, length, keep_zero=True))


def piece_key(name: str, extents: Extents) -> bytes:
    """The table key of one piece of a partitioned variable, in TensorFlow's order-preserving code."""
    text = name.encode("utf-8").replace(b"\xff", b"\xff\x00").replace(b"\x00", b"\x00\xff")
    key = b"\x00" + text + b"\x00\x01" + bytes([1, len(extents)])
    return key + b"".join(_ordered(number) for extent in extents for number in extent)


def _ordered(value: int) -> bytes:
    """A signed number whose encodings sort bytewise as the numbers do.

    n bytes carry n leading one bits, a zero bit and 7n - 1 bits of value; of a negative number all are inverted.
    """
    magnitude = ~value if value < 0 else value
    width = magnitude.bit_length() // 7 + 1
    total = 8 * width
    coded = (((1 << width) - 1) << (total - width)) | magnitude
    return (coded ^ ((1 << total) - 1) if value < 0 else coded).to_bytes(width, "big")
