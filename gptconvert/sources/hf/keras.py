"""``tf_model.h5``: what transformers' TensorFlow models saved, by Keras, into an HDF5 file. Read with h5py alone.

Sources: Keras 2 ``saving/hdf5_format.py`` (attributes ``layer_names`` and ``weight_names``, split when they are
long) and the rule by which transformers 4 turned TensorFlow's names into PyTorch's. An HDF5 file can point at other
files, expand without bound and, with filters, load code: only data that lies in the file itself, plain or packed by
HDF5's own filters, is read. A Keras program in ``model_config`` is never looked at.

transformers' TFOpenAIGPT computed GELU by erf from weights trained with the tanh formula; what is exported
is what the weights and config.json mean: tanh.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from gptconvert.containers.untrusted import explain_file, file_size
from gptconvert.errors import InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.tensors import Array, Box, Computed, LazyTensor, Segment, Stored, TensorSet
from gptconvert.model.transforms import drop_leading_axis, transpose

EXTRA = "h5"
#: Filters that are part of HDF5: deflate, shuffle, fletcher32. Others are plug-ins, which are code.
FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32"}
#: Most names in all attributes together, and most characters of one.
MAX_NAMES, MAX_NAME = 100_000, 1024
#: Most groups around a dataset.
MAX_DEPTH = 32
#: Most bytes of one chunk: reading any element unpacks its whole chunk.
MAX_CHUNK = 256 << 20
#: Deflate packs at most 1032 to 1; whatever promises more has chunks that were never written, or lies.
MAX_RATIO = 1032
_DTYPES = tuple(np.dtype(code) for code in ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8"))
_WHOLE_MODEL = "model_weights"


def read_keras_h5(path: str) -> TensorSet:
    """The weights under the names and in the layout of transformers' PyTorch models.

    Raises:
        UnsupportedError: h5py is not installed, or data is packed in a way that needs a plug-in.
        InputError: the file is damaged or was not written by Keras.
        UnsafeInputError: the file refers to other files, or expands without bound.
    """
    size, tensors = file_size(path), dict[str, LazyTensor]()
    with _opened(path) as file:
        root = file if not file.id.links.exists(_WHOLE_MODEL.encode()) else _group(file, _WHOLE_MODEL, path)
        has_program = "model_config" in file.attrs
        for place, given in _weights(root, path):
            dataset = _find(root, place, path)
            name, orient = hf_name(given, keep_first=place == given)
            if name in tensors:
                raise InputError("two weights have one name", path=path, item=name)
            tensors[name] = orient(_tensor(dataset, f"{root.name}/{place}", path, size))
    notes = (f"{os.path.basename(path)}: the Keras program in model_config is not looked at",) if has_program else ()
    return TensorSet(tensors, (path,), notes)


def hf_name(given: str, keep_first: bool = False) -> tuple[str, Callable[[LazyTensor], LazyTensor]]:
    """PyTorch's name for a weight of a TensorFlow model, and what turns its values over to PyTorch's layout.

    ``tfgp_t2lm_head_model/transformer/h_._0/attn/c_attn/weight:0`` → ``transformer.h.0.attn.c_attn.weight``.

    Args:
        given: as Keras wrote it.
        keep_first: the model's own name, which the first part is, was left off already (in sharded files).
    """
    plain = re.sub(r"/[^/]*___([^/]*)/", r"/\1/", given.removesuffix(":0").replace("_._", "/"))
    parts = [part for part in plain.split("/") if part]
    if len(parts) > 1 and not keep_first:
        parts = parts[1:]
    kind = parts[-1]
    parts[-1] = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "beta": "bias"}.get(kind, kind)
    if kind == "kernel":  # Dense layers are [in, out]; "weight" is a Conv1D's or an embedding's, and stays
        return ".".join(parts), _transpose_matrix
    return ".".join(parts), _squeeze_bias if parts[-1] == "bias" else lambda tensor: tensor


def index_name(given: str) -> str:
    """The name under which :func:`read_keras_h5` gives the weight that a shard index calls ``given``."""
    return hf_name(given)[0]


def _transpose_matrix(tensor: LazyTensor) -> LazyTensor:
    return transpose(tensor) if len(tensor.shape) == 2 else tensor


def _squeeze_bias(tensor: LazyTensor) -> LazyTensor:
    """TensorFlow's Conv1D has a bias of shape [1, out]."""
    return drop_leading_axis(tensor) if len(tensor.shape) == 2 and tensor.shape[0] == 1 else tensor


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file, by h5py; the library's errors in our words."""
    try:
        import h5py
    except ImportError as error:
        raise UnsupportedError(
            "reading tf_model.h5 needs the package h5py", path=path, hint=f"pip install 'gptconvert[{EXTRA}]'"
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


def _weights(root: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path of the dataset, the weight's own name) of every weight, in the file's order.

    A shard of a sharded model names its datasets where a whole model names its layers.
    """
    count = 0
    for layer in _names(root, "layer_names", path):
        found = _find(root, layer, path)
        inside = [layer] if _is_dataset(found) else _names(found, "weight_names", path)
        for given in inside:
            count += 1
            if count > MAX_NAMES:
                raise UnsafeInputError("more weights than any model has", path=path, expected=f"at most {MAX_NAMES}")
            yield (given if _is_dataset(found) else f"{layer}/{given}"), given


def _names(group: Any, attribute: str, path: str) -> list[str]:
    """A list of names that Keras keeps in an attribute, or, if it is long, in several: ``weight_names0`` …"""
    pieces = [attribute] if attribute in group.attrs else []
    while not pieces or pieces[-1] != attribute:
        piece = f"{attribute}{len(pieces)}"
        if piece not in group.attrs:
            break
        pieces.append(piece)
    if not pieces:
        raise InputError(
            f"no attribute {attribute}",
            path=path,
            item=group.name,
            expected="weights saved by Keras (model.save_weights)",
            found=", ".join(map(str, list(group.attrs)[:5])) or "no attributes",
        )
    names: list[str] = []
    for piece in pieces:
        names += _texts(group.attrs, piece, path)
    return names


def _texts(attributes: Any, name: str, path: str) -> list[str]:
    """The strings of one attribute, its declared size looked at first."""
    space = attributes.get_id(name)
    if math.prod(space.shape or ()) > MAX_NAMES or space.dtype.itemsize > 16 * MAX_NAME:
        found = f"{math.prod(space.shape)} of {space.dtype.itemsize} bytes"
        raise UnsafeInputError(f"attribute {name} is too large", path=path, expected="a list of names", found=found)
    values = np.asarray(attributes[name]).reshape(-1).tolist()
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    wrong = next((text for text in texts if not isinstance(text, str) or not 0 < len(text) <= MAX_NAME), None)
    if wrong is not None:
        raise InputError(f"attribute {name} does not hold names", path=path, found=repr(wrong)[:80])
    return [text for text in texts if isinstance(text, str)]


def _is_dataset(found: Any) -> bool:
    return hasattr(found, "chunks")


def _group(parent: Any, name: str, path: str) -> Any:
    found = _find(parent, name, path)
    if _is_dataset(found):
        raise InputError("a dataset where a group should be", path=path, item=name)
    return found


def _find(root: Any, place: str, path: str) -> Any:
    """The object at ``place``, reached by hard links alone: soft and external ones lead elsewhere.

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
        name, here = part.encode(), not _is_dataset(found) and part != "."
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


def _tensor(dataset: Any, name: str, path: str, size: int) -> LazyTensor:
    """A dataset as a lazy tensor: bytes to be copied if they lie in one piece, else values to be read."""
    from h5py import h5d

    if not _is_dataset(dataset):
        raise InputError("a group where a weight should be", path=path, item=name)
    if dataset.is_virtual or dataset.external:
        what = "a virtual dataset" if dataset.is_virtual else "external storage"
        raise UnsafeInputError(f"refused {what}: data in other files", path=path, item=name)
    dtype, shape = dataset.dtype, dataset.shape
    if shape is None or dtype not in _DTYPES:
        raise UnsupportedError(
            "element type not supported", path=path, item=name, expected="float16, float32 or float64", found=dtype
        )
    if 0 in shape:
        return Stored((), dtype, shape)
    layout = dataset.id.get_create_plist().get_layout()
    nbytes = math.prod(shape) * dtype.itemsize
    if layout == h5d.CONTIGUOUS:
        return _contiguous(dataset.id.get_offset(), nbytes, dtype, shape, name, path, size)
    if layout == h5d.CHUNKED:
        _check_chunks(dataset, nbytes, name, path)
    native = dtype.newbyteorder("=")
    return Computed(partial(_read, path, dataset.name, native), native, shape)


def _contiguous(
    offset: int | None,
    nbytes: int,
    dtype: np.dtype[np.generic],
    shape: tuple[int, ...],
    name: str,
    path: str,
    size: int,
) -> LazyTensor:
    if offset is None:
        raise InputError("weight was never written", path=path, item=name, expected=f"{nbytes} bytes")
    if offset + nbytes > size:
        hint = "the download or copy did not finish: fetch the file again"
        expected, found = f"{offset + nbytes} bytes", f"{size} bytes"
        raise InputError("file is truncated", path=path, item=name, expected=expected, found=found, hint=hint)
    return Stored((Segment(path, offset, nbytes),), dtype, shape)


def _check_chunks(dataset: Any, nbytes: int, name: str, path: str) -> None:
    """Refuse what cannot be read, or would cost far more than the file's size lets expect.

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
    """The elements inside ``box``. The file is opened anew, for it must not stay open as long as the tensor lives."""
    with _opened(path) as file:
        return np.asarray(_find(file, name, path)[box], dtype)
