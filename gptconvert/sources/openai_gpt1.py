"""OpenAI's release of GPT-1: ten array files whose concatenation holds all weights.

``params_0.npy`` … ``params_9.npy`` are cut regardless of tensor boundaries; ``params_shapes.json`` lists the shapes
in order. Tensors have no names: the family's name table assigns them by order. A tensor that straddles two files
becomes two segments.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection

from gptconvert.containers.json import kind, parse_json, read_json_object
from gptconvert.containers.npy import read_npy
from gptconvert.containers.untrusted import entries, read_small
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.model.tensors import LazyTensor, Shape, Stored, TensorSet, merge_segments
from gptconvert.sources.format import EDITS, path_format
from gptconvert.sources.tokenizer_files import GPT1, find_tokenizer

TITLE = "OpenAI's GPT-1 arrays (params_0..9.npy)"
SHAPES, HPARAMS = "params_shapes.json", "hparams.json"
FILES = tuple(f"params_{i}.npy" for i in range(10))
MAX_SHAPES_BYTES = 1 << 20
MAX_HPARAMS_BYTES = 1 << 20
_MAX_SIDE = 1 << 31
#: Saved by the fine-tuning script: a joblib pickle of a list of arrays.
_FINE_TUNED = re.compile(r".*_params\.jl")
_PARAMS = re.compile(r"params_\d+\.npy")


def open_gpt1(path: str, options: Options) -> Source:
    """Open the GPT-1 release at ``path``: its directory or any file in it.

    Raises:
        InputError: array files are missing, unknown or damaged, or their total length does not match the shapes.
        UnsupportedError: a fine-tuned checkpoint (joblib), or arrays that are not floating point.
        UnsafeInputError: arrays of Python objects, or files that are not regular files.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    names = entries(folder)
    _refuse_fine_tuned(path, folder, names)
    _check_files(folder, names)
    shapes = _read_shapes(os.path.join(folder, SHAPES))
    arrays = [_read_array(os.path.join(folder, name)) for name in FILES]
    _check_arrays(folder, arrays, sum(map(math.prod, shapes)))
    config_path = options.hparams or (os.path.join(folder, HPARAMS) if HPARAMS in names else None)
    files = (*(os.path.join(folder, name) for name in FILES), os.path.join(folder, SHAPES))
    return Source(
        scheme="openai-gpt1",
        format=TITLE,
        path=folder,
        tensors=TensorSet({}, files),
        unnamed=_cut(arrays, shapes),
        config={} if config_path is None else read_json_object(config_path, MAX_HPARAMS_BYTES, HPARAMS),
        config_path=config_path,
        tokenizer=find_tokenizer([folder], GPT1),
    )


def recognises(path: str) -> bool:
    """Whether a path looks like a GPT-1 release, or like the output of its fine-tuning script."""
    if os.path.isdir(path):
        return any(
            _is_gpt1_file(name) and not os.path.isdir(os.path.join(path, name)) for name in entries(path, quiet=True)
        )
    return _is_gpt1_file(os.path.basename(path)) and os.path.lexists(path)


def _is_gpt1_file(name: str) -> bool:
    return name == SHAPES or bool(_PARAMS.fullmatch(name) or _FINE_TUNED.fullmatch(name))


def _refuse_fine_tuned(path: str, folder: str, names: Collection[str]) -> None:
    found = next((name for name in sorted(names) if _FINE_TUNED.fullmatch(name)), None)
    if _FINE_TUNED.fullmatch(os.path.basename(path)):
        found = os.path.basename(path)
    if found is None or (SHAPES in names and found != os.path.basename(path)):
        return
    raise UnsupportedError(
        "this is a fine-tuned OpenAI GPT-1, saved by joblib as a pickle, and loading a pickle can run code",
        path=os.path.join(folder, found),
        expected="params_0.npy … params_9.npy and params_shapes.json",
        hint="if you trust the file: we, *rest = joblib.load(FILE); "
        "arrays = [we[-n_ctx:], we[:-n_ctx], *rest[:-2]]; save the shapes as params_shapes.json and the ten parts of "
        "numpy.array_split(numpy.concatenate([a.ravel() for a in arrays]), 10) as params_0.npy … params_9.npy",
    )


def _check_files(folder: str, names: Collection[str]) -> None:
    """Require the ten array files and the shapes, and refuse further array files."""
    missing = [name for name in (*FILES, SHAPES) if name not in names]
    extra = sorted(name for name in names if _PARAMS.fullmatch(name) and name not in FILES)
    if not missing and not extra:
        return
    problems = [f"{what}: {', '.join(some)}" for what, some in (("missing", missing), ("unknown", extra)) if some]
    raise InputError(
        f"wrong set of GPT-1 files; {'; '.join(problems)}",
        path=folder,
        expected=f"the {len(FILES)} files {FILES[0]} … {FILES[-1]} and {SHAPES}",
        found=", ".join(sorted(n for n in names if _PARAMS.fullmatch(n) or n == SHAPES)) or "none of them",
        hint="copy all files of the release, and no other params files, into one directory",
    )


def _read_shapes(path: str) -> list[Shape]:
    """The shapes of all tensors, in order."""
    value = parse_json(read_small(path, MAX_SHAPES_BYTES, SHAPES), path, SHAPES)
    if not isinstance(value, list):
        raise InputError("wrong type of value", path=path, expected="a list of shapes", found=kind(value))
    for number, shape in enumerate(value):
        if not isinstance(shape, list) or any(type(n) is not int or not 0 < n < _MAX_SIDE for n in shape):
            raise InputError(
                "invalid shape",
                path=path,
                item=f"entry {number}",
                expected="a list of positive integers",
                found=repr(shape)[:80],
            )
    return [tuple(shape) for shape in value]


def _read_array(path: str) -> Stored:
    tensor: LazyTensor = read_npy(path)
    if not isinstance(tensor, Stored) or len(tensor.shape) != 1:
        raise InputError("wrong number of axes", path=path, expected="one axis", found=f"shape {list(tensor.shape)}")
    if tensor.dtype.kind != "f":
        raise UnsupportedError("elements are not floating point", path=path, expected="float32", found=tensor.dtype)
    return tensor


def _check_arrays(folder: str, arrays: Collection[Stored], total: int) -> None:
    """Require one element type, and as many elements in total as the shapes add up to."""
    if len({array.dtype for array in arrays}) > 1:
        listed = ", ".join(f"{name} {array.dtype.str}" for name, array in zip(FILES, arrays, strict=True))
        raise InputError("the files hold different element types", path=folder, expected="one type", found=listed)
    found = sum(array.size for array in arrays)
    if found != total:
        lengths = ", ".join(str(array.size) for array in arrays)
        raise InputError(
            f"the total length of the {len(FILES)} array files does not match {SHAPES}",
            path=folder,
            expected=f"{total} values",
            found=f"{found} values ({lengths})",
            hint="files of different models are mixed, or one is damaged: fetch them again",
        )


def _cut(arrays: list[Stored], shapes: list[Shape]) -> tuple[Stored, ...]:
    """Cut the concatenated arrays into tensors of the given shapes."""
    dtype, parts = arrays[0].dtype, tuple(part for array in arrays for part in array.parts)
    run = Stored(parts, dtype, (sum(array.size for array in arrays),))
    tensors, position = [], 0
    for shape in shapes:
        nbytes = math.prod(shape) * dtype.itemsize
        tensors.append(Stored(merge_segments(run.slice_bytes(position, position + nbytes)), dtype, shape))
        position += nbytes
    return tuple(tensors)


FORMAT = path_format(
    name="openai-gpt1",
    title=TITLE,
    recognises=recognises,
    read=open_gpt1,
    accepts=frozenset({"hparams", "n_head"}) | EDITS,
    shares_command="openai-tf",
)
