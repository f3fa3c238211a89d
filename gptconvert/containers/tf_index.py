"""The index of a TensorFlow checkpoint of version 2: ``PREFIX.index``, which names what the data files hold.

A sorted table: key "" holds the header, every other key a tensor's name and its entry (type, shape, shard, offset,
size, checksum). A partitioned variable has an entry without bytes under its name, and one for each piece under a
key that begins with a zero byte.

Sources: tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/util/tensor_bundle, and for the keys of
pieces tensorflow/core/lib/strings/ordered_code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from gptconvert.containers.crc import unmask
from gptconvert.containers.leveldb import entries
from gptconvert.containers.protobuf import MalformedError, Message
from gptconvert.containers.untrusted import explain_file, read_small
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.tensors import Shape

#: An index of 580 tensors has 20 KB; one of a million would have 40 MB.
MAX_INDEX_BYTES = 64 << 20
#: numpy's own limits.
MAX_RANK, MAX_ELEMENTS = 64, 1 << 58
#: Bundle format version this reader knows (``kTensorBundleVersion``).
VERSION = 1
#: Length of an extent that takes the whole axis.
WHOLE = -1

Extent = tuple[int, int]
Extents = tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One BundleEntryProto.

    Attributes:
        dtype: tensorflow.DataType.
        shape: of the tensor, or of the whole variable where ``slices`` says that it is stored in pieces.
        shard: number of the data file.
        offset: of the first byte in the data file.
        nbytes: stored bytes.
        crc32c: of these bytes, unmasked.
        slices: (start, length) per axis of every piece, as written: a length may be :data:`WHOLE`. Empty for a
            tensor stored whole.
    """

    dtype: int
    shape: Shape
    shard: int
    offset: int
    nbytes: int
    crc32c: int
    slices: tuple[Extents, ...]


@dataclass(frozen=True)
class Index:
    """An index, read and checked; no data file looked at yet.

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
        table = dict(entries(data))
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
            hint="copy or download the checkpoint again",
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
            dtype=message.integer(1),
            shape=shape,
            shard=message.integer(3),
            offset=message.integer(4),
            nbytes=message.integer(5),
            crc32c=unmask(message.integer(6) & 0xFFFFFFFF),
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
        raise MalformedError(f"has no shape a tensor can have: {str(list(shape))[:80]}")
    return shape


def _extents(message: Message) -> Extents:
    """A TensorSliceProto's (start, length) per axis."""
    return tuple((extent.integer(1), extent.integer(2, WHOLE)) for extent in message.messages(1))


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
