"""MessagePack files as Flax writes them: maps, text and numbers are decoded, arrays only located.

An array is an extension of type 1 whose payload is again MessagePack: shape, dtype name, bytes in C order. Nesting
and the number of entries are bounded, so that a hostile file costs no more than its size.

Sources: the MessagePack specification; flax ``serialization.py``.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gptconvert.containers.untrusted import explain_file, file_size
from gptconvert.errors import FETCH_AGAIN, GptConvertError, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.dtypes import ELEMENT_TYPES
from gptconvert.model.tensors import LazyTensor, Segment, Stored

MAX_DEPTH = 64
MAX_ITEMS = 500_000
MAX_KEY = 1024
MAX_RANK = 32
#: Extension types of flax.
ARRAY, COMPLEX, SCALAR = 1, 2, 3
DTYPES: Mapping[str, np.dtype[np.generic]] = {row.torch: row.dtype for row in ELEMENT_TYPES if row.torch is not None}

#: A decoded value: map, list, text, number, lazy tensor for an array, or the length of a byte string.
Value = object


def read_msgpack(path: str) -> Value:
    """The single value in a file.

    Raises:
        InputError: the file is damaged, or not MessagePack.
        UnsafeInputError: too deep, too many entries, arrays of Python objects, or not a regular file.
        UnsupportedError: an unsupported element type.
    """
    file_size(path)
    explained = explain_file(path)
    if explained is not None:
        raise InputError(f"this file {explained}", path=path, expected="Flax parameters (msgpack)")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walker = _Walker(data, path)
            value = walker.value(0)
            if walker.at != len(data):
                raise walker.wrong(f"{len(data) - walker.at} bytes follow the end of the data")
            return value
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error


@dataclass
class _Walker:
    """Decodes MessagePack values in sequence; ``at`` is the current position."""

    data: mmap.mmap
    path: str
    at: int = 0
    items: int = 0

    def value(self, depth: int) -> Value:
        """The value at the current position."""
        self.items += 1
        if depth > MAX_DEPTH:
            raise UnsafeInputError("nested too deep", path=self.path, expected=f"at most {MAX_DEPTH} levels")
        if self.items > MAX_ITEMS:
            raise UnsafeInputError("too many entries", path=self.path, expected=f"at most {MAX_ITEMS}")
        code = self.take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code < 0x90:
            return self.map(code & 0x0F, depth)
        if code < 0xA0:
            return self.list(code & 0x0F, depth)
        if code < 0xC0:
            return self.text(code & 0x1F)
        return self.coded(code, depth)

    def coded(self, code: int, depth: int) -> Value:
        """A value whose first byte is a type code rather than a small value."""
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        if code in _FIXED_EXTENSIONS:
            return self.extension(_FIXED_EXTENSIONS[code], depth)
        if code not in _SIZED:
            raise self.wrong(f"byte 0x{code:02x} is not a type code")
        kind, width = _SIZED[code]
        length = self.number(width)
        handlers: Mapping[str, Callable[[int], Value]] = {
            "text": self.text,
            "bytes": self.skip,
            "extension": lambda n: self.extension(n, depth),
            "list": lambda n: self.list(n, depth),
            "map": lambda n: self.map(n, depth),
        }
        return handlers[kind](int(length))

    def map(self, count: int, depth: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise self.wrong("a key that is not text")
            if key in found:
                raise self.wrong(f"duplicate key {key!r} in a map")
            found[key] = self.value(depth + 1)
        return found

    def list(self, count: int, depth: int) -> list[Value]:
        return [self.value(depth + 1) for _ in range(count)]

    def text(self, length: int) -> str:
        if length > MAX_KEY:
            raise self.wrong(f"a name of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong("a name that is not UTF-8") from error

    def skip(self, length: int) -> int:
        """Skip a byte string and return its length instead."""
        self.need(length)
        self.at += length
        return length

    def number(self, layout: str) -> int | float:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        found: int | float = value
        return found

    def extension(self, length: int, depth: int) -> LazyTensor:
        """A type byte and ``length`` bytes: an array."""
        kind = self.take(1)[0]
        self.need(length)
        end = self.at + length
        if kind == COMPLEX:
            raise UnsupportedError("arrays of complex numbers are not supported", path=self.path)
        if kind not in (ARRAY, SCALAR):
            raise self.wrong(f"extension type {kind}, which Flax does not write")
        array = self.array(end, depth)
        if self.at != end:
            raise self.wrong("an array whose length does not match its content")
        return array

    def array(self, end: int, depth: int) -> LazyTensor:
        """(shape, dtype name, bytes): the bytes are located, not read."""
        if self.take(1) != b"\x93":
            raise self.wrong("an array that is not (shape, dtype, bytes)")
        shape = self.value(max(depth + 1, MAX_DEPTH - 1))  # deeper: a shape may hold an array, which has a shape
        if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(n) for n in shape):
            raise self.wrong(f"an array of shape {shape!r:.60}")
        dtype = self.dtype()
        code = self.take(1)[0]
        if code not in _BYTES:
            raise self.wrong("an array without its bytes")
        length, expected = int(self.number(_BYTES[code])), math.prod(shape) * dtype.itemsize
        if length != expected or self.at + length > end:
            raise self.wrong(f"an array of shape {shape!r:.60} and type {dtype} with {length} bytes, not {expected}")
        part = Segment(self.path, self.at, length)
        self.at += length
        return Stored((part,) if length else (), dtype, tuple(shape))

    def dtype(self) -> np.dtype[np.generic]:
        """The dtype, named by text or, in files of older versions, by bytes."""
        code = self.take(1)[0]
        if 0xA0 <= code < 0xC0:
            length = code & 0x1F
        elif code in (0xC4, 0xD9):
            length = self.take(1)[0]
        else:
            raise self.wrong("an array without a dtype name")
        name = self.take(length).decode("ascii", "replace")
        if name in ("O", "object"):
            raise UnsafeInputError("refused an array of Python objects", path=self.path)
        if name not in DTYPES:
            raise UnsupportedError(
                "element type not supported", path=self.path, expected=f"one of {', '.join(DTYPES)}", found=name
            )
        return DTYPES[name]

    def take(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return self.data[self.at - count : self.at]

    def need(self, count: int) -> None:
        if self.at + count > len(self.data):
            raise InputError(
                "file is truncated",
                path=self.path,
                expected=f"at least {self.at + count} bytes",
                found=f"{len(self.data)} bytes",
                hint=FETCH_AGAIN,
            )

    def wrong(self, what: str) -> GptConvertError:
        return InputError(f"msgpack is damaged at byte {self.at}: {what}", path=self.path)


def _is_size(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


_CONSTANTS: Mapping[int, Value] = {0xC0: None, 0xC2: False, 0xC3: True}
#: Code → struct layout of a number.
_NUMBERS: Mapping[int, str] = {
    0xCA: ">f", 0xCB: ">d",
    0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
#: Code → layout of the length of a byte string.
_BYTES: Mapping[int, str] = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_FIXED_EXTENSIONS: Mapping[int, int] = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
#: Code → kind of value and layout of its length.
_SIZED: Mapping[int, tuple[str, str]] = {
    **{code: ("bytes", layout) for code, layout in _BYTES.items()},
    0xC7: ("extension", ">B"), 0xC8: ("extension", ">H"), 0xC9: ("extension", ">I"),
    0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"),
    0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
