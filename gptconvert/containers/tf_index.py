"""The index of a version 2 TensorFlow checkpoint, ``PREFIX.index``, which describes the tensors in the data files.

It is a sorted table: the empty key maps to the header, and every other key is a tensor's name that maps to its entry
(type, shape, shard, offset, size, checksum). A partitioned variable has an entry without bytes under its name, and
one for each piece under a key that begins with a zero byte. :func:`index_bytes` reproduces the output of TensorFlow's
Saver byte for byte.

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

#: tensorflow.DataType → numpy type, and the inverse.
DTYPES: Mapping[int, np.dtype[np.generic]] = {
    row.tensorflow: row.dtype for row in ELEMENT_TYPES if row.tensorflow is not None
}
DATA_TYPES: Mapping[np.dtype[np.generic], int] = {dtype: number for number, dtype in DTYPES.items()}
DT_STRING = 7
#: tensorflow.DataType → description, for types that are not arrays of numbers.
NOT_NUMERIC: Mapping[int, str] = {DT_STRING: "strings", 20: "a resource handle", 21: "a variant"}

#: An index of 580 tensors takes 20 KB; one of a million would take 40 MB.
MAX_INDEX_BYTES = 64 << 20
#: numpy's own limits.
MAX_RANK, MAX_ELEMENTS = 64, 1 << 58
#: Bundle format version that is read and written (``kTensorBundleVersion``).
VERSION = 1
#: Length of an extent that covers the whole axis.
WHOLE = -1
#: Hint for an index or data file that is damaged or truncated.
COPY_AGAIN = "copy or download the checkpoint again"

Extent = tuple[int, int]
Extents = tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One BundleEntryProto.

    Attributes:
        data_type: tensorflow.DataType.
        shape: of the tensor, or of the whole variable if it is stored in pieces.
        offset: of the first byte in the data file.
        nbytes: stored bytes.
        crc32c: of these bytes, unmasked.
        shard: number of the data file.
        slices: (start, length) per axis of every piece, as stored: a length may be :data:`WHOLE`. Empty for a
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
    """A parsed and checked index. The data files are not checked yet.

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
        """Path of the data file ``number``."""
        return f"{self.prefix}.data-{number:05d}-of-{self.shards:05d}"

    @property
    def path(self) -> str:
        """Path of the index file."""
        return self.prefix + ".index"


def read_index(prefix: str) -> Index:
    """The index of the checkpoint ``prefix``. The checksum of every block is verified.

    Raises:
        InputError: missing, truncated, damaged, or not an index.
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
    required, refused = header.message(3).integer(2), header.message(3).integers(3)
    if VERSION in refused:
        raise UnsupportedError(
            "the checkpoint excludes readers of this bundle version", path=path, expected="another", found=VERSION
        )
    if required > VERSION:
        raise UnsupportedError(
            f"the checkpoint requires a reader of bundle version {required}", path=path, expected=VERSION
        )
    if not 0 < shards < 100_000:
        raise MalformedError(f"declares {shards} data files")
    if endianness not in (0, 1):
        raise MalformedError(f"declares byte order {endianness}")
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
        raise MalformedError(f"places {name} in data file {entry.shard} of {shards}")
    if entry.offset < 0 or entry.nbytes < 0:
        raise MalformedError(f"places {name} at offset {entry.offset} with {entry.nbytes} bytes")
    return entry


@lru_cache(maxsize=1024)  # a GPT's tensors have about ten different shapes
def _shape(raw: bytes) -> Shape:
    """A TensorShapeProto's sizes."""
    message = Message(raw)
    shape = tuple(size.integer(1) for size in message.messages(2))
    definite = not message.integer(3) and all(size >= 0 for size in shape)
    if not definite or len(shape) > MAX_RANK or math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise MalformedError(f"has an impossible shape: {str(list(shape))[:80]}")
    return shape


def _extents(message: Message) -> Extents:
    """A TensorSliceProto's (start, length) per axis."""
    return tuple((extent.integer(1), extent.integer(2, WHOLE)) for extent in message.messages(1))


def index_bytes(tensors: Mapping[str, Entry], shards: int = 1, pieces: Mapping[bytes, Entry] | None = None) -> bytes:
    """A complete ``.index`` file for little-endian data.

    Args:
        tensors: tensor name → entry.
        shards: number of data files.
        pieces: :func:`piece_key` of a piece of a partitioned variable → entry.
    """
    version = integer_field(1, VERSION)  # the producer's; the minimum reader version stays 0
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
        # A partitioned variable has no bytes of its own, and so no checksum.
        b"" if entry.slices else fixed32_field(6, mask(entry.crc32c)),
        *(bytes_field(7, _extents_bytes(extents)) for extents in entry.slices),
    )
    return b"".join(fields)


def _extents_bytes(extents: Extents) -> bytes:
    """(start, length) per axis as a TensorSliceProto."""
    return b"".join(bytes_field(1, _extent_bytes(*extent)) for extent in extents)


def _extent_bytes(start: int, length: int) -> bytes:
    """One axis's extent. Unlike other numbers, a length of 0 is written."""
    return integer_field(1, start) + (b"" if length == WHOLE else integer_field(2, length, keep_zero=True))


def piece_key(name: str, extents: Extents) -> bytes:
    """The table key of one piece of a partitioned variable, in TensorFlow's order-preserving encoding."""
    text = name.encode("utf-8").replace(b"\xff", b"\xff\x00").replace(b"\x00", b"\x00\xff")
    key = b"\x00" + text + b"\x00\x01" + bytes([1, len(extents)])
    return key + b"".join(_ordered(number) for extent in extents for number in extent)


def _ordered(value: int) -> bytes:
    """A signed integer, encoded so that encodings sort bytewise in the order of the integers.

    n bytes hold n one bits, a zero bit and 7n - 1 bits of value; all bits are inverted for a negative integer.
    """
    magnitude = ~value if value < 0 else value
    width = magnitude.bit_length() // 7 + 1
    total = 8 * width
    coded = (((1 << width) - 1) << (total - width)) | magnitude
    return (coded ^ ((1 << total) - 1) if value < 0 else coded).to_bytes(width, "big")
