"""Decompression of Snappy's raw block format (google/snappy ``format_description.txt``), used by LevelDB tables."""

from __future__ import annotations

from dataclasses import dataclass

from gptconvert.containers.protobuf import MalformedError, read_varint

#: Maximum number of elements (literals and copies) in all blocks of a file, about a second of work.
MAX_ELEMENTS = 1_000_000
#: Maximum size of a decompressed block.
MAX_BYTES = 64 << 20


@dataclass
class Elements:
    """The number of elements that the blocks of one file may still have."""

    left: int = MAX_ELEMENTS


def decompress(data: bytes, limit: int = MAX_BYTES, elements: Elements | None = None) -> bytes:
    """The decompressed content of one block.

    A block is a sequence of literals and copies of 1 to 64 bytes of earlier output, so the output is at most about
    30 times the input. Memory is never allocated from the declared length; decompression stops where the output
    exceeds it.

    Args:
        data: the block.
        limit: maximum declared length in bytes.
        elements: budget of elements, shared by the blocks of a file.

    Raises:
        MalformedError: truncated, a copy from before the start, a length other than the declared one, or beyond a
            limit.
    """
    length, at = read_varint(data, 0, 32)
    if length > limit:
        raise MalformedError(f"has a compressed block that declares {length} bytes, more than {limit}")
    elements, output = elements or Elements(), bytearray()
    while at < len(data) and len(output) <= length:
        elements.left -= 1
        if elements.left < 0:
            raise MalformedError(f"has compressed blocks of more than {MAX_ELEMENTS} elements")
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
            piece = output[start : start + count]  # shorter than count if the copy overlaps its own output
            output += piece if back >= count else (piece * (count // back + 1))[:count]
    if len(output) != length:
        found = f"more than {length}" if len(output) > length else len(output)
        raise MalformedError(f"has a compressed block of {found} bytes that declares {length} bytes")
    return bytes(output)


def _literal_length(data: bytes, at: int, code: int) -> tuple[int, int]:
    """Length of a literal, stored in the tag or the 1 to 4 bytes after it, and the position after it."""
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
