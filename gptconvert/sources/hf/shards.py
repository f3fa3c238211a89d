"""Sharded checkpoints: ``model.safetensors.index.json`` maps each tensor to a file.

The index is untrusted, so each name in it must be that of a regular file in the index's own directory; the files'
contents must then match the index tensor by tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping

from gptconvert.containers.json import kind, read_json_object
from gptconvert.containers.untrusted import hub_homes, is_plain_name, is_regular, links_out
from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.model.tensors import FileChecksum, LazyTensor, TensorSet

#: Largest index accepted, in bytes; an index of 100 000 tensors takes 10 MB.
MAX_INDEX = 64 << 20
_LISTED = 10
#: Names of mask buffers, tables of rotary angles, and heads that may repeat the embedding.
REPEATED = re.compile(
    r"\.(attn|attention)\.(bias|masked_bias|rotary_emb\.inv_freq|embed_positions)\Z|(^|\.)(lm_head|embed_out)\.weight\Z"
)


def read_sharded(
    index: str | os.PathLike[str], read: Callable[[str], TensorSet], rename: Callable[[str], str] = str
) -> TensorSet:
    """Read all tensors of a sharded checkpoint, in the index's order.

    Args:
        index: the index file.
        read: reads one shard.
        rename: a tensor's name in the index → its name from ``read``.

    Raises:
        InputError: the index is malformed, shards are missing, or their contents do not match the index.
        UnsafeInputError: a shard is outside the directory or is not a regular file.
    """
    index = os.fspath(index)
    weight_map = {rename(name): shard for name, shard in read_weight_map(index).items()}
    shards = {name: read(path) for name, path in shard_paths(index, weight_map).items()}
    weight_map, differences = _without_buffers(os.path.basename(index), weight_map, shards)
    _check_contents(index, weight_map, shards)
    tensors: dict[str, LazyTensor] = {name: shards[shard][name] for name, shard in weight_map.items()}
    files = tuple(file for shard in shards.values() for file in shard.files)
    notes = tuple(dict.fromkeys(note for shard in shards.values() for note in shard.notes))
    checksums: tuple[FileChecksum, ...] = tuple(c for shard in shards.values() for c in shard.checksums)
    return TensorSet(tensors, files, (*differences, *notes), checksums)


def read_weight_map(index: str) -> dict[str, str]:
    """Tensor name → shard file name. Paths instead of plain file names are refused.

    Raises:
        InputError: too large, not JSON, or without a usable ``weight_map``.
        UnsafeInputError: a shard's name is not a plain file name.
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
            f"refused shard paths: {_some(unsafe)}", path=index, expected="names of files next to the index"
        )
    return value


def shard_paths(index: str, weight_map: Mapping[str, str]) -> dict[str, str]:
    """Shard name → path of a regular file, sorted by name.

    Raises:
        InputError: shards are missing; the message lists them all.
        UnsafeInputError: shards are not regular files, or are links that leave the directory.
    """
    directory = os.path.dirname(index)
    paths = {name: os.path.join(directory, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in paths.items() if not os.path.lexists(path)]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} shards are missing: {_some(missing)}",
            path=index,
            hint="copy or download them into the index's directory",
        )
    homes = hub_homes(directory)
    links = [f"{name} → {os.readlink(path)}" for name, path in paths.items() if links_out(path, homes)]
    if links:
        raise UnsafeInputError(
            f"refused shard links that leave the directory: {_some(links)}",
            path=index,
            hint="if you trust the files, copy them into the directory",
        )
    strange = [name for name, path in paths.items() if not is_regular(path)]
    if strange:
        raise UnsafeInputError(
            f"shards that are not regular files: {_some(strange)}", path=index, expected="regular files"
        )
    return paths


def _without_buffers(
    index: str, weight_map: Mapping[str, str], shards: Mapping[str, TensorSet]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The index without buffers and tied heads that no shard holds, and with those that it fails to list; a note.

    Versions of transformers differ in whether they save them, and tools rewrite shards but not their index.
    """
    held = {name: shard for shard, tensors in shards.items() for name in tensors if REPEATED.search(name)}
    gone = {name for name in weight_map if REPEATED.search(name) and name not in held}
    added = {name: shard for name, shard in held.items() if name not in weight_map}
    kept = {name: shard for name, shard in weight_map.items() if name not in gone} | added
    listed = _some(sorted([*gone, *added]))
    return kept, (f"{index} and the shards differ in buffers or tied heads: {listed}",) if gone or added else ()


def _check_contents(index: str, weight_map: Mapping[str, str], shards: Mapping[str, TensorSet]) -> None:
    """Require that each shard holds exactly the tensors that the index assigns to it."""
    indexed = {(shard, name) for name, shard in weight_map.items()}
    present = {(shard, name) for shard, tensors in shards.items() for name in tensors}
    absent, extra = sorted(indexed - present), sorted(present - indexed)
    if absent or extra:
        parts = [_describe("missing from their shard", absent), _describe("not listed there in the index", extra)]
        raise InputError(
            f"the shards do not match the index: {'; '.join(part for part in parts if part)}",
            path=index,
            hint="the index and the shards must come from the same save: fetch all of them again",
        )


def _describe(what: str, pairs: Iterable[tuple[str, str]]) -> str:
    listed = [f"`{name}` in {shard}" for shard, name in pairs]
    return f"{what}: {_some(listed)}" if listed else ""


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
