"""``flax_model.msgpack``, as saved by transformers' Flax models. Arrays are located in the file, not copied.

Sources: flax ``serialization.py`` (arrays of more than 2**30 bytes are maps of numbered chunks) and transformers 4's
rule for converting Flax names and layout to PyTorch's.
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
    """Read the weights under the names and in the layout of transformers' PyTorch models.

    Raises:
        InputError: the file is damaged, or was not written by Flax.
        UnsafeInputError: nested too deeply, or arrays of Python objects.
        UnsupportedError: unsupported element types.
    """
    tree = read_msgpack(path)
    if not isinstance(tree, dict):
        raise InputError(
            "not a Flax checkpoint", path=path, expected="a map of parameters", found=type(tree).__name__
        )
    inner = tree.get("params")
    others = list[str]()
    if isinstance(inner, dict):  # a training state, or Flax variable collections
        tree, others = inner, [key for key in tree if key != "params"]
    tensors: dict[str, LazyTensor] = {}
    for parts, leaf in _leaves(tree, (), path):
        if isinstance(leaf, LazyTensor):
            _add(tensors, *hf_name(parts, leaf), path)
        else:
            others.append("/".join(parts))
    if not tensors:
        raise InputError("no named arrays in this file", path=path, expected="Flax parameters")
    left = f"{os.path.basename(path)}: entries that are not parameters were left out: {', '.join(others[:5])}"
    return TensorSet(tensors, (path,), (left,) if others else ())


def _add(tensors: dict[str, LazyTensor], name: str, tensor: LazyTensor, path: str) -> None:
    if name in tensors:
        raise InputError("two arrays have the same name", path=path, item=name)
    tensors[name] = tensor


def hf_name(parts: tuple[str, ...], tensor: LazyTensor) -> tuple[str, LazyTensor]:
    """PyTorch's name and layout. Every kernel is transposed, even GPT-2's Conv1D, which Flax stores [out, in]."""
    name = ".".join((*parts[:-1], LEAVES.get(parts[-1], parts[-1])))
    return name, transpose(tensor) if parts[-1] == "kernel" and len(tensor.shape) == 2 else tensor


def index_name(given: str) -> str:
    """An array's name in a shard index (``a/b/kernel``) → its name from :func:`read_flax`."""
    *path, leaf = given.split("/")
    return ".".join((*path, LEAVES.get(leaf, leaf)))


def _leaves(tree: Mapping[str, Value], before: tuple[str, ...], path: str) -> Iterator[tuple[tuple[str, ...], Value]]:
    """(path of names, leaf) in file order, with the chunks of an array joined."""
    for key, value in tree.items():
        here = (*before, key)
        if not isinstance(value, dict):
            yield here, value
        elif CHUNKED in value:
            yield here, _joined(value, "/".join(here), path)
        else:
            yield from _leaves(value, here, path)


def _joined(pieces: Mapping[str, Value], name: str, path: str) -> LazyTensor:
    """Join the chunks that Flax split an array into.

    Raises:
        InputError: chunks are missing, or do not add up to the shape.
    """
    shape = _numbered(pieces.get("shape"), int)
    parts = _numbered(pieces.get("chunks"), Stored)
    if shape is None or parts is None or not parts:
        raise InputError(
            "chunks of an array are missing or misnumbered", path=path, item=name, expected="chunks 0, 1, …"
        )
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or sum(part.size for part in parts) != math.prod(shape):
        raise InputError(
            "the chunks of an array do not match its shape",
            path=path,
            item=name,
            expected=f"{math.prod(shape)} elements of one type",
            found=f"{sum(part.size for part in parts)} of {', '.join(sorted(map(str, dtypes)))}",
        )
    return Stored(merge_segments([s for part in parts for s in part.parts]), dtypes.pop(), tuple(shape))


def _numbered(value: Value, kind: type[T]) -> list[T] | None:
    """The values of a map with the keys "0", "1", … without gaps, in order; None if ``value`` is not such a map."""
    if not isinstance(value, dict) or not all(str(i) in value for i in range(len(value))):
        return None
    ordered = [value[str(i)] for i in range(len(value))]
    return ordered if all(isinstance(each, kind) and not isinstance(each, bool) for each in ordered) else None
