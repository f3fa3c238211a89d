"""Safetensors in the Hugging Face layout: the files that transformers' ``save_pretrained`` would write.

The metadata is only ``{"format": "pt"}``, which transformers requires; the library writes multiple keys in random
order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gptconvert.containers.json import dump_json
from gptconvert.containers.safetensors import header_bytes
from gptconvert.errors import UnsupportedError
from gptconvert.families.registry import family_named
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import FLOATS
from gptconvert.model.encodings import cast_to
from gptconvert.model.export import Export, PlannedFile, place
from gptconvert.model.options import SHARD_BYTES, Options
from gptconvert.model.schemes import Scheme, expand, write_names
from gptconvert.model.tensors import LazyTensor
from reference_model.config import GPTConfig

NAME = "safetensors"
FILE_PATTERN = "model{suffix}.safetensors"
INDEX_FILE = "model.safetensors.index.json"
METADATA = {"format": "pt"}


def plan(checkpoint: Checkpoint, options: Options) -> tuple[Export, ...]:
    """One export: ``model.safetensors``, or its shards and their index.

    Raises:
        UnsupportedError: a weight does not have a float dtype.
    """
    checkpoint = cast_to(checkpoint, options.dtype)
    config = checkpoint.config
    scheme = family_named(config.family).scheme("hf")
    bare = is_bare(config)
    tensors = write_names(scheme, config, checkpoint.weights, bare=bare)
    weights = _canonical_names(scheme, config, bare)
    ordered = {name: tensors[name] for name in weights}
    shards = _split(ordered, options.max_shard_size or SHARD_BYTES)
    files = [
        safetensors_file(path, [(name, ordered[name], weights[name]) for name in names])
        for path, names in shards.items()
    ]
    path = files[0].path
    if len(files) > 1:
        path = INDEX_FILE
        files.append(PlannedFile.of_bytes(path, dump_json(_index(ordered, shards))))
    return (Export(NAME, path, checkpoint, tuple(files)),)


def is_bare(config: GPTConfig) -> bool:
    """Whether the model is a body without a head, whose tensors transformers saves without a prefix."""
    return config.task == "feature-extraction"


def safetensors_file(path: str, tensors: Iterable[tuple[str, LazyTensor, str | None]]) -> PlannedFile:
    """One safetensors file of (name, tensor, canonical weight), in any order.

    Raises:
        UnsupportedError: a tensor does not have a float dtype.
    """
    entries = list(tensors)
    by_name = {name: tensor for name, tensor, _ in entries}
    weights = {name: weight for name, _, weight in entries}
    _refuse_integers(by_name)
    head, ordered = header_bytes(by_name, METADATA)
    placed, nbytes = place(((name, by_name[name], weights[name]) for name in ordered), len(head), alignment=1)
    return PlannedFile(path, nbytes, head, placed)


def _refuse_integers(tensors: Mapping[str, LazyTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.newbyteorder("=") not in FLOATS:
            raise UnsupportedError(
                "weights of this type are not supported",
                item=name,
                expected=f"one of {', '.join(map(str, FLOATS))}",
                found=tensor.dtype.newbyteorder("="),
            )


def _canonical_names(scheme: Scheme, config: GPTConfig, bare: bool) -> dict[str, str]:
    """File name → canonical name, in the order of the model's modules, in which transformers fills shards."""
    layered = [k for k, row in enumerate(scheme.rows) if "{i}" in row.canonical]
    found: list[tuple[tuple[int, int, int], str, str]] = []
    for k, row in enumerate(scheme.rows):
        before, has_layers, _ = row.canonical.partition("{i}")
        for bound in expand([row], config, "" if bare else scheme.write_prefix):
            layer = int(bound.canonical.removeprefix(before).partition(".")[0]) if has_layers else 0
            part = 1 if has_layers else 0 if k < min(layered) else 2
            found += [((part, layer, k), name, bound.canonical) for name in bound.stored]
    return {name: canonical for _, name, canonical in sorted(found, key=lambda entry: entry[0])}


def _split(tensors: Mapping[str, LazyTensor], max_shard_size: int) -> dict[str, list[str]]:
    """Shard file → tensor names, split by huggingface_hub."""
    from huggingface_hub import split_state_dict_into_shards_factory

    def nbytes(tensor: LazyTensor) -> int:
        return tensor.nbytes

    planned = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=nbytes, filename_pattern=FILE_PATTERN, max_shard_size=max_shard_size
    )
    return planned.filename_to_tensors


def _index(tensors: Mapping[str, LazyTensor], shards: Mapping[str, list[str]]) -> dict[str, object]:
    """``model.safetensors.index.json`` as transformers 5 writes it."""
    sizes = {
        "total_parameters": sum(tensor.size for tensor in tensors.values()),
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
    }
    return {"metadata": sizes, "weight_map": {name: path for path, names in shards.items() for name in names}}
