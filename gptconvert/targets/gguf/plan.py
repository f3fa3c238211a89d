"""GGUF files, one of each type, streamed: metadata and the table of tensors, then every tensor aligned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from gptconvert.containers.gguf import (
    ALIGNMENT,
    INT32,
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    UINT16,
    Value,
    head_bytes,
    split_name,
)
from gptconvert.errors import UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Export, Placed, PlannedFile, place
from gptconvert.model.ggml import BLOCK
from gptconvert.model.options import GGUF_QUANTISED, Options
from gptconvert.targets.gguf.layout import FALLBACK, Item, as_computed, items_of, stored_as, type_of, why_not
from gptconvert.targets.gguf.metadata import architecture_metadata, general_metadata, model_name
from gptconvert.targets.gguf.tokenizer import tokenizer_metadata
from gptconvert.targets.lossy import check_used

NAME = "gguf"
#: ``--dtype`` → the type of file that has it.
OF_DTYPE: Mapping[str | None, str] = {None: "f16", "fp32": "f32", "fp16": "f16", "bf16": "bf16"}

Split = Mapping[str, Value | tuple[int, int]]


def plan(checkpoint: Checkpoint, options: Options) -> tuple[Export, ...]:
    """One export for each type: a file, or several if it is larger than ``max_shard_size``.

    Raises:
        UnsupportedError: llama.cpp has no graph for this model, or cannot express its tokenizer; all reasons are
            listed.
        UsageError: an option has no effect.
    """
    check_used(options, options.gguf_type, GGUF_QUANTISED, "--gguf-type q8_0, q5_0 or q4_0")
    if reasons := why_not(checkpoint.config):
        raise UnsupportedError(
            "llama.cpp cannot compute this model: " + "; ".join(reasons), hint="use --to onnx, which preserves it"
        )
    computed = as_computed(checkpoint)
    tokenizer, notes = tokenizer_metadata(checkpoint)
    if computed is not checkpoint:
        notes += ("the scaling of attention scores is part of the query weights in GGUF, rounded once to float32",)
    if checkpoint.config.activation == "gelu_erf":
        notes += ("llama.cpp computes the tanh GELU, which differs from the erf formula by up to 0.0005",)
    return tuple(
        _export(computed, kind.upper(), tokenizer, options.max_shard_size, () if number else notes)
        for number, kind in enumerate(kinds(options))
    )


def kinds(options: Options) -> list[str]:
    """The types of the files to write, each once."""
    return list(dict.fromkeys(options.gguf_type)) or [OF_DTYPE[options.dtype]]


def _export(
    checkpoint: Checkpoint,
    kind: str,
    tokenizer: Mapping[str, Value],
    most: int | None,
    notes: tuple[str, ...],
) -> Export:
    stored = stored_as(checkpoint, lambda name, shape: type_of(kind, name, shape))
    metadata = {**general_metadata(checkpoint, kind), **architecture_metadata(checkpoint.config), **tokenizer}
    stem, shards = f"{file_name(checkpoint)}-{kind}", _shards(list(items_of(stored)), most)
    total = sum(map(len, shards))
    files = [
        _file(
            split_name(stem, index, len(shards)),
            {**(metadata if index == 0 else {}), **_split_keys(index, len(shards), total)},
            items,
        )
        for index, items in enumerate(shards)
    ]
    return Export(NAME, files[0].path, stored, tuple(files), kind.lower(), (*notes, *_fallback_note(kind, stored)))


def file_name(checkpoint: Checkpoint) -> str:
    """The model's name as the start of a file's name; the family's if it has none."""
    return (
        re.sub(r"[^\w.-]+", "-", model_name(checkpoint) or "", flags=re.ASCII).strip(".-") or checkpoint.config.family
    )


def _shards(items: Sequence[Item], most: int | None) -> list[list[Item]]:
    """The tensors of each file: as many as fit, in order."""
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        nbytes = item.tensor.nbytes
        if most is not None and shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += nbytes
    return shards


def _split_keys(index: int, count: int, tensors: int) -> Split:
    if count == 1:
        return {}
    return {SPLIT_NUMBER: (UINT16, index), SPLIT_COUNT: (UINT16, count), SPLIT_TENSORS: (INT32, tensors)}


def _file(path: str, metadata: Mapping[str, Value | tuple[int, int]], items: Sequence[Item]) -> PlannedFile:
    relative, size = place(((item.name, item.tensor, item.weight) for item in items), alignment=ALIGNMENT)
    head = head_bytes(metadata, ((i.name, i.type, i.shape, p.offset) for i, p in zip(items, relative, strict=True)))
    placed = tuple(Placed(p.name, p.tensor, len(head) + p.offset, p.weight) for p in relative)
    return PlannedFile(path, len(head) + size + -size % ALIGNMENT, head, placed)


def _fallback_note(kind: str, stored: Checkpoint) -> Iterator[str]:
    """A note on matrices that have no block form."""
    if kind.lower() not in GGUF_QUANTISED:
        return
    names = [name for name, weight in stored.weights.items() if len(weight.shape) == 2 and weight.shape[1] % BLOCK]
    names = [name for name in names if name != "wpe.weight"]
    if names:
        yield (
            f"{kind} needs rows of a multiple of {BLOCK} elements: {len(names)} matrices are stored as {FALLBACK}, "
            f"{names[0]} among them"
        )
