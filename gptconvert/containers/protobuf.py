"""The part of Protocol Buffers' wire format that a checkpoint index needs: a reader of untrusted bytes, and a writer.

The reader checks every length against the bytes available, so that no length in a file determines how much memory is
allocated. The writer omits singular numbers of value 0, as proto3 does. Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import mmap
import struct

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class MalformedError(ValueError):
    """The bytes violate the format. Readers turn it into an error that names the file."""


def read_varint(data: bytes | mmap.mmap, at: int, bits: int = 64) -> tuple[int, int]:
    """The unsigned base-128 number at position ``at``.

    Returns:
        the number and the position after it.

    Raises:
        MalformedError: the bytes end inside it, or it has more than ``bits`` bits.
    """
    if at < len(data) and data[at] < 0x80:  # by far the most common case
        return data[at], at + 1
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if at + index >= len(data):
            raise MalformedError("ends inside a number")
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if value >> bits:
                break
            return value, at + index + 1
    raise MalformedError(f"holds a number of more than {bits} bits")


def signed(value: int) -> int:
    """A 64-bit varint read as int64."""
    return value - (1 << 64) if value >> 63 else value


class Message:
    """A message's fields by number, in order of appearance; unknown fields stay unread.

    Args:
        data: the whole message.

    Raises:
        MalformedError: not a sequence of complete fields.
    """

    __slots__ = ("_fields",)

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        at = 0
        while at < len(data):
            key, at = read_varint(data, at)
            number, wire = key >> 3, key & 7
            if not 0 < number < 1 << 29:
                raise MalformedError(f"has a field numbered {number}")
            value, at = _value(data, at, wire)
            self._fields.setdefault(number, []).append(value)

    def integer(self, number: int, default: int = 0) -> int:
        """A singular int64 field (or a narrower integer type), or ``default`` if absent."""
        value = self._single(number)
        if value is None:
            return default
        if not isinstance(value, int):
            raise MalformedError(f"has bytes where field {number} should be a number")
        return signed(value)

    def integers(self, number: int) -> list[int]:
        """A repeated int64 field (or a narrower integer type), packed or not."""
        found: list[int] = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                found.append(signed(value))
                continue
            at = 0
            while at < len(value):
                each, at = read_varint(value, at)
                found.append(signed(each))
        return found

    def raw(self, number: int) -> bytes:
        """The bytes of a singular embedded message, empty if absent."""
        value = self._single(number)
        if isinstance(value, int):
            raise MalformedError(f"has a number where field {number} should be a message")
        return value or b""

    def message(self, number: int) -> Message:
        """A singular embedded message, empty if absent."""
        return Message(self.raw(number))

    def messages(self, number: int) -> list[Message]:
        """A repeated embedded message."""
        values = self._fields.get(number, [])
        if any(isinstance(value, int) for value in values):
            raise MalformedError(f"has a number where field {number} should be a message")
        return [Message(value) for value in values if isinstance(value, bytes)]

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def _single(self, number: int) -> int | bytes | None:
        values = self._fields.get(number)
        if values is None:
            return None
        if len(values) > 1:  # legal, but checkpoint writers never do it, and readers could disagree on the value
            raise MalformedError(f"has field {number} {len(values)} times")
        return values[0]


def _value(data: bytes, at: int, wire: int) -> tuple[int | bytes, int]:
    """One field's value and the position after it."""
    if wire == VARINT:
        return read_varint(data, at)
    if wire == BYTES:
        length, at = read_varint(data, at)
    elif wire in (FIXED32, FIXED64):
        length = 4 if wire == FIXED32 else 8
    else:
        raise MalformedError(f"has a field of wire type {wire}")
    if length > len(data) - at:
        raise MalformedError(f"ends inside a field of {length} bytes")
    raw = data[at : at + length]
    if wire == BYTES:
        return raw, at + length
    number: int = struct.unpack("<I" if wire == FIXED32 else "<Q", raw)[0]
    return number, at + length


def varint(value: int) -> bytes:
    """``value`` (≥ 0) in groups of seven bits, lowest first; the top bit is set if more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def integer_field(number: int, value: int, keep_zero: bool = False) -> bytes:
    """A non-negative int64 field (or a narrower integer type); 0 is omitted unless ``keep_zero``."""
    return _key(number, VARINT) + varint(value) if value or keep_zero else b""


def fixed32_field(number: int, value: int) -> bytes:
    """A field of four bytes."""
    return _key(number, FIXED32) + struct.pack("<I", value)


def bytes_field(number: int, content: bytes) -> bytes:
    """A string, byte string or embedded message."""
    return bytes_prefix(number, len(content)) + content


def bytes_prefix(number: int, nbytes: int) -> bytes:
    """The key and length that precede the ``nbytes`` bytes of a string, byte string or embedded message."""
    return _key(number, BYTES) + varint(nbytes)


def _key(number: int, wire: int) -> bytes:
    return varint(number << 3 | wire)
