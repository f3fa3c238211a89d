"""Refuse quantised checkpoints, and weights of other than float types, by headers alone.

Integers without their scales are not weights: read as numbers, they would pass every comparison with themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gptconvert.errors import UnsupportedError
from gptconvert.model.dtypes import FLOATS
from gptconvert.model.names import collapse
from gptconvert.model.shards import Parts
from gptconvert.model.tensors import LazyTensor

_ORIGINAL = "convert the model that it was quantised from"
_DEQUANTISE = (
    "convert the model that it was quantised from; or load it in transformers, call model.dequantize() and "
    "model.save_pretrained(DIR), and convert DIR"
)


@dataclass(frozen=True)
class Quantiser:
    """A program that quantises weights.

    Attributes:
        title: its name.
        beside: regular expression for the ends of tensor names that it stores besides or instead of weights.
        advice: how to get float weights.
    """

    title: str
    beside: str
    advice: str = _ORIGINAL


#: The first match wins: GPTQ differs from AWQ by ``g_idx``, the order of its input features.
QUANTISERS: tuple[Quantiser, ...] = (
    Quantiser("bitsandbytes, 8 bits", r"\.(SCB|weight_format)", _DEQUANTISE),
    Quantiser(
        "bitsandbytes, 4 bits",
        r"\.weight\.(nested_)?(absmax|quant_map|quant_state(\..+)?|bitsandbytes__.+)",
        _DEQUANTISE,
    ),
    Quantiser("GPTQ", r"\.g_idx"),
    Quantiser("AWQ or GPTQ", r"\.(qweight|qzeros)"),
    Quantiser("bitsandbytes, 8 bits in blocks", r"\.(absmax|code)"),
    Quantiser("HQQ", r"\.W_q"),
    Quantiser("quanto", r"\.weight\.(_data|_scale|_shift)"),
    Quantiser("AQLM", r"\.(codebooks|codes)"),
    Quantiser("compressed-tensors or float8", r"\.(weight|input)_(scale|scale_inv|packed|zero_point|shape|g_idx)"),
)
#: Kinds of numpy types → description of a weight stored so.
_KINDS: Mapping[str, str] = {"b": "booleans", "i": "integers without scales", "u": "integers without scales"}


def refuse_quantised(tensors: Mapping[str, LazyTensor], path: str | None) -> None:
    """Refuse a checkpoint whose tensor names are those of a known quantiser.

    Raises:
        UnsupportedError: it is quantised.
    """
    for quantiser in QUANTISERS:
        found = [name for name in tensors if re.search(rf"{quantiser.beside}\Z", name, re.DOTALL)]
        if found:
            raise UnsupportedError(
                f"this is a quantised checkpoint ({quantiser.title}), which is not supported",
                path=path,
                expected="weights of a float type",
                found=_listed((*_not_float(tensors, tensors), *found), tensors),
                hint=quantiser.advice,
            )


def refuse_other_types(names: Iterable[str], tensors: Mapping[str, LazyTensor], path: str | None) -> None:
    """Refuse weights of other than float types.

    Args:
        names: the tensors that are weights; mask buffers and the like may have any type.
        tensors: all tensors, by name.
        path: the checkpoint, used in error messages.

    Raises:
        UnsupportedError: at least one weight has another type; the message lists them.
    """
    wrong = _not_float(names, tensors)
    if wrong:
        dtype = next(dtype for dtype in types_of(tensors[wrong[0]]) if not is_float(dtype))
        kind = _KINDS.get(dtype.kind, "8-bit floats without scales" if dtype.itemsize == 1 else f"of type {dtype}")
        raise UnsupportedError(
            f"weights must be of a float type, but these are {kind}; the checkpoint looks quantised",
            path=path,
            item=wrong[0],
            expected=f"one of {', '.join(map(str, FLOATS))}",
            found=_listed(wrong, tensors),
            hint=_ORIGINAL,
        )


def types_of(tensor: LazyTensor) -> list[np.dtype[np.generic]]:
    """The different types of a tensor's parts, in order; parts may differ."""
    held = tensor.held if isinstance(tensor, Parts) else (tensor,)
    return list(dict.fromkeys(part.dtype for part in held))


def is_float(dtype: np.dtype[np.generic]) -> bool:
    """Whether a weight may have this type, in either byte order."""
    return dtype.newbyteorder("=") in FLOATS


def _not_float(names: Iterable[str], tensors: Mapping[str, LazyTensor]) -> list[str]:
    return [name for name in names if name in tensors and not all(map(is_float, types_of(tensors[name])))]


def _listed(names: Iterable[str], tensors: Mapping[str, LazyTensor], most: int = 5) -> str:
    """The names with their types, layer numbers folded."""
    by_type: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        by_type.setdefault(" and ".join(dtype.name for dtype in types_of(tensors[name])), []).append(name)
    shown = [f"{name} ({dtype})" for dtype, each in by_type.items() for name in collapse(each)]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
