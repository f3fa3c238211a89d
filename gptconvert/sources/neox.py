"""GPT-NeoX as its trainer saved it (DeepSpeed): one file per layer and rank, or one file per rank.

Pipeline: ``global_stepN/layer_XX-model_YY-model_states.pt``, where XX numbers the program's layers (00 the embedding,
02 the first block) and YY is the tensor-parallel rank. Sequential: ``mp_rank_YY_model_states.pt``, whose ``module``
names its tensors ``sequential.XX.…``; pipeline tensors get the same names here. Each rank holds its part of every
split tensor and a copy of the rest; the name table defines which tensors are split, and how.
Sources: EleutherAI/gpt-neox ``megatron/model/transformer.py``, ``tools/ckpts/convert_neox_to_hf.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gptconvert.containers.torch import TorchFile, read_torch_pickle, tensors_of
from gptconvert.containers.yaml import read_yaml_configs
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.edits import edited_config
from gptconvert.model.options import Options
from gptconvert.model.shards import Parts
from gptconvert.model.source import Source
from gptconvert.model.tensors import FileChecksum, LazyTensor, TensorSet
from gptconvert.sources.format import EDITS, path_format
from gptconvert.sources.neox_files import Located, locate, looks_like_neox

TITLE = "GPT-NeoX original (DeepSpeed layers or ranks, YAML configuration)"
_SEQUENTIAL = re.compile(r"sequential\.(\d{1,5})\.(.+)", re.DOTALL)


def open_neox(path: str, options: Options) -> Source:
    """Open the checkpoint at ``path``: the directory with ``latest``, one step's directory, or a file in it.

    Raises:
        InputError: files or the configuration are missing, damaged or do not belong together.
        UnsupportedError: another program's checkpoint, or weights partitioned by ZeRO stage 3.
        UnsafeInputError: a pickle that names anything but tensors and plain data, or a file that is not regular.
        UsageError: the path and ``options.step`` name different steps.
    """
    located = locate(path, options.step)
    held = _Held()
    (_read_layers if located.layers else _read_ranks)(located, held)
    paths = located.configs(options.hparams)
    config = read_yaml_configs(paths)
    tensors = held.parts(_count_ranks(located, edited_config(config, options)))
    return Source(
        scheme=FORMAT.name,
        format=TITLE,
        path=located.folder,
        tensors=TensorSet(tensors, (*located.files, *paths[1:]), tuple(held.notes), tuple(held.checksums)),
        config=config,
        config_path=paths[0],
        tokenizer=located.tokenizer(edited_config(config, options)),
        notes=located.notes,
    )


@dataclass
class _Held:
    """Tensors by name, then by rank. A name whose values are not tensors maps to an empty dictionary."""

    tensors: dict[str, dict[int, LazyTensor]] = field(default_factory=dict)
    checksums: list[FileChecksum] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, layer: int, key: str, rank: int, value: object) -> None:
        """Add the value that ``rank`` stores as ``key`` of the program's layer ``layer``."""
        by_rank = self.tensors.setdefault(f"sequential.{layer}.{key}", {})
        if isinstance(value, LazyTensor):
            by_rank[rank] = value

    def parts(self, ranks: int) -> dict[str, Parts]:
        """Each tensor as its parts on the ranks."""
        numbers = range(ranks)
        return {n: Parts(tuple(by_rank.get(r) for r in numbers), "rank") for n, by_rank in self.tensors.items()}


def _read_layers(located: Located, held: _Held) -> None:
    """One file per layer and rank: a state dict of that layer."""
    for (layer, rank), path in located.layers.items():
        file = read_torch_pickle(path)
        state = _state(file.tree, path)
        for key, value in state.items():
            held.add(layer, key, rank, value)
        _note(held, file, state, path)


def _read_ranks(located: Located, held: _Held) -> None:
    """One file per rank: its training state, with the weights under ``module``."""
    for rank, path in located.ranks.items():
        file = read_torch_pickle(path)
        state = _state(_state(file.tree, path).get("module"), path)
        strange = [name for name in state if not _SEQUENTIAL.fullmatch(name)]
        if strange:
            raise UnsupportedError(
                "not a GPT-NeoX checkpoint: another program wrote it with DeepSpeed",
                path=path,
                expected="tensors named sequential.0.word_embeddings.weight …",
                found=", ".join(strange[:3]),
            )
        for name, value in state.items():
            _, layer, key = name.split(".", 2)
            held.add(int(layer), key, rank, value)
        _note(held, file, state, path)


def _state(value: object, path: str) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(
            "no named weights in this file",
            path=path,
            expected="a dictionary of tensors",
            found=type(value).__name__,
            hint="a pipeline-parallel run stores its weights in layer_XX-model_YY-model_states.pt: copy those too"
            if value is None
            else None,
        )
    return value


def _note(held: _Held, file: TorchFile, state: Mapping[str, object], path: str) -> None:
    """Collect the checksums of a state dict's tensors and the reader's notes."""
    if any(isinstance(value, LazyTensor) for value in state.values()):
        held.checksums += tensors_of(file, dict(state.items()), path).checksums
    held.notes += file.notes


def _count_ranks(located: Located, config: Mapping[str, object]) -> int:
    """The number of tensor-parallel ranks that have files; the configuration must agree.

    Raises:
        InputError: it does not.
    """
    found = 1 + max((rank for _, rank in located.layers), default=max(located.ranks, default=0))
    declared = config.get("model_parallel_size", found)
    if declared != found:
        raise InputError(
            "the number of tensor-parallel ranks with files differs from the configuration",
            path=located.folder,
            item="model_parallel_size",
            expected=declared,
            found=f"{found} ranks",
            hint="copy the files of all ranks; if the checkpoint was resharded, correct the configuration",
        )
    return found


FORMAT = path_format(
    name="neox",
    title=TITLE,
    recognises=looks_like_neox,
    read=open_neox,
    accepts=frozenset({"step", "hparams"}) | EDITS,
)
