"""HDF5 files, untrusted and read through h5py: datasets become lazy tensors.

An HDF5 file can refer to other files, expand without bound and load code through filters. Only data stored in the
file itself is read, plain or compressed with HDF5's built-in filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from gptconvert.containers.untrusted import explain_file, file_size
from gptconvert.errors import FETCH_AGAIN, InputError, UnsafeInputError, UnsupportedError, install_hint
from gptconvert.model.dtypes import FLOATS
from gptconvert.model.tensors import Array, Box, Computed, LazyTensor, Segment, Stored

#: Filters built into HDF5. All others are plug-ins, and plug-ins are code.
FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32"}
#: Limits on an attribute: names, and characters per name.
MAX_NAMES, MAX_NAME = 20_000, 1024
#: Bytes that names of variable length may take, as far as their file can tell: each could be all of it.
MAX_VARIABLE = 256 << 20
#: Maximum nesting of groups.
MAX_DEPTH = 32
#: Maximum bytes per chunk: reading one element decompresses its whole chunk.
MAX_CHUNK = 256 << 20
#: Deflate compresses at most 1032:1. A higher ratio means unwritten chunks or a forged size.
MAX_RATIO = 1032


@contextmanager
def open_hdf5(path: str) -> Iterator[Any]:
    """An ``h5py.File``, open for reading.

    Raises:
        UnsupportedError: h5py is not installed.
        InputError: not an HDF5 file, or a damaged one; covers h5py's errors inside the ``with`` block.
        UnsafeInputError: ``path`` is not a regular file.
    """
    file_size(path)
    try:
        import h5py
    except ImportError as error:
        raise UnsupportedError(
            "reading HDF5 files requires the h5py package", path=path, hint=install_hint("h5")
        ) from error
    if not h5py.is_hdf5(path):
        explained = explain_file(path, allow={"hdf5"}) or "has no HDF5 signature, or is damaged"
        raise InputError(f"this file {explained}", path=path, expected="an HDF5 file")
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"HDF5 file is damaged ({_first_line(error)})", path=path) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def names_in(attributes: Any, attribute: str, path: str) -> list[str]:
    """The names stored in one attribute. Its declared size is checked before it is read.

    Raises:
        UnsafeInputError: the attribute is too large.
        UnsupportedError: the names have a variable length, in a large file.
        InputError: the attribute does not hold names.
    """
    space = attributes.get_id(attribute)
    if math.prod(space.shape or ()) > MAX_NAMES or space.dtype.itemsize > 16 * MAX_NAME:
        found = f"{math.prod(space.shape)} of {space.dtype.itemsize} bytes"
        raise UnsafeInputError(
            f"attribute {attribute} is too large", path=path, expected="a list of names", found=found
        )
    # Keras stores names of one length; the lengths of others are known only after HDF5 has read all of them.
    if space.dtype.hasobject and math.prod(space.shape or ()) * file_size(path) > MAX_VARIABLE:
        raise UnsupportedError(
            f"attribute {attribute} holds names of variable length, which cannot be bounded before they are read",
            path=path,
            hint="save the model again with Keras, or rewrite the attribute with names of a fixed length",
        )
    values = np.asarray(attributes[attribute]).reshape(-1).tolist()
    names = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    wrong = next((name for name in names if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME), None)
    if wrong is not None:
        raise InputError(f"attribute {attribute} does not hold names", path=path, found=repr(wrong)[:80])
    return names


def is_dataset(node: Any) -> bool:
    """Whether an HDF5 object is a dataset rather than a group."""
    return hasattr(node, "chunks")


def find_group(parent: Any, name: str, path: str) -> Any:
    """The group ``name`` inside ``parent``. Raises as :func:`find`, and InputError for a dataset."""
    node = find(parent, name, path)
    if is_dataset(node):
        raise InputError("a dataset where a group should be", path=path, item=name)
    return node


def find(root: Any, place: str, path: str) -> Any:
    """The group or dataset at ``place``, reached through hard links only: other links can lead out of the file.

    Raises:
        InputError: nothing exists at ``place``.
        UnsafeInputError: the path contains a soft, external or user-defined link.
    """
    import h5py
    from h5py import h5l

    parts, node = [part for part in place.split("/") if part], root
    if len(parts) > MAX_DEPTH:
        raise UnsafeInputError("groups nested too deep", path=path, item=place, expected=f"at most {MAX_DEPTH}")
    for part in parts:
        # h5py's `in` and `get` would follow an external link and open its target.
        name = part.encode()
        if is_dataset(node) or part == "." or not node.id.links.exists(name):
            raise InputError("weight is missing from the file", path=path, item=place)
        kind = node.id.links.get_info(name).type
        if kind != h5l.TYPE_HARD:
            what = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}.get(kind, "a custom link")
            target = node.id.links.get_val(name)
            raise UnsafeInputError(f"refused {what}", path=path, item=place, expected="data", found=target)
        node = node[part]
    if not isinstance(node, (h5py.Group, h5py.Dataset)):
        raise InputError("neither a group nor a dataset", path=path, item=place)
    return node


def lazy_tensor(dataset: Any, path: str) -> LazyTensor:
    """A dataset of the file ``path`` as a lazy tensor: a byte range if its data is contiguous, else read on demand.

    Raises:
        UnsafeInputError: its data is stored in other files, or expands beyond reason.
        UnsupportedError: not floats, or compressed with a plug-in filter.
        InputError: a group, or data that is truncated or was never written.
    """
    from h5py import h5d, h5t

    name = str(dataset.name)
    if not is_dataset(dataset):
        raise InputError("a group where a weight should be", path=path, item=name)
    if dataset.is_virtual or dataset.external:
        what = "a virtual dataset" if dataset.is_virtual else "external storage"
        raise UnsafeInputError(f"refused {what}: data stored in other files", path=path, item=name)
    dtype, shape = dataset.dtype, dataset.shape
    if shape is None or dtype.newbyteorder("=") not in FLOATS:
        raise UnsupportedError(
            "element type not supported", path=path, item=name, expected="float16, float32 or float64", found=dtype
        )
    if not dataset.id.get_type().equal(h5t.py_create(dtype)):  # h5py converts on reading, but states the plain type
        what = f"{dtype} of another layout of bits"
        raise UnsupportedError("element type not supported", path=path, item=name, expected="IEEE floats", found=what)
    if 0 in shape:
        return Stored((), dtype, shape)
    layout = dataset.id.get_create_plist().get_layout()
    nbytes = math.prod(shape) * dtype.itemsize
    if layout == h5d.CONTIGUOUS:
        return _contiguous(dataset.id.get_offset(), nbytes, dtype, shape, name, path)
    if layout == h5d.CHUNKED:
        _check_chunks(dataset, nbytes, name, path)
    native = dtype.newbyteorder("=")
    return Computed(partial(_read, path, name, native), native, shape)


def _contiguous(
    offset: int | None,
    nbytes: int,
    dtype: np.dtype[np.generic],
    shape: tuple[int, ...],
    name: str,
    path: str,
) -> LazyTensor:
    size = file_size(path)
    if offset is None:
        raise InputError("weight was never written", path=path, item=name, expected=f"{nbytes} bytes")
    if offset + nbytes > size:
        expected, found = f"{offset + nbytes} bytes", f"{size} bytes"
        raise InputError("file is truncated", path=path, item=name, expected=expected, found=found, hint=FETCH_AGAIN)
    return Stored((Segment(path, offset, nbytes),), dtype, shape)


def _check_chunks(dataset: Any, nbytes: int, name: str, path: str) -> None:
    """Refuse chunks that cannot be read, or that expand far beyond the file's size.

    Raises:
        UnsupportedError: a plug-in filter.
        UnsafeInputError: a chunk, or the whole dataset, would expand beyond reason.
        InputError: chunks were never written.
    """
    plist = dataset.id.get_create_plist()
    codes = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    strange = [code for code in codes if code not in FILTERS]
    if strange:
        expected, found = ", ".join(FILTERS.values()), ", ".join(f"filter {code}" for code in strange)
        raise UnsupportedError(
            "compressed with a filter that is not built into HDF5",
            path=path,
            item=name,
            expected=expected,
            found=found,
            hint="decompress it where the filter is installed: h5repack -f NONE IN.h5 OUT.h5",
        )
    chunk, stored = math.prod(dataset.chunks) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    if chunk > MAX_CHUNK or nbytes > MAX_RATIO * max(stored, 1):
        found = f"{nbytes} bytes in chunks of {chunk}, from {stored} stored bytes"
        raise UnsafeInputError("refused data that expands beyond reason", path=path, item=name, found=found)
    total = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
    written = dataset.id.get_num_chunks()
    if written < total:
        found = f"{written} of {total} chunks"
        raise InputError("weight was not fully written", path=path, item=name, expected="all chunks", found=found)


def _read(path: str, name: str, dtype: np.dtype[np.generic], box: Box) -> Array:
    """The elements inside ``box``. Reopens the file, so that no handle outlives the read."""
    with open_hdf5(path) as file:
        return np.asarray(find(file, name, path)[box], dtype)
