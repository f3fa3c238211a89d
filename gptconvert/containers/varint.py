"""The variable-length integers of protobuf and of LevelDB-style tables, as our hand-laid files need them."""

from __future__ import annotations


def varint(value: int) -> bytes:
    """``value`` (not negative) in groups of seven bits, lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
