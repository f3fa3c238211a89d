"""LevelDB's sorted tables, the format of a TensorFlow checkpoint's index: reader and writer.

A file is a sequence of blocks and a 48-byte footer with the address of the index block. Each block is followed by its
compression type (1 byte) and masked CRC-32C (4 bytes, over the block and the type).

Time and memory are bounded: overlapping blocks are refused, and so are too many entries, keys whose shared prefixes
expand too far, and compressed blocks that do.

Sources: LevelDB ``doc/table_format.md``; tensorflow/core/lib/io/table_builder, whose files :func:`write_table`
reproduces byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from gptconvert.containers import snappy
from gptconvert.containers.crc import crc32c, mask, unmask
from gptconvert.containers.protobuf import MalformedError, read_varint, varint

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
FOOTER_BYTES = 48
_TRAILER_BYTES = 5
_UNCOMPRESSED, _SNAPPY = 0, 1
#: Maximum total size of the expanded keys, in multiples of the file size. Writers store a full key at least every 16
#: entries, so a valid file stays below a quarter of it.
MAX_EXPANSION = 64
#: Maximum total size of the expanded keys, and of the decompressed blocks, in bytes; and number of entries. An index
#: of 100 000 tensors takes about 10 MB.
MAX_KEYS, MAX_BLOCKS, MAX_ENTRIES = 64 << 20, 64 << 20, 100_000
#: TensorFlow's settings: bytes of keys and values at which a block ends, and entries per full key.
BLOCK_BYTES = 262_144
RESTART_INTERVAL = 16

Row = tuple[bytes, bytes]


def read_table(data: bytes) -> Iterator[Row]:
    """(key, value) pairs of a whole table file, by ascending key.

    Raises:
        MalformedError: wrong magic number, an address outside the file, a checksum mismatch, or malformed entries.
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
    """One table file, the number of bytes by which its keys may still expand, and its further budgets."""

    def __init__(self, data: bytes) -> None:
        self.data, self.budget = data, min(MAX_EXPANSION * len(data), MAX_KEYS)
        self.blocks, self.entries_left, self.elements = MAX_BLOCKS, MAX_ENTRIES, snappy.Elements()

    def index(self) -> tuple[int, int]:
        """Offset and size of the index block, which lists the addresses of the data blocks."""
        if len(self.data) < FOOTER_BYTES:
            raise MalformedError(f"is truncated: {len(self.data)} bytes are less than a {FOOTER_BYTES}-byte footer")
        if not self.data.endswith(MAGIC):
            raise MalformedError(
                "is truncated, or not a checkpoint index: it does not end with the table's magic number"
            )
        footer = self.data[-FOOTER_BYTES:]
        meta, at = _handle(footer, 0)
        self.block(*meta)  # empty; read only to verify its checksum
        return _handle(footer, at)[0]

    def block(self, offset: int, size: int) -> bytes:
        """One block, verified against its checksum and decompressed."""
        data, end = self.data, offset + size
        if end + _TRAILER_BYTES > len(data) - FOOTER_BYTES:
            raise MalformedError(
                f"is truncated: a block of {size} bytes at {offset} does not fit in {len(data)} bytes"
            )
        kind, masked = struct.unpack_from("<BI", data, end)
        if crc32c(data[offset : end + 1]) != unmask(masked):
            raise MalformedError(f"is damaged: checksum mismatch in the block of {size} bytes at {offset}")
        if kind not in (_UNCOMPRESSED, _SNAPPY):
            raise MalformedError(f"has a block of unknown compression type {kind}")
        if kind == _UNCOMPRESSED:
            return data[offset:end]
        block = snappy.decompress(data[offset:end], self.blocks, self.elements)
        self.blocks -= len(block)
        return block

    def entries(self, offset: int, size: int) -> Iterator[Row]:
        """(key, value) pairs of one block. Restart points are for binary search and not needed here."""
        block = self.block(offset, size)
        if len(block) < 4:
            raise MalformedError("has a block without a restart count")
        (restarts,) = struct.unpack_from("<I", block, len(block) - 4)
        end = len(block) - 4 * (restarts + 1)
        if end < 0:
            raise MalformedError(f"has a block of {len(block)} bytes with {restarts} restart points")
        at, key = 0, b""
        while at < end:
            shared, at = read_varint(block, at, 32)
            unshared, at = read_varint(block, at, 32)
            length, at = read_varint(block, at, 32)
            if shared > len(key) or at + unshared + length > end:
                raise MalformedError("has an entry that extends past its block")
            self.budget -= shared + unshared
            if self.budget < 0:
                raise MalformedError(
                    f"has keys that expand to more than {MAX_EXPANSION} times the file size, or {MAX_KEYS} bytes"
                )
            self.entries_left -= 1
            if self.entries_left < 0:
                raise MalformedError(f"has more than {MAX_ENTRIES} entries")
            key = key[:shared] + block[at : at + unshared]
            at += unshared
            yield key, block[at : at + length]
            at += length


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """A block handle (offset, size), and the position after it."""
    offset, at = read_varint(data, at)
    size, at = read_varint(data, at)
    return (offset, size), at


def write_table(rows: Sequence[Row], block_bytes: int = BLOCK_BYTES) -> bytes:
    """An uncompressed table file of ``rows``.

    Args:
        rows: (key, value) pairs, sorted by key, without duplicates.
        block_bytes: a block ends with the row that brings its keys and values to this size.
    """
    table, index = bytearray(), list[Row]()
    for run in _runs(rows, block_bytes):
        index.append((run[-1][0], _append_block(table, _block(run, RESTART_INTERVAL))))
    if index:  # the last block may be listed under any key that sorts after it; TensorFlow takes the shortest
        index[-1] = (_short_successor(index[-1][0]), index[-1][1])
    metaindex = _append_block(table, _block([], RESTART_INTERVAL))
    root = _append_block(table, _block(index, 1))
    return bytes(table) + (metaindex + root).ljust(FOOTER_BYTES - len(MAGIC), b"\0") + MAGIC


def _runs(rows: Sequence[Row], block_bytes: int) -> Iterator[list[Row]]:
    """Rows grouped into runs of at least ``block_bytes``; the last may be smaller."""
    run, size = list[Row](), 0
    for row in rows:
        run.append(row)
        size += len(row[0]) + len(row[1])
        if size >= block_bytes:
            yield run
            run, size = [], 0
    if run:
        yield run


def _block(rows: Sequence[Row], restart_interval: int) -> bytes:
    """Prefix-compressed rows, then the offsets of the rows with a full key (restart points)."""
    out, restarts, previous = bytearray(), [0], b""
    for number, (key, value) in enumerate(rows):
        shared = 0
        if number % restart_interval:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        elif number:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def _append_block(table: bytearray, block: bytes) -> bytes:
    """Append a block and its trailer, and return its handle (offset, size)."""
    handle = varint(len(table)) + varint(len(block))
    typed = block + bytes([_UNCOMPRESSED])
    table += typed + struct.pack("<I", mask(crc32c(typed)))
    return handle


def _short_successor(key: bytes) -> bytes:
    """The shortest key that sorts after ``key``, or ``key`` itself if every byte is 0xFF."""
    for i, byte in enumerate(key):
        if byte != 0xFF:
            return key[:i] + bytes([byte + 1])
    return key
