"""HDF5 files, read by h5py without trust: datasets become lazy tensors.

An HDF5 file can point at other files, expand without bound and, with filters, load code: only data in the file
itself, plain or packed by HDF5's own filters, is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from gptconvert.containers.untrusted import explain_file, file_size
from gptconvert.errors import FETCH_AGAIN, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.dtypes import FLOATS
from gptconvert.model.tensors import Array, Box, Computed, LazyTensor, Segment, Stored

#: The extra that installs h5py.
EXTRA = "h5"
#: Filters that are part of HDF5. Others are plug-ins, which are code.
FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32"}
#: Most names in an attribute, and most characters of one.
MAX_NAMES, MAX_NAME = 100_000, 1024
#: Most groups around a dataset.
MAX_DEPTH = 32
#: Most bytes of one chunk: reading any element unpacks its whole chunk.
MAX_CHUNK = 256 << 20
#: Deflate packs at most 1032 to 1; data that claims more has chunks that were never written, or an invented size.
MAX_RATIO = 1032


@contextmanager
def open_hdf5(path: str) -> Iterator[Any]:
    """An ``h5py.File``, open for reading.

    Raises:
        UnsupportedError: h5py is not installed.
        InputError: not an HDF5 file, or h5py fails inside the ``with`` statement, because the file is damaged.
        UnsafeInputError: ``path`` is not a regular file.
    """
    file_size(path)
    try:
        import h5py
    except ImportError as error:
        raise UnsupportedError(
            "reading HDF5 files needs the package h5py", path=path, hint=f"pip install 'gptconvert[{EXTRA}]'"
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
    """The names that one attribute holds, its declared size checked first.

    Raises:
        UnsafeInputError: it is too large.
        InputError: it does not hold names.
    """
    space = attributes.get_id(attribute)
    if math.prod(space.shape or ()) > MAX_NAMES or space.dtype.itemsize > 16 * MAX_NAME:
        found = f"{math.prod(space.shape)} of {space.dtype.itemsize} bytes"
        raise UnsafeInputError(
            f"attribute {attribute} is too large", path=path, expected="a list of names", found=found
        )
    values = np.asarray(attributes[attribute]).reshape(-1).tolist()
    names = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    wrong = next((name for name in names if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME), None)
    if wrong is not None:
        raise InputError(f"attribute {attribute} does not hold names", path=path, found=repr(wrong)[:80])
    return names


def is_dataset(found: Any) -> bool:
    """Whether an object of the file is a dataset, rather than a group."""
    return hasattr(found, "chunks")


def find_group(parent: Any, name: str, path: str) -> Any:
    """The group ``name`` of a group. Raises as :func:`find`, and InputError for a dataset."""
    found = find(parent, name, path)
    if is_dataset(found):
        raise InputError("a dataset where a group should be", path=path, item=name)
    return found


def find(root: Any, place: str, path: str) -> Any:
    """The group or dataset at ``place``, reached by hard links alone: soft and external ones lead elsewhere.

    Raises:
        InputError: it is not there.
        UnsafeInputError: a link on the way leads elsewhere.
    """
    import h5py
    from h5py import h5l

    parts, found = [part for part in place.split("/") if part], root
    if len(parts) > MAX_DEPTH:
        raise UnsafeInputError("groups nested too deep", path=path, item=place, expected=f"at most {MAX_DEPTH}")
    for part in parts:
        # h5py's own `in` and `get` would follow an external link, and open what it names.
        name, here = part.encode(), not is_dataset(found) and part != "."
        if not here or not found.id.links.exists(name):
            raise InputError("weight is missing from the file", path=path, item=place)
        kind = found.id.links.get_info(name).type
        if kind != h5l.TYPE_HARD:
            what = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}.get(kind, "a foreign link")
            target = found.id.links.get_val(name)
            raise UnsafeInputError(f"refused {what}", path=path, item=place, expected="data", found=target)
        found = found[part]
    if not isinstance(found, (h5py.Group, h5py.Dataset)):
        raise InputError("neither group nor dataset", path=path, item=place)
    return found


def lazy_tensor(dataset: Any, path: str) -> LazyTensor:
    """A dataset of the file ``path`` as a lazy tensor: bytes to copy if they are contiguous, else values to read.

    Raises:
        UnsafeInputError: its data are in other files, or expand beyond reason.
        UnsupportedError: not floats, or packed by a filter that is not HDF5's own.
        InputError: a group, or data that are cut off or were never written.
    """
    from h5py import h5d

    name = str(dataset.name)
    if not is_dataset(dataset):
        raise InputError("a group where a weight should be", path=path, item=name)
    if dataset.is_virtual or dataset.external:
        what = "a virtual dataset" if dataset.is_virtual else "external storage"
        raise UnsafeInputError(f"refused {what}: data in other files", path=path, item=name)
    dtype, shape = dataset.dtype, dataset.shape
    if shape is None or dtype.newbyteorder("=") not in FLOATS:
        raise UnsupportedError(
            "element type not supported", path=path, item=name, expected="float16, float32 or float64", found=dtype
        )
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
    """Refuse what cannot be read, or would cost far more than the file's size suggests.

    Raises:
        UnsupportedError: a filter that is a plug-in.
        UnsafeInputError: a chunk, or all of them together, would expand beyond reason.
        InputError: chunks were never written.
    """
    plist = dataset.id.get_create_plist()
    codes = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    strange = [code for code in codes if code not in FILTERS]
    if strange:
        expected, found = ", ".join(FILTERS.values()), ", ".join(f"filter {code}" for code in strange)
        raise UnsupportedError(
            "packed by a filter that is not HDF5's own",
            path=path,
            item=name,
            expected=expected,
            found=found,
            hint="h5repack -f NONE IN.h5 OUT.h5 unpacks it, where the filter is installed",
        )
    chunk, stored = math.prod(dataset.chunks) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    if chunk > MAX_CHUNK or nbytes > MAX_RATIO * max(stored, 1):
        found = f"{nbytes} bytes in chunks of {chunk}, out of {stored} stored"
        raise UnsafeInputError("refused data that expands beyond reason", path=path, item=name, found=found)
    wanted = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
    present = dataset.id.get_num_chunks()
    if present < wanted:
        found = f"{present} of {wanted} chunks"
        raise InputError("weight was not written in full", path=path, item=name, expected="all", found=found)


def _read(path: str, name: str, dtype: np.dtype[np.generic], box: Box) -> Array:
    """The elements inside ``box``. The file is opened again, so that it does not stay open while the tensor lives."""
    with open_hdf5(path) as file:
        return np.asarray(find(file, name, path)[box], dtype)
