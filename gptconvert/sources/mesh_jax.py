"""GPT-J as its trainer saved it (mesh-transformer-jax): every parameter split across shards, without names.

``step_N/shard_K/0.npz`` … ``15.npz`` hold one shard's part of every parameter in a fixed order. The family's name
table assigns names by that order and defines how the parts are merged.
Sources: kingoflolz/mesh-transformer-jax ``checkpoint.py``, ``layers.py``, ``slim_model.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gptconvert.containers.json import read_json_object
from gptconvert.containers.npz import read_npz
from gptconvert.containers.untrusted import entries, explain_file, file_size, read_small
from gptconvert.errors import GptConvertError, InputError, UnsupportedError, UsageError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.shards import Parts
from gptconvert.model.source import Source
from gptconvert.model.tensors import FileChecksum, LazyTensor, TensorSet
from gptconvert.sources.format import EDITS, path_format
from gptconvert.sources.tokenizer_files import find_tokenizer

TITLE = "GPT-J original (mesh-transformer-jax shards)"
#: Files per shard.
PIECES = 16
MAX_CONFIG_BYTES = 1 << 20

_SHARD, _STEP = re.compile(r"shard_(\d{1,4})"), re.compile(r"step_(\d{1,18})")


def open_mesh_jax(path: str, options: Options) -> Source:
    """Open the checkpoint in the directory ``path``: that of one step, or the one that holds the steps.

    Raises:
        InputError: shards or files are missing, damaged or do not belong together.
        UnsupportedError: the trainer's second layout (``meta.json`` and ``params/``).
        UnsafeInputError: arrays of Python objects, compressed archives, or files that are not regular files.
        UsageError: the path names one step and ``options.step`` another.
    """
    folder, notes = _locate(path, options.step)
    shards = _read_shards(folder)
    config_path = options.hparams or _find_config(folder)
    return Source(
        scheme=FORMAT.name,
        format=TITLE,
        path=folder,
        tensors=TensorSet({}, tuple(file for shard in shards for file in shard.files)),
        unnamed=_parts(shards),
        config={} if config_path is None else read_json_object(config_path, MAX_CONFIG_BYTES, "configuration"),
        config_path=config_path,
        tokenizer=find_tokenizer([folder, os.path.dirname(os.path.abspath(folder))]),
        notes=tuple(notes),
    )


def recognises(path: str) -> bool:
    """Whether ``path`` is a directory with shards, with steps that hold shards, or in the second layout."""
    if not os.path.isdir(path):
        return False
    inside = [path, *(os.path.join(path, name) for name in entries(path, quiet=True) if _STEP.fullmatch(name))]
    return _is_second_layout(path) or _is_shard(path) or any(map(_has_shards, inside))


@dataclass(frozen=True)
class _Shard:
    """One shard's part of every parameter, in the trainer's order."""

    files: tuple[str, ...]
    leaves: tuple[LazyTensor, ...]
    checksums: tuple[FileChecksum, ...]


def _locate(path: str, step: int | None) -> tuple[str, list[str]]:
    """The directory with the shards, and notes on the choices made to find it."""
    if not os.path.isdir(path):
        file_size(path)
        explained = explain_file(path)
        what = f"this file {explained}" if explained else "this is a file"
        raise InputError(what, path=path, expected="the directory that holds shard_0 …")
    if _is_second_layout(path):
        raise UnsupportedError(
            "this is mesh-transformer-jax's second layout (meta.json and params/shard_K.npz), whose model has fused "
            "projections and is not supported",
            path=path,
            expected="step_N/shard_K/0.npz … 15.npz, as slim_model.py writes them",
        )
    if _is_shard(path):
        raise InputError("this is one shard of several", path=path, hint="pass the directory that holds all shards")
    if _has_shards(path):
        name = os.path.basename(os.path.abspath(path))
        if step is not None and name != f"step_{step}":
            hint = "pass the directory that holds the steps, or omit --step"
            raise UsageError(f"the path and --step {step} name different checkpoints", path=path, hint=hint)
        return path, []
    return _in_steps(path, step)


def _in_steps(path: str, step: int | None) -> tuple[str, list[str]]:
    names = [name for name in entries(path) if _STEP.fullmatch(name) and _has_shards(os.path.join(path, name))]
    steps = {int(name.removeprefix("step_")): name for name in names}
    if not steps or (step is not None and step not in steps):
        raise InputError(
            "no checkpoint in this directory" if step is None else f"no checkpoint of step {step}",
            path=path,
            expected="step_N/shard_0 …",
            found=", ".join(names) or ", ".join(entries(path)[:8]) or "an empty directory",
        )
    chosen = steps[max(steps) if step is None else step]
    how = "the highest step" if step is None else "as requested"
    note = f"{len(steps)} checkpoints in the directory: {chosen} was read, {how}"
    return os.path.join(path, chosen), [note] if len(steps) > 1 else []


def _read_shards(folder: str) -> list[_Shard]:
    numbers = sorted(int(m[1]) for name in entries(folder) if (m := _SHARD.fullmatch(name)))
    names = [os.path.join(f"shard_{n}", f"{i}.npz") for n in range(numbers[-1] + 1) for i in range(PIECES)]
    missing = [name for name in names if not os.path.lexists(os.path.join(folder, name))]
    if missing:
        listed = ", ".join(missing[:8]) + (f" … ({len(missing)} in all)" if len(missing) > 8 else "")
        raise InputError(
            f"files are missing: {listed}",
            path=folder,
            expected=f"{PIECES} files in each of shard_0 … shard_{numbers[-1]}",
            hint="unpack the whole archive, or copy all shards into one directory",
        )
    shards = [_read_shard(folder, number) for number in numbers]
    counts = [len(shard.leaves) for shard in shards]
    if len({*counts}) > 1:
        raise InputError(
            "the shards hold different numbers of arrays",
            path=folder,
            expected="equal numbers",
            found=f"{counts}",
            hint="shards of different checkpoints are mixed, or one is damaged: copy all shards again",
        )
    return shards


def _read_shard(folder: str, number: int) -> _Shard:
    files = tuple(os.path.join(folder, f"shard_{number}", f"{i}.npz") for i in range(PIECES))
    archives = [read_npz(path, void2=BFLOAT16) for path in files]
    for path, archive in zip(files, archives, strict=True):
        if list(archive.arrays) != [f"arr_{i}" for i in range(len(archive.arrays))]:
            found = ", ".join(list(archive.arrays)[:5])
            raise InputError("unexpected array names", path=path, expected="arr_0, arr_1, …", found=found)
    counts = [len(archive.arrays) for archive in archives]
    whole, longer = divmod(sum(counts), PIECES)
    wanted = [whole + (i < longer) for i in range(PIECES)]
    if counts != wanted:
        raise InputError(
            "the arrays are not distributed over the files as the trainer distributes them",
            path=os.path.dirname(files[0]),
            expected=f"{wanted} arrays",
            found=f"{counts} arrays",
            hint="files are missing arrays or were swapped: copy the shard again",
        )
    leaves = tuple(array for archive in archives for array in archive.arrays.values())
    return _Shard(files, leaves, tuple(c for archive in archives for c in archive.checksums.values()))


def _parts(shards: Sequence[_Shard]) -> tuple[Parts, ...]:
    """The parts of each parameter, one per shard, in the trainer's order."""
    leaves, checksums = (
        zip(*(s.leaves for s in shards), strict=True),
        zip(*(s.checksums for s in shards), strict=True),
    )
    return tuple(Parts(parts, "shard", sums) for parts, sums in zip(leaves, checksums, strict=True))


def _find_config(folder: str) -> str | None:
    """The training configuration next to the shards or the steps, recognised by its keys; None if absent."""
    parent = os.path.dirname(os.path.abspath(folder))
    places = [os.path.join(place, n) for place in (folder, parent) for n in entries(place, quiet=True)]
    found = [path for path in places if path.endswith(".json") and _is_config(path)]
    if len(found) > 1:
        raise InputError(
            "several configuration files",
            path=folder,
            expected="one",
            found=", ".join(os.path.basename(path) for path in found),
            hint="choose one with --hparams FILE",
        )
    return found[0] if found else None


def _is_config(path: str) -> bool:
    try:
        text = read_small(path, MAX_CONFIG_BYTES, "a configuration")
    except GptConvertError:
        return False
    return b'"d_model"' in text and b'"n_heads"' in text


def _has_shards(folder: str) -> bool:
    return any(_SHARD.fullmatch(n) and _is_shard(os.path.join(folder, n)) for n in entries(folder, quiet=True))


def _is_shard(folder: str) -> bool:
    name = os.path.basename(os.path.abspath(folder))
    return bool(_SHARD.fullmatch(name)) and any(n.endswith(".npz") for n in entries(folder, quiet=True))


def _is_second_layout(folder: str) -> bool:
    inner = entries(os.path.join(folder, "params"), quiet=True)
    return os.path.lexists(os.path.join(folder, "meta.json")) and any(
        re.fullmatch(r"shard_\d+\.npz", name) for name in inner
    )


FORMAT = path_format(
    name="mesh-jax",
    title=TITLE,
    recognises=recognises,
    read=open_mesh_jax,
    accepts=frozenset({"step", "hparams"}) | EDITS,
)
