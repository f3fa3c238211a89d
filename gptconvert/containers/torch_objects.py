"""The globals that a ``torch.save`` pickle may use, and the lazy tensors that replace PyTorch's.

A storage is a byte range of the file; a tensor is a storage, an offset, a shape and strides, in elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeGuard, cast

import numpy as np

from gptconvert.containers.pickle import (
    RESAVE,
    Attributes,
    Global,
    Opaque,
    RefusedError,
    Rules,
    describe,
    ordered_dict,
)
from gptconvert.errors import InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.dtypes import ELEMENT_TYPES
from gptconvert.model.tensors import (
    Array,
    Box,
    Computed,
    LazyTensor,
    Segment,
    Shape,
    Stored,
    Transposed,
    map_segment,
)

#: PyTorch's name for a dtype → numpy dtype.
DTYPES: Mapping[str, np.dtype[np.generic]] = {row.torch: row.dtype for row in ELEMENT_TYPES if row.torch is not None}
#: Storage class → PyTorch's name for a dtype. Classes of other types are refused when a tensor uses them.
STORAGES: Mapping[str, str] = {
    row.storage: row.torch for row in ELEMENT_TYPES if row.storage is not None and row.torch is not None
}
#: Types that a file may mention but whose tensors are refused.
_STRANGE_STORAGES = ("ComplexFloatStorage", "ComplexDoubleStorage", "QInt8Storage", "QUInt8Storage", "QInt32Storage")
_STRANGE_DTYPES = (
    "complex32 complex64 complex128 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 "
    "qint8 quint8 qint32"
).split()
#: Enumerations in Megatron-LM's arguments that describe the kind of model.
_MEGATRON_CONSTANTS = tuple(
    Global(module, name)
    for module in ("megatron.enums", "megatron.model.enums", "megatron.core.enums", "megatron.core.transformer.enums")
    for name in ("ModelType", "LayerType", "AttnType", "AttnMaskType", "AttnBackend", "PositionEmbeddingType")
)
#: Modules under which versions of Python save paths.
_PATHS = tuple(Global(m, name) for m in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath"))
#: Classes of tensors that are saved with attributes of their own, such as Megatron-LM's ``partition_dim``.
_TENSORS = (Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter"))
_UNTYPED = (Global("torch.storage", "UntypedStorage"), Global("torch", "UntypedStorage"))
#: PyTorch's own limit on the number of axes.
_MAX_RANK = 64
_MAX_ELEMENTS = 1 << 63

#: Saved beside the weights by DeepSpeed and GPT-NeoX: sets of names, buffers, arguments.
_DEEPSPEED_STATE = (
    Global("__builtin__", "set"),
    Global("builtins", "set"),
    Global("_io", "BytesIO"),
    Global("megatron.neox_arguments.arguments", "NeoXArgs"),
)

#: (storage key, number of elements, bytes per element) → byte range.
Locate = Callable[[str, int, int], Segment]
ByteOrder = Literal["<", ">"]


@dataclass(frozen=True, slots=True)
class Storage:
    """Contiguous elements in the file; ``dtype`` is None for an untyped storage, whose elements are bytes."""

    key: str
    data: Segment
    dtype: np.dtype[np.generic] | None


def torch_rules(path: str, locate: Locate, byte_order: ByteOrder = "<") -> Rules:
    """The globals allowed in the pickles of the file ``path``.

    Args:
        path: the file, used in error messages.
        locate: returns a storage's byte range.
        byte_order: of the storages' elements, as numpy writes it: ``<`` or ``>``.
    """
    calls: dict[Global, Callable[[tuple[object, ...]], object]] = {
        Global("collections", "OrderedDict"): ordered_dict,
        Global("torch._utils", "_rebuild_tensor"): partial(_rebuild, byte_order, range(4, 5), None),
        Global("torch._utils", "_rebuild_tensor_v2"): partial(_rebuild, byte_order, range(6, 8), None),
        Global("torch._utils", "_rebuild_tensor_v3"): partial(_rebuild, byte_order, range(7, 9), 6),
        Global("torch._utils", "_rebuild_parameter"): partial(_rebuild_parameter, 3),
        Global("torch._utils", "_rebuild_parameter_with_state"): partial(_rebuild_parameter, 4),
        Global("torch._utils", "_rebuild_qtensor"): lambda _: Opaque("quantised tensor"),  # its storage is refused
        Global("torch", "Size"): _size,
        Global("torch", "device"): lambda _: Opaque("device"),
        Global("_codecs", "encode"): lambda _: Opaque("bytes"),
        Global("numpy", "dtype"): lambda _: Opaque("numpy dtype"),
        Global("numpy.core.multiarray", "scalar"): lambda _: Opaque("numpy scalar"),
        Global("numpy._core.multiarray", "scalar"): lambda _: Opaque("numpy scalar"),
        # Saved beside the weights by training scripts: their arguments, and the states of random number generators.
        Global("argparse", "Namespace"): lambda _: Attributes(),
        Global("types", "SimpleNamespace"): lambda _: Attributes(),
        **{name: lambda _: Opaque("path") for name in _PATHS},
        Global("numpy.core.multiarray", "_reconstruct"): lambda _: Opaque("numpy array"),
        Global("numpy._core.multiarray", "_reconstruct"): lambda _: Opaque("numpy array"),
        **{name: lambda _: Opaque("constant of Megatron-LM") for name in _MEGATRON_CONSTANTS},
        **{name: lambda _: Opaque("state of DeepSpeed or GPT-NeoX") for name in _DEEPSPEED_STATE},
    }
    calls[Global("torch._tensor", "_rebuild_from_type_v2")] = partial(_rebuild_with_attributes, dict(calls))
    storages = (Global(m, s) for m in ("torch", "torch.cuda") for s in (*STORAGES, *_STRANGE_STORAGES))
    dtypes = (Global("torch", name) for name in (*DTYPES, *_STRANGE_DTYPES))
    return Rules(
        calls,
        frozenset((*storages, *dtypes, *_UNTYPED, *_TENSORS, Global("numpy", "ndarray"))),
        partial(_storage, path, locate),
    )


def _storage(path: str, locate: Locate, identity: object) -> Storage:
    """A persistent id ``("storage", class, key, device, elements[, view])`` → the storage."""
    if not isinstance(identity, tuple) or not identity:
        raise RefusedError("a persistent id that is not a tuple")
    if identity[0] == "module":
        raise UnsafeInputError(
            "file holds a whole pickled model object", path=path, hint=f"save the weights, {RESAVE}"
        )
    if identity[0] != "storage" or len(identity) not in (5, 6):
        raise RefusedError("a persistent id that is not a storage")
    kind, key, elements = identity[1], identity[2], identity[4]
    if not isinstance(kind, Global) or not isinstance(key, str):
        raise RefusedError("a storage without a type or a key")
    if len(identity) == 6 and identity[5] is not None:
        raise UnsupportedError(
            "storages that are views of others are not supported", path=path, hint=f"save it {RESAVE}"
        )
    if not _is_count(elements):
        raise RefusedError(f"storage {key} has {describe(elements)} elements")
    dtype = None if kind in _UNTYPED else _dtype(kind.name, STORAGES.get(kind.name, ""), path)
    return Storage(key, locate(key, elements, 1 if dtype is None else dtype.itemsize), dtype)


def _dtype(name: str, torch_name: str, path: str | None) -> np.dtype[np.generic]:
    if name.lower().startswith(("qint", "quint")):
        raise UnsupportedError(
            "this is a quantised checkpoint (torch.ao.quantization), which is not supported",
            path=path,
            expected="weights of a float type",
            found=name,
            hint="convert the model that it was quantised from",
        )
    if torch_name not in DTYPES:
        expected = f"one of {' '.join(DTYPES)}"
        raise UnsupportedError("element type not supported", path=path, expected=expected, found=name)
    return DTYPES[torch_name]


def _rebuild(byte_order: ByteOrder, counts: range, dtype_at: int | None, arguments: tuple[object, ...]) -> LazyTensor:
    """``(storage, offset, size, stride, ...)`` → the tensor; its dtype is argument ``dtype_at`` if given."""
    if len(arguments) not in counts:
        raise RefusedError(f"a tensor of {len(arguments)} arguments")
    storage, offset, size, stride = arguments[:4]
    named = None if dtype_at is None else arguments[dtype_at]
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor without a storage")
    dtype = _dtype(str(named), named.name, None) if isinstance(named, Global) else storage.dtype
    if dtype is None:
        raise RefusedError("a tensor without an element type")
    if (
        not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or len(size) != len(stride)
        or len(size) > _MAX_RANK
    ):
        raise RefusedError("a tensor whose size and stride do not match")
    if not all(_is_count(n) for n in (offset, *size, *stride)) or math.prod(size) >= _MAX_ELEMENTS:
        raise RefusedError(
            f"a tensor of offset {describe(offset)}, size {_short(size)}, stride {_short(stride)}: "
            "negative or too large"
        )
    return _view(storage, dtype.newbyteorder(byte_order), cast("int", offset), size, stride)


def _view(
    storage: Storage, dtype: np.dtype[np.generic], offset: int, size: Shape, stride: Sequence[int]
) -> LazyTensor:
    """Elements ``offset + i·stride`` of a storage, in the cheapest form that their order allows."""
    item, data = dtype.itemsize, storage.data
    if 0 in size:
        return Stored((), dtype, size)
    span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if (offset + span) * item > data.nbytes:
        raise InputError(
            f"storage {storage.key} is smaller than a tensor of size {_short(size)} and stride {_short(stride)}",
            path=data.path,
            expected=f"{(offset + span) * item} bytes",
            found=f"{data.nbytes} bytes",
        )
    part = Segment(data.path, data.offset + offset * item, span * item)
    if _is_packed(size, stride):
        return Stored((part,), dtype, size)
    if len(size) == 2 and _is_packed(size[::-1], stride[::-1]):
        return Transposed(Stored((part,), dtype, size[::-1]))
    return Computed(partial(_gather, part, dtype, tuple(stride)), dtype.newbyteorder("="), size)


def _is_packed(size: Shape, stride: Sequence[int]) -> bool:
    """Whether the strides are those of a row-major array; an axis of length 1 may have any stride."""
    expected = 1
    for n, s in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and s != expected:
            return False
        expected *= n
    return True


def _gather(part: Segment, dtype: np.dtype[np.generic], stride: Shape, box: Box) -> Array:
    """The elements inside ``box`` of a strided tensor that begins at ``part``."""
    shape = tuple(s.stop - s.start for s in box)
    native = dtype.newbyteorder("=")
    if 0 in shape:
        return np.empty(shape, native)
    first = sum(s.start * step for s, step in zip(box, stride, strict=True))
    span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    raw = map_segment(Segment(part.path, part.offset + first * dtype.itemsize, span * dtype.itemsize))
    steps = [step * dtype.itemsize for step in stride]
    view = np.lib.stride_tricks.as_strided(raw.view(dtype), shape, steps, writeable=False)
    return np.array(view, native, order="C")


def _rebuild_parameter(count: int, arguments: tuple[object, ...]) -> LazyTensor:
    if len(arguments) != count or not isinstance(arguments[0], LazyTensor):
        raise RefusedError("a parameter that is not a tensor")
    return arguments[0]


def _rebuild_with_attributes(
    calls: Mapping[Global, Callable[[tuple[object, ...]], object]], arguments: tuple[object, ...]
) -> LazyTensor:
    """``_rebuild_from_type_v2(function, type, arguments, attributes)``: the tensor without its attributes."""
    function, kind, inner = arguments[:3]
    if kind not in _TENSORS or function not in calls or not isinstance(inner, tuple):
        raise RefusedError("a tensor of another class")
    tensor = calls[cast("Global", function)](inner)
    if not isinstance(tensor, LazyTensor):
        raise RefusedError("a tensor built from something else")
    return tensor


def _size(arguments: tuple[object, ...]) -> object:
    """``torch.Size((2, 3))`` → (2, 3), the same object: a copy per reference would take unbounded memory."""
    if len(arguments) != 1 or not isinstance(arguments[0], (tuple, list)):
        raise RefusedError("a size that is not a tuple")
    return arguments[0]


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_ELEMENTS


def _short(values: Sequence[object]) -> str:
    return f"({', '.join(map(describe, values))})"[:80]
