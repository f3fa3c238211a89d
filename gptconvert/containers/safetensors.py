"""The safetensors container: 8 bytes of header length, a JSON header, then the tensors packed without gaps.

Only the header is read. The checks are those of the official library plus a few more (see :func:`read_safetensors`),
and messages name the tensor and the byte. Written files are identical to the library's: compact JSON padded with
spaces to a multiple of 8, tensors in the library's order.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptconvert.containers.json import kind, parse_json
from gptconvert.containers.untrusted import explain_file, file_size
from gptconvert.errors import FETCH_AGAIN, InputError, UnsupportedError
from gptconvert.model.dtypes import ELEMENT_TYPES
from gptconvert.model.tensors import LazyTensor, Segment, Shape, Stored, TensorSet

#: Maximum header length in bytes, set by the format.
MAX_HEADER = 100_000_000
#: Maximum number of tensors: a GPT has 16 per layer.
MAX_TENSORS = 50_000
#: numpy's limit on the number of axes.
MAX_RANK = 64
_PREFIX = 8
_U64 = 1 << 64

#: Name in a header → numpy type, and the inverse.
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    row.safetensors: row.dtype for row in ELEMENT_TYPES if row.safetensors is not None
}
NAMES: Mapping[np.dtype[np.generic], str] = {dtype: name for name, dtype in DTYPES.items()}
#: The order in which the library lays tensors out: its ``Dtype`` enum reversed, roughly by width.
_LAYOUT = "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()
#: Bits per element of the format's other types. They are refused, but only after the whole file has been checked.
UNSUPPORTED_BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the header; ``start`` and ``stop`` count from the end of the header."""

    name: str
    dtype: str
    shape: Shape
    start: int
    stop: int


def read_safetensors(path: str | os.PathLike[str]) -> TensorSet:
    """The tensors of one safetensors file, in the order of their bytes; only its header is read.

    Stricter than the official library: the header must begin with ``{`` (as the format demands), a key must not occur
    twice in an object (the library takes the last), a tensor must not be described by a JSON list, it has at most 64
    axes, and a file has at most :data:`MAX_TENSORS`.

    Raises:
        InputError: the file is not a safetensors file, or is damaged.
        UnsupportedError: it contains unsupported element types.
        UnsafeInputError: ``path`` is not a regular file.
    """
    path = os.fspath(path)
    size = file_size(path)
    header, data_start = _read_header(path, size)
    entries = _entries(header, path)
    _check_layout(entries, size - data_start, data_start, path)
    _check_supported(entries, path)
    tensors = {}
    for entry in entries:
        part = Segment(path, data_start + entry.start, entry.stop - entry.start)
        tensors[entry.name] = Stored((part,) if part.nbytes else (), DTYPES[entry.dtype], entry.shape)
    return TensorSet(tensors, (path,))


def header_bytes(
    tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """The bytes that precede the data in a file of ``tensors``, and the order in which the data must follow.

    Args:
        tensors: name → tensor, in any order; stored little-endian.
        metadata: at most one key, because the library writes several keys in random order.

    Returns:
        the file's first bytes (length and header), and the names in the order of their data.

    Raises:
        UnsupportedError: an element type that the format lacks.
    """
    kinds = {name: _kind(name, tensor) for name, tensor in tensors.items()}
    ordered = sorted(tensors, key=lambda name: (_LAYOUT.index(kinds[name]), name))
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name in ordered:
        stop = start + tensors[name].nbytes
        entries[name] = {"dtype": kinds[name], "shape": list(tensors[name].shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX)
    return struct.pack("<Q", len(text)) + text, ordered


def _kind(name: str, tensor: LazyTensor) -> str:
    """The format's name for a tensor's dtype in either byte order."""
    dtype = tensor.dtype.newbyteorder("=")
    if dtype not in NAMES:
        expected = ", ".join(str(known) for known in NAMES)
        raise UnsupportedError("safetensors has no such element type", item=name, expected=expected, found=dtype)
    return NAMES[dtype]


def _read_header(path: str, size: int) -> tuple[dict[str, object], int]:
    """The parsed header and the offset of the first data byte."""
    try:
        with open(path, "rb") as file:
            prefix = file.read(_PREFIX)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == _PREFIX else 0
            fits = 2 <= length <= min(MAX_HEADER, size - _PREFIX)
            data = file.read(length) if fits else b""
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    if not fits or data[:1] != b"{":
        raise _not_safetensors(path, size, prefix, length, data)
    count = data.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise InputError("too many tensors", path=path, expected=f"at most {MAX_TENSORS}", found=count)
    header = parse_json(data, path, "safetensors header")
    if not isinstance(header, dict):
        raise InputError("safetensors header holds the wrong kind of value", path=path, expected="an object")
    return header, _PREFIX + length


def _not_safetensors(path: str, size: int, prefix: bytes, length: int, data: bytes) -> InputError:
    """The error for a file whose first bytes cannot begin a safetensors file."""
    explained = explain_file(path)
    if explained is not None:
        return InputError(f"this file {explained}", path=path, expected="a safetensors file")
    if len(prefix) < _PREFIX:
        return InputError("file is truncated", path=path, expected=f"at least {_PREFIX} bytes", found=f"{size} bytes")
    if length > MAX_HEADER:
        return InputError(
            "safetensors header is too long, so this is probably not a safetensors file",
            path=path,
            expected=f"at most {MAX_HEADER} bytes",
            found=f"{length} bytes",
        )
    if length > size - _PREFIX:
        need = f"{_PREFIX + length} bytes for the header alone"
        return InputError("file is truncated", path=path, expected=need, found=f"{size} bytes")
    return InputError(
        "safetensors header does not begin with `{`", path=path, expected="a JSON object", found=repr(data[:16])
    )


def _entries(header: Mapping[str, object], path: str) -> list[_Entry]:
    """The header's tensors, sorted by offset."""
    metadata = header.get("__metadata__")
    if metadata is not None and not isinstance(metadata, dict):
        raise InputError("wrong value", path=path, item="__metadata__", expected="an object", found=kind(metadata))
    wrong = [key for key, value in (metadata or {}).items() if not isinstance(value, str)]
    if wrong:
        raise InputError(
            "metadata values must be strings", path=path, item="__metadata__", found=", ".join(map(str, wrong[:5]))
        )
    entries = [_entry(name, info, path) for name, info in header.items() if name != "__metadata__"]
    return sorted(entries, key=lambda e: (e.start, e.stop))


def _entry(name: str, info: object, path: str) -> _Entry:
    if not isinstance(info, dict):
        raise InputError("wrong header entry", path=path, item=name, expected="an object", found=kind(info))
    absent = [key for key in ("dtype", "shape", "data_offsets") if key not in info]
    if absent:
        raise InputError(f"header entry lacks {', '.join(absent)}", path=path, item=name)
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in UNSUPPORTED_BITS):
        known = " ".join((*DTYPES, *UNSUPPORTED_BITS))
        raise InputError("unknown dtype", path=path, item=name, expected=f"one of {known}", found=repr(dtype)[:80])
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        expected = f"at most {MAX_RANK} whole numbers ≥ 0"
        raise InputError("wrong shape", path=path, item=name, expected=expected, found=repr(shape)[:80])
    if not _whole_numbers(offsets) or len(offsets) != 2:
        expected = "two whole numbers ≥ 0"
        raise InputError("wrong data_offsets", path=path, item=name, expected=expected, found=repr(offsets)[:80])
    return _Entry(name, dtype, tuple(shape), *offsets)


def _whole_numbers(value: object) -> bool:
    """Whether ``value`` is a list of numbers that fit 64 unsigned bits."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _U64 for n in value)


def _check_layout(entries: Sequence[_Entry], available: int, data_start: int, path: str) -> None:
    """Check that every tensor's size matches its shape, and that the tensors cover the data, each byte once."""
    position, before = 0, None
    for entry in entries:
        _check_size(entry, path)
        if entry.start != position:
            other = "the header" if before is None else f"`{before}`"
            word = "overlaps" if entry.start < position else "leaves a hole after"
            raise InputError(
                f"tensor {word} {other}",
                path=path,
                item=entry.name,
                expected=f"data offset {position}",
                found=f"{entry.start} (byte {data_start + entry.start} of the file)",
            )
        position, before = entry.stop, entry.name
    if position > available:
        need, have = f"{data_start + position} bytes", f"{data_start + available} bytes"
        raise InputError("file is truncated", path=path, expected=need, found=have, hint=FETCH_AGAIN)
    if position < available:
        raise InputError(
            f"{available - position} bytes follow the last tensor",
            path=path,
            expected=f"{data_start + position} bytes",
            found=f"{data_start + available} bytes",
        )


def _check_size(entry: _Entry, path: str) -> None:
    bits = DTYPES[entry.dtype].itemsize * 8 if entry.dtype in DTYPES else UNSUPPORTED_BITS[entry.dtype]
    count = 1
    for factor in (*entry.shape, bits):  # in order: a zero does not undo an earlier overflow
        count *= factor
        if count >= _U64:
            found = f"{entry.dtype} {list(entry.shape)}"[:80]
            raise InputError("size overflows 64 bits", path=path, item=entry.name, found=found)
    if count != 8 * (entry.stop - entry.start):
        raise InputError(
            f"shape {list(entry.shape)} of {entry.dtype} does not fit its bytes",
            path=path,
            item=entry.name,
            expected=f"{count // 8} bytes",
            found=f"{entry.stop - entry.start} bytes",
        )


def _check_supported(entries: Sequence[_Entry], path: str) -> None:
    strange = [entry for entry in entries if entry.dtype not in DTYPES]
    if strange:
        listed = ", ".join(f"`{entry.name}` ({entry.dtype})" for entry in strange[:5])
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise UnsupportedError(
            f"element types not supported: {listed}{more}",
            path=path,
            expected=f"one of {' '.join(DTYPES)}",
            hint="first save the checkpoint in float32, float16 or bfloat16",
        )
