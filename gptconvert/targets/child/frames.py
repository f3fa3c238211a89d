"""Messages between the two processes: a line of JSON, then the bytes of the arrays that it describes.

The reader may be the trusting side's only protection from a process that a hostile graph controls, so it checks types
and sizes before it allocates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from gptconvert.model.tensors import Array

#: Largest line of JSON, in bytes.
MOST_LINE = 64 << 20
#: Kinds of numbers that arrays may hold: bool, signed, unsigned, float.
KINDS = "biuf"

Arrays = Mapping[str, Array]


class FrameError(ValueError):
    """The bytes are not a message."""


def write_message(stream: BinaryIO, fields: Mapping[str, object], arrays: Arrays) -> None:
    """Write one message; arrays are not copied if they are contiguous."""
    described = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    stream.write(json.dumps({**fields, "arrays": described}).encode() + b"\n")
    for array in arrays.values():
        if array.nbytes:
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stream.flush()


def read_message(stream: BinaryIO, most: int | None = None) -> tuple[dict[str, Any], dict[str, Array]] | None:
    """Read one message; None at the end of the stream.

    Args:
        stream: the other process's output.
        most: largest number of bytes of all arrays.

    Raises:
        FrameError: it is damaged, or larger than ``most``.
    """
    line = stream.readline(MOST_LINE)
    if not line.endswith(b"\n"):
        if len(line) == MOST_LINE:
            raise FrameError(f"a line of more than {MOST_LINE} bytes")
        return None
    try:
        fields = json.loads(line)
        described = [(str(name), np.dtype(str(kind)), _shape(sizes)) for name, kind, sizes in fields.pop("arrays")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FrameError(f"not a message: {line[:80]!r}") from error
    arrays: dict[str, Array] = {}
    for name, dtype, shape in described:
        count = 1
        for size in shape:
            count *= size
        nbytes = count * dtype.itemsize
        if dtype.kind not in KINDS or (most is not None and nbytes > most):
            raise FrameError(f"array {name} of {nbytes} bytes, type {dtype}")
        flat = np.empty(nbytes, np.uint8)
        if not _fill(stream, flat):
            return None
        arrays[name] = flat.view(dtype).reshape(shape)
    return fields, arrays


def _shape(sizes: Any) -> tuple[int, ...]:
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError("a size is negative, or not a whole number")
    return tuple(sizes)


def _fill(stream: BinaryIO, flat: Array) -> bool:
    """Read bytes into an array; False if the stream ends first."""
    view, done = flat.data, 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            return False
        done += count
    return True
