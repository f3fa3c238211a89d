"""Builds version 2 checkpoint files byte by byte, valid or malformed. Independent of the package under test."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

Rows = Sequence[tuple[bytes, bytes]]
MAGIC = bytes.fromhex("57fb808b247547db")
#: numpy type → tensorflow.DataType.
ENUM = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "bfloat16": 14, "float16": 19}


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def text(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def masked(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def shape_proto(shape: Sequence[int]) -> bytes:
    return b"".join(text(2, number(1, size)) for size in shape)


def entry(
    dtype: int,
    shape: Sequence[int],
    *,
    shard: int = 0,
    offset: int = 0,
    size: int = 0,
    crc: int = 0,
    slices: Sequence[bytes] = (),
) -> bytes:
    """A BundleEntryProto; ``crc`` as stored, masked."""
    return (
        number(1, dtype)
        + text(2, shape_proto(shape))
        + number(3, shard)
        + number(4, offset)
        + number(5, size)
        + (varint(6 << 3 | 5) + struct.pack("<I", crc))
        + b"".join(text(7, piece) for piece in slices)
    )


def slice_proto(extents: Sequence[tuple[int, int | None]]) -> bytes:
    """A TensorSliceProto; a length of None covers the whole axis."""
    return b"".join(text(1, number(1, a) + (b"" if n is None else varint(2 << 3) + varint(n))) for a, n in extents)


def header(shards: int = 1, endianness: int = 0, minimum: int = 0, excluded: bytes = b"") -> bytes:
    return number(1, shards) + number(2, endianness) + text(3, number(1, 1) + number(2, minimum) + excluded)


def block(rows: Rows, restart: int = 16) -> bytes:
    """An uncompressed block, with a full key every ``restart`` entries."""
    out, restarts, last = bytearray(), [0], b""
    for i, (key, value) in enumerate(rows):
        shared = 0
        if i % restart:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        elif i:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def trailed(raw: bytes, kind: int = 0) -> bytes:
    """A block followed by its type and checksum."""
    body = raw + bytes([kind])
    return body + struct.pack("<I", masked(body))


def table(
    rows: Rows, *, per_block: int = 1000, kind: int = 0, encode: Callable[[bytes], bytes] = lambda raw: raw
) -> bytes:
    """A complete table file; ``kind`` and ``encode`` apply to the data blocks."""
    out, index = b"", []
    for start in range(0, len(rows), per_block):
        part = rows[start : start + per_block]
        raw = encode(block(part))
        index.append((part[-1][0] + b"\x00", varint(len(out)) + varint(len(raw))))
        out += trailed(raw, kind)
    return closed(out, index)


def closed(blocks: bytes, index: Rows) -> bytes:
    """Data blocks followed by metaindex, index and footer."""
    meta, root = block([]), block(index, 1)
    handles = varint(len(blocks)) + varint(len(meta))
    out = blocks + trailed(meta)
    handles += varint(len(out)) + varint(len(root))
    return out + trailed(root) + handles.ljust(40, b"\0") + MAGIC


def write_bundle(prefix: Path, arrays: Mapping[str, NDArray[Any]], **how: Any) -> Path:
    """Write a bundle of one shard as TensorFlow would; ``how`` goes to :func:`table`."""
    rows, data = [(b"", header())], b""
    for name in sorted(arrays):
        raw = np.ascontiguousarray(arrays[name]).tobytes()
        kind = ENUM[arrays[name].dtype.name]
        shape = arrays[name].shape
        rows.append((name.encode(), entry(kind, shape, offset=len(data), size=len(raw), crc=masked(raw))))
        data += raw
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.index").write_bytes(table(rows, **how))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    return prefix


def write_rows(prefix: Path, rows: Rows, data: bytes = b"", **how: Any) -> Path:
    """Write a bundle from raw index rows."""
    Path(f"{prefix}.index").write_bytes(table(rows, **how))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    return prefix


def write_entries(folder: Path, *rows: tuple[bytes, bytes], data: bytes = bytes(64), **head: int) -> str:
    """Write a bundle from index rows and the header fields ``head``; returns its prefix."""
    return str(write_rows(folder / "m", [(b"", header(**head)), *rows], data))


def raw_table(block_bytes: bytes, kind: int = 0, times: int = 1) -> bytes:
    """A table of one block, listed ``times`` times."""
    address = varint(0) + varint(len(block_bytes))
    return closed(trailed(block_bytes, kind), [(b"%c" % i, address) for i in range(times)])


def snappy(raw: bytes) -> bytes:
    """A simple Snappy compressor: literals, and copies of earlier bytes."""
    out, at, pending = varint(len(raw)), 0, b""
    while at < len(raw):
        back, count = _match(raw, at)
        if count >= 4:
            out += _literal(pending)
            count = min(count, 64)
            if count <= 11 and back < 2048:
                out += bytes([1 | (count - 4) << 2 | (back >> 8) << 5, back & 255])
            else:
                out += bytes([2 | (count - 1) << 2]) + back.to_bytes(2, "little")
            pending, at = b"", at + count
        else:
            pending, at = pending + raw[at : at + 1], at + 1
    return out + _literal(pending)


def _match(raw: bytes, at: int) -> tuple[int, int]:
    best = (0, 0)
    for back in range(1, min(at, 400) + 1):
        count = 0
        while at + count < len(raw) and count < 64 and raw[at + count] == raw[at + count - back]:
            count += 1
        if count > best[1]:
            best = (back, count)
    return best


def _literal(raw: bytes) -> bytes:
    if not raw:
        return b""
    if len(raw) <= 60:
        return bytes([(len(raw) - 1) << 2]) + raw
    return bytes([61 << 2]) + (len(raw) - 1).to_bytes(2, "little") + raw
