"""The sorted table (LevelDB's file format) in which TensorFlow keeps a checkpoint's index.

Source: LevelDB ``doc/table_format.md``. A file is blocks, then a footer of 48 bytes that says where the block of
block addresses lies. Each block is followed by its compression type (1 byte) and masked CRC-32C (4 bytes, over the
block and the type). Work and memory stay proportional to the file: blocks may not overlap, and keys, which share
prefixes, may not expand without bound.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from gptconvert.containers.crc import crc32c, unmask
from gptconvert.containers.protobuf import MalformedError, varint

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
FOOTER_BYTES = 48
_TRAILER_BYTES = 5
_UNCOMPRESSED, _SNAPPY = 0, 1
#: Keys, written out in full, may be this many times the file. Writers repeat a key in full at least every 16
#: entries, so an honest file stays below a quarter of it.
MAX_EXPANSION = 64


def entries(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) pairs of a whole table file, by ascending key.

    Raises:
        MalformedError: wrong magic number, an address outside the file, a checksum that does not match, or a
            block whose entries do not add up.
    """
    table, last, end = _Table(data), None, 0
    for _, address in table.entries(*table.index()):
        (offset, size), _ = _handle(address, 0)
        if offset < end:
            raise MalformedError("has blocks that overlap or are out of order")
        end = offset + size + _TRAILER_BYTES
        for key, value in table.entries(offset, size):
            if last is not None and key <= last:
                raise MalformedError(f"has keys out of order: {key[:80]!r} after {last[:80]!r}")
            yield key, value
            last = key


class _Table:
    """One table file, and how far its keys may still expand."""

    def __init__(self, data: bytes) -> None:
        self.data, self.budget = data, MAX_EXPANSION * len(data)

    def index(self) -> tuple[int, int]:
        """Offset and size of the block of block addresses."""
        if len(self.data) < FOOTER_BYTES:
            raise MalformedError(f"is truncated: {len(self.data)} bytes, and its footer alone has {FOOTER_BYTES}")
        if not self.data.endswith(MAGIC):
            raise MalformedError("is truncated, or no checkpoint index: it does not end in the table's magic number")
        footer = self.data[-FOOTER_BYTES:]
        meta, at = _handle(footer, 0)
        self.block(*meta)  # holds nothing; read for its checksum
        return _handle(footer, at)[0]

    def block(self, offset: int, size: int) -> bytes:
        """One block, its checksum checked, decompressed."""
        data, end = self.data, offset + size
        if end + _TRAILER_BYTES > len(data) - FOOTER_BYTES:
            raise MalformedError(
                f"is truncated: a block of {size} bytes at {offset} does not fit into {len(data)} bytes"
            )
        kind, masked = struct.unpack_from("<BI", data, end)
        if crc32c(data[offset : end + 1]) != unmask(masked):
            raise MalformedError(f"is damaged: checksum mismatch in the block of {size} bytes at {offset}")
        if kind not in (_UNCOMPRESSED, _SNAPPY):
            raise MalformedError(f"has a block of unknown compression type {kind}")
        return unsnappy(data[offset:end]) if kind == _SNAPPY else data[offset:end]

    def entries(self, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) pairs of one block. Its restart points serve binary search; in sequence none is needed."""
        block = self.block(offset, size)
        if len(block) < 4:
            raise MalformedError("has a block without a restart count")
        (restarts,) = struct.unpack_from("<I", block, len(block) - 4)
        end = len(block) - 4 * (restarts + 1)
        if end < 0:
            raise MalformedError(f"has a block of {len(block)} bytes with {restarts} restart points")
        at, key = 0, b""
        while at < end:
            shared, at = varint(block, at, 32)
            unshared, at = varint(block, at, 32)
            length, at = varint(block, at, 32)
            if shared > len(key) or at + unshared + length > end:
                raise MalformedError("has an entry that leaves its block")
            self.budget -= shared + unshared
            if self.budget < 0:
                raise MalformedError(f"has keys that expand to more than {MAX_EXPANSION} times the file")
            key = key[:shared] + block[at : at + unshared]
            at += unshared
            yield key, block[at : at + length]
            at += length


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """A block's (offset, size), and the position after it."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def unsnappy(data: bytes) -> bytes:
    """Decompress one raw Snappy block (google/snappy ``format_description.txt``).

    A run of elements: literals, and copies of 1 to 64 bytes from earlier output, so at most some 30 times the
    input. The length in front is compared, never allocated.

    Raises:
        MalformedError: cut off, a copy from before the start, or a length other than promised.
    """
    length, at = varint(data, 0, 32)
    output = bytearray()
    while at < len(data):
        tag, at = data[at], at + 1
        if tag & 3 == 0:
            count, at = _literal_length(data, at, tag >> 2)
            if at + count > len(data):
                raise MalformedError("has a compressed block that ends inside a literal")
            output += data[at : at + count]
            at += count
        else:
            count, back, at = _copy(data, at, tag)
            if not 0 < back <= len(output):
                raise MalformedError("has a compressed block that copies from before its start")
            start = len(output) - back
            piece = output[start : start + count]  # shorter than count where the copy overlaps what it writes
            output += (piece * (count // len(piece) + 1))[:count]
    if len(output) != length:
        raise MalformedError(f"has a compressed block that promises {length} bytes and holds another number")
    return bytes(output)


def _literal_length(data: bytes, at: int, code: int) -> tuple[int, int]:
    """Length of a literal: in the tag itself, or in the 1 to 4 bytes after it."""
    if code < 60:
        return code + 1, at
    more = code - 59
    return _little_endian(data, at, more) + 1, at + more


def _copy(data: bytes, at: int, tag: int) -> tuple[int, int, int]:
    """Length and distance of a copy, and the position after it."""
    if tag & 3 == 1:  # 4 to 11 bytes, distance of 11 bits
        return 4 + (tag >> 2 & 7), (tag >> 5) << 8 | _little_endian(data, at, 1), at + 1
    width = 2 if tag & 3 == 2 else 4
    return 1 + (tag >> 2), _little_endian(data, at, width), at + width


def _little_endian(data: bytes, at: int, width: int) -> int:
    if at + width > len(data):
        raise MalformedError("has a compressed block that ends inside an element")
    return int.from_bytes(data[at : at + width], "little")
