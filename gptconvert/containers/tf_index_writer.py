"""The ``.index`` file of a TensorFlow checkpoint V2: names, shapes and checksums of a bundle's tensors.

Layout (tensorflow/core/util/tensor_bundle, tensorflow/core/lib/io/table_builder): a LevelDB-style sorted table of
prefix-compressed keys, uncompressed blocks with masked CRC32C trailers, and a 48-byte footer. Values are
BundleEntryProto messages in proto3, where zero fields are left out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptconvert.containers.varint import varint
from gptconvert.model.tensors import BFLOAT16, Shape

MAGIC = 0xDB4775248B80FB57
BLOCK_BYTES = 262_144
RESTART_INTERVAL = 16
#: numpy type → tensorflow.DataType.
DATA_TYPES: dict[np.dtype[np.generic], int] = {
    np.dtype(np.float32): 1,
    np.dtype(np.float64): 2,
    np.dtype(np.int32): 3,
    np.dtype(np.int64): 9,
    BFLOAT16: 14,
    np.dtype(np.float16): 19,
}
DT_STRING = 7


@dataclass(frozen=True)
class Entry:
    """One tensor of a bundle: ``crc32c`` is of its raw bytes, unmasked."""

    name: str
    data_type: int
    shape: Shape
    offset: int
    nbytes: int
    crc32c: int
    shard: int = 0


def bundle_index(entries: Iterable[Entry], shards: int = 1) -> bytes:
    """The whole ``.index`` file."""
    header = _field(1, shards) + _message(3, _field(1, 1))  # num_shards, version {producer: 1}
    rows = [(b"", header), *sorted((e.name.encode(), _entry(e)) for e in entries)]
    table, index = bytearray(), []
    for block_rows in _blocks(rows):
        handle = _append_block(table, _block(block_rows, RESTART_INTERVAL))
        index.append((block_rows[-1][0], handle))
    # The last block's key may be any that sorts after it; TensorFlow takes the shortest.
    index[-1] = (_short_successor(index[-1][0]), index[-1][1])
    metaindex = _append_block(table, _block([], RESTART_INTERVAL))
    root = _append_block(table, _block(index, 1))
    return bytes(table) + (metaindex + root).ljust(40, b"\0") + struct.pack("<Q", MAGIC)


def masked(crc: int) -> int:
    """The form in which LevelDB-style files store a CRC32C."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _entry(entry: Entry) -> bytes:
    dims = b"".join(_message(2, _field(1, size)) for size in entry.shape)
    parts = (
        _field(1, entry.data_type),
        _message(2, dims),
        _field(3, entry.shard),
        _field(4, entry.offset),
        _field(5, entry.nbytes),
        varint(6 << 3 | 5) + struct.pack("<I", masked(entry.crc32c)),
    )
    return b"".join(parts)


def _blocks(rows: Sequence[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Rows in runs whose block grows just past the target size."""
    run: list[tuple[bytes, bytes]] = []
    for row in rows:
        run.append(row)
        if _size(run) >= BLOCK_BYTES:
            yield run
            run = []
    if run:
        yield run


def _size(rows: Sequence[tuple[bytes, bytes]]) -> int:
    return sum(len(key) + len(value) for key, value in rows)


def _block(rows: Sequence[tuple[bytes, bytes]], restart_interval: int) -> bytes:
    """Prefix-compressed rows, then the offsets at which compression starts anew."""
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
    """Append block and trailer; the handle (offset, size) that finds it again."""
    import google_crc32c

    handle = varint(len(table)) + varint(len(block))
    kind = b"\0"  # uncompressed
    table += block + kind + struct.pack("<I", masked(google_crc32c.value(block + kind)))
    return handle


def _short_successor(key: bytes) -> bytes:
    """The shortest key that sorts after ``key``."""
    for i, byte in enumerate(key):
        if byte != 0xFF:
            return key[:i] + bytes([byte + 1])
    return key


def _field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value) if value else b""


def _message(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body
