"""``flax_model.msgpack``: what transformers' Flax models saved. Located in place; no array is copied.

Sources: flax ``serialization.py`` (arrays of more than 2**30 bytes are maps of numbered pieces) and the rule by which
transformers 4 turned Flax's names and layout into PyTorch's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import TypeVar

from gptconvert.containers.msgpack import Value, read_msgpack
from gptconvert.errors import InputError
from gptconvert.model.tensors import LazyTensor, Stored, TensorSet, merge_segments
from gptconvert.model.transforms import transpose

CHUNKED = "__msgpack_chunked_array__"
#: Last part of Flax's names → PyTorch's.
LEAVES: Mapping[str, str] = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


T = TypeVar("T")


def read_flax(path: str) -> TensorSet:
    """The weights under the names and in the layout of transformers' PyTorch models.

    Raises:
        InputError: the file is damaged, or was not written by Flax.
        UnsafeInputError: it is nested without end, or holds arrays of Python objects.
        UnsupportedError: element types that are not read.
    """
    tree = read_msgpack(path)
    if not isinstance(tree, dict):
        raise InputError("not a map of parameters", path=path, found=type(tree).__name__)
    inner = tree.get("params")
    others = list[str]()
    if isinstance(inner, dict):  # a training state, or variables in Flax's collections
        tree, others = inner, [key for key in tree if key != "params"]
    tensors: dict[str, LazyTensor] = {}
    for parts, leaf in _leaves(tree, (), path):
        if isinstance(leaf, LazyTensor):
            _add(tensors, *hf_name(parts, leaf), path)
        else:
            others.append("/".join(parts))
    if not tensors:
        raise InputError("file holds no arrays by name", path=path, expected="Flax parameters")
    left = f"{os.path.basename(path)}: entries that are not parameters are left out: {', '.join(others[:5])}"
    return TensorSet(tensors, (path,), (left,) if others else ())


def _add(tensors: dict[str, LazyTensor], name: str, tensor: LazyTensor, path: str) -> None:
    if name in tensors:
        raise InputError("two arrays have one name", path=path, item=name)
    tensors[name] = tensor


def hf_name(parts: tuple[str, ...], tensor: LazyTensor) -> tuple[str, LazyTensor]:
    """PyTorch's name and layout: every kernel is transposed, GPT-2's Conv1D too, which Flax keeps [out, in]."""
    name = ".".join((*parts[:-1], LEAVES.get(parts[-1], parts[-1])))
    return name, transpose(tensor) if parts[-1] == "kernel" and len(tensor.shape) == 2 else tensor


def index_name(given: str) -> str:
    """The name under which :func:`read_flax` gives the array that a shard index calls ``given`` (``a/b/kernel``)."""
    *path, leaf = given.split("/")
    return ".".join((*path, LEAVES.get(leaf, leaf)))


def _leaves(tree: Mapping[str, Value], before: tuple[str, ...], path: str) -> Iterator[tuple[tuple[str, ...], Value]]:
    """(names on the way, leaf), in the file's order; numbered pieces of one array joined."""
    for key, value in tree.items():
        here = (*before, key)
        if not isinstance(value, dict):
            yield here, value
        elif CHUNKED in value:
            yield here, _joined(value, "/".join(here), path)
        else:
            yield from _leaves(value, here, path)


def _joined(pieces: Mapping[str, Value], name: str, path: str) -> LazyTensor:
    """One array out of the pieces that Flax cut it into.

    Raises:
        InputError: pieces are missing, or do not make an array of the shape promised.
    """
    shape = _numbered(pieces.get("shape"), int)
    parts = _numbered(pieces.get("chunks"), Stored)
    if shape is None or parts is None or not parts:
        raise InputError("pieces of a chunked array are missing or misnumbered", path=path, item=name)
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or sum(part.size for part in parts) != math.prod(shape):
        raise InputError(
            "pieces of a chunked array do not make it up",
            path=path,
            item=name,
            expected=f"{math.prod(shape)} elements of one type",
            found=f"{sum(part.size for part in parts)} of {', '.join(sorted(map(str, dtypes)))}",
        )
    return Stored(merge_segments([s for part in parts for s in part.parts]), dtypes.pop(), tuple(shape))


def _numbered(value: Value, kind: type[T]) -> list[T] | None:
    """The values of a map whose keys are "0", "1", … without a gap, in order; None: it is not such a map."""
    if not isinstance(value, dict) or not all(str(i) in value for i in range(len(value))):
        return None
    ordered = [value[str(i)] for i in range(len(value))]
    return ordered if all(isinstance(each, kind) and not isinstance(each, bool) for each in ordered) else None
