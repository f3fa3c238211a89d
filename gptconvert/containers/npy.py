"""NumPy array files, single or as members of an ``.npz`` archive, read lazily and without running code.

A header (magic, version, a Python literal) is followed by the packed elements. An array of Python objects is a
pickle in disguise and is refused. Format: numpy/lib/format.py, NEP 1.
"""

from __future__ import annotations

import ast
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np

from gptconvert.containers.untrusted import explain_bytes, file_size
from gptconvert.errors import FETCH_AGAIN, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.tensors import Array, Box, Computed, LazyTensor, Segment, Shape, Stored, Transposed, map_segment

MAGIC = b"\x93NUMPY"
#: Maximum header length in bytes, numpy's default.
MAX_HEADER = 10_000
_MAX_RANK = 64
#: Major version → format and size of the header's length.
_LENGTHS: Mapping[int, tuple[str, int]] = {1: ("<H", 2), 2: ("<I", 4), 3: ("<I", 4)}
_NUMBERS = re.compile(r"[<>|=](f2|f4|f8|i1|i2|i4|i8|u1|u2|u4|u8|b1)")


@dataclass(frozen=True)
class Header:
    """The header of an array file.

    Attributes:
        dtype: element type, with its byte order.
        column_major: whether the first axis varies fastest (Fortran order).
        shape: shape of the array.
        nbytes: length of the header; the elements follow.
    """

    dtype: np.dtype[np.generic]
    column_major: bool
    shape: Shape
    nbytes: int


def read_npy(path: str | os.PathLike[str]) -> LazyTensor:
    """The array in the file ``path``.

    Raises:
        InputError: missing, truncated, or not an array file.
        UnsafeInputError: an array of Python objects (a pickle), or not a regular file.
        UnsupportedError: elements that are not plain numbers.
    """
    path = os.fspath(path)
    whole = Segment(path, 0, file_size(path))
    try:
        with open(path, "rb") as file:
            return array_in(file, whole, os.path.basename(path))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error


def array_in(file: BinaryIO, whole: Segment, name: str, void2: np.dtype[np.generic] | None = None) -> LazyTensor:
    """The array stored in the byte range ``whole`` of an open file.

    Args:
        file: open for reading; its position changes.
        whole: the byte range of header and elements.
        name: the array's name in error messages.
        void2: dtype of elements of two untyped bytes (``|V2``); None refuses them.

    Raises:
        InputError, UnsafeInputError, UnsupportedError: as :func:`read_npy`.
    """
    file.seek(whole.offset)
    head = file.read(min(whole.nbytes, MAX_HEADER + 16))
    header = parse_header(head, whole.path, name, void2)
    expected = header.nbytes + math.prod(header.shape) * header.dtype.itemsize
    if expected != whole.nbytes:
        raise InputError(
            "file is truncated" if whole.nbytes < expected else "extra bytes follow the array",
            path=whole.path,
            item=name,
            expected=f"{expected} bytes ({header.dtype} of shape {_short(header.shape)})",
            found=f"{whole.nbytes} bytes",
            hint=FETCH_AGAIN,
        )
    data = Segment(whole.path, whole.offset + header.nbytes, whole.nbytes - header.nbytes)
    return _tensor(header, data)


def parse_header(data: bytes, path: str, name: str, void2: np.dtype[np.generic] | None = None) -> Header:
    """The header at the start of ``data``. Arguments and errors as for :func:`array_in`."""
    fields, nbytes = _fields(data, path, name)
    if set(fields) != {"descr", "fortran_order", "shape"}:
        raise _wrong(path, name, "keys descr, fortran_order and shape", ", ".join(map(str, fields)) or "none")
    descr, order, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if not isinstance(order, bool):
        raise _wrong(path, name, "fortran_order True or False", order)
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_RANK
        or any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape)
    ):
        raise _wrong(path, name, "a shape of at most 64 whole numbers", shape)
    return Header(_dtype(descr, path, name, void2), order, shape, nbytes)


def _fields(data: bytes, path: str, name: str) -> tuple[dict[object, object], int]:
    """The header's dictionary, and the header's length in bytes."""
    if not data.startswith(MAGIC):
        explained = explain_bytes(data, allow={"npy"}) or "does not begin like a NumPy array file"
        raise InputError(f"this file {explained}", path=path, item=name, expected="an array saved by numpy.save")
    version, minor = data[len(MAGIC) : len(MAGIC) + 2].ljust(2, b"\0")
    if version not in _LENGTHS or minor:
        raise InputError(
            "unknown version of the array format",
            path=path,
            item=name,
            expected="1.0, 2.0 or 3.0",
            found=f"{version}.{minor}",
        )
    code, size = _LENGTHS[version]
    start = len(MAGIC) + 2 + size
    if len(data) < start:
        raise InputError("file is truncated inside its header", path=path, item=name, hint=FETCH_AGAIN)
    (length,) = struct.unpack(code, data[start - size : start])
    if length > MAX_HEADER:
        raise InputError(
            "header is too long",
            path=path,
            item=name,
            expected=f"at most {MAX_HEADER} bytes",
            found=f"{length} bytes",
        )
    if len(data) < start + length:
        raise InputError("file is truncated inside its header", path=path, item=name, hint=FETCH_AGAIN)
    text = data[start : start + length].decode("utf-8" if version == 3 else "latin-1", "replace")
    return _literal(text, path, name), start + length


def _literal(text: str, path: str, name: str) -> dict[object, object]:
    """The dictionary in a header's text. Python 2 wrote lengths as ``512L``."""
    try:
        value = ast.literal_eval(re.sub(r"(?<=\d)L\b", "", text).strip(" \t\n"))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise _wrong(path, name, "a Python dictionary", text) from error
    if not isinstance(value, dict):
        raise _wrong(path, name, "a Python dictionary", text)
    return value


def _dtype(descr: object, path: str, name: str, void2: np.dtype[np.generic] | None) -> np.dtype[np.generic]:
    if isinstance(descr, str) and re.fullmatch(r"[<>|=]?O\d*", descr):
        raise UnsafeInputError(
            "refused: an array of Python objects is a pickle, nothing executed",
            path=path,
            item=name,
            expected="an array of numbers",
            hint="in an environment where you trust the file, save it as an array of float32",
        )
    if void2 is not None and descr in ("|V2", "<V2"):
        return void2
    if isinstance(descr, str) and _NUMBERS.fullmatch(descr):
        return np.dtype(descr)
    raise UnsupportedError(
        "elements that are not plain numbers", path=path, item=name, expected="<f4, >f4, <f2 …", found=descr
    )


def _tensor(header: Header, data: Segment) -> LazyTensor:
    parts = (data,) if data.nbytes else ()
    if not header.column_major or len(header.shape) < 2:
        return Stored(parts, header.dtype, header.shape)
    if len(header.shape) == 2:
        return Transposed(Stored(parts, header.dtype, header.shape[::-1]))
    return Computed(partial(_column_major, data, header), header.dtype.newbyteorder("="), header.shape)


def _column_major(data: Segment, header: Header, box: Box) -> Array:
    """The elements inside ``box`` of an array in Fortran order."""
    view = np.ndarray(header.shape, header.dtype, map_segment(data), order="F")
    return np.array(view[box], header.dtype.newbyteorder("="), order="C")


def _wrong(path: str, name: str, expected: str, found: object) -> InputError:
    return InputError("header is damaged", path=path, item=name, expected=expected, found=repr(found)[:80])


def _short(shape: Shape) -> str:
    return str(list(shape))[:80]
