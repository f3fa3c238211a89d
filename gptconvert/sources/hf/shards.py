"""Sharded checkpoints: ``model.safetensors.index.json`` says which file holds each tensor.

The index comes from outside and names files, so each name must be that of a regular file in the index's own
directory; what each file really holds must then match the index, tensor by tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from gptconvert.containers.json import kind, read_json_object
from gptconvert.containers.untrusted import hub_homes, is_plain_name, is_regular, links_out
from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.model.tensors import FileChecksum, LazyTensor, TensorSet

#: Most bytes of an index; one of 100 000 tensors has 10 MB.
MAX_INDEX = 64 << 20
_LISTED = 10


def read_sharded(
    index: str | os.PathLike[str], read: Callable[[str], TensorSet], rename: Callable[[str], str] = str
) -> TensorSet:
    """All tensors of a sharded checkpoint, by the order of the index.

    Args:
        index: the index file.
        read: reads one shard.
        rename: the index's name for a tensor → the one ``read`` gives it.

    Raises:
        InputError: the index is malformed, shards are missing, or they do not hold what the index says.
        UnsafeInputError: a shard is outside the directory or is not a regular file.
    """
    index = os.fspath(index)
    weight_map = {rename(name): shard for name, shard in read_weight_map(index).items()}
    shards = {name: read(path) for name, path in shard_paths(index, weight_map).items()}
    _check_contents(index, weight_map, shards)
    tensors: dict[str, LazyTensor] = {name: shards[shard][name] for name, shard in weight_map.items()}
    files = tuple(file for shard in shards.values() for file in shard.files)
    notes = tuple(dict.fromkeys(note for shard in shards.values() for note in shard.notes))
    checksums: tuple[FileChecksum, ...] = tuple(c for shard in shards.values() for c in shard.checksums)
    return TensorSet(tensors, files, notes, checksums)


def read_weight_map(index: str) -> dict[str, str]:
    """Tensor name → shard file name, checked to be names of files, not paths.

    Raises:
        InputError: too large, not JSON, no usable ``weight_map``.
        UnsafeInputError: a shard's name leads out of the directory.
    """
    value = read_json_object(index, MAX_INDEX, "shard index").get("weight_map")
    if not isinstance(value, dict) or not value:
        found = "nothing" if value is None else "an empty object" if value == {} else kind(value)
        expected = "an object {tensor: file}"
        raise InputError("no weight_map in the shard index", path=index, expected=expected, found=found)
    wrong = [str(name) for name, shard in value.items() if not isinstance(shard, str)]
    if wrong:
        listed = _some(wrong)
        raise InputError("weight_map values must be file names", path=index, expected="strings", found=f"at {listed}")
    unsafe = [shard for shard in dict.fromkeys(value.values()) if not is_plain_name(shard)]
    if unsafe:
        raise UnsafeInputError(
            f"refused shard paths: {_some(unsafe)}", path=index, expected="names of files beside the index"
        )
    return value


def shard_paths(index: str, weight_map: Mapping[str, str]) -> dict[str, str]:
    """Shard name → path of a regular file, in the order of the names.

    Raises:
        InputError: shards are missing; all of them are listed.
        UnsafeInputError: shards are not regular files, or links that leave the directory.
    """
    directory = os.path.dirname(index)
    paths = {name: os.path.join(directory, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in paths.items() if not os.path.lexists(path)]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} shards are missing: {_some(missing)}",
            path=index,
            hint="copy or download them into the same directory",
        )
    homes = hub_homes(directory)
    links = [f"{name} → {os.readlink(path)}" for name, path in paths.items() if links_out(path, homes)]
    if links:
        raise UnsafeInputError(f"refused shard links that leave the directory: {_some(links)}", path=index)
    strange = [name for name, path in paths.items() if not is_regular(path)]
    if strange:
        raise UnsafeInputError(f"shards that are not regular files: {_some(strange)}", path=index)
    return paths


def _check_contents(index: str, weight_map: Mapping[str, str], shards: Mapping[str, TensorSet]) -> None:
    """Index and shards must name the same tensors, each in the same file."""
    announced = {(shard, name) for name, shard in weight_map.items()}
    present = {(shard, name) for shard, tensors in shards.items() for name in tensors}
    absent, extra = sorted(announced - present), sorted(present - announced)
    if absent or extra:
        parts = [_describe("missing from their shard", absent), _describe("not where the index says", extra)]
        raise InputError(
            f"shards do not hold what the index says: {'; '.join(part for part in parts if part)}",
            path=index,
            hint="index and shards must come from the same save; fetch all of them again",
        )


def _describe(what: str, pairs: Iterable[tuple[str, str]]) -> str:
    listed = [f"`{name}` in {shard}" for shard, name in pairs]
    return f"{what}: {_some(listed)}" if listed else ""


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
