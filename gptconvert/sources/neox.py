"""GPT-NeoX as its trainer saved it (DeepSpeed): one file per layer and rank, or one file per rank.

Pipeline: ``global_stepN/layer_XX-model_YY-model_states.pt``, XX counted through the layers of the program (00 the
embedding, 02 the first block), YY the tensor-parallel rank. Sequential: ``mp_rank_YY_model_states.pt``, whose
``module`` names its tensors ``sequential.XX.…``. A rank holds its part of every split tensor and a copy of the rest.
What is split how is in :data:`RULES`; the parts are put together when they are read.
Sources: EleutherAI/gpt-neox ``megatron/model/transformer.py``, ``tools/ckpts/convert_neox_to_hf.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gptconvert.containers.torch import TorchFile, read_torch_pickle, tensors_of
from gptconvert.containers.yaml import read_yaml_configs
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.model.tensors import Array, Box, Computed, FileChecksum, LazyTensor, TensorSet, total
from gptconvert.model.transforms import concatenate
from gptconvert.sources.format import path_format
from gptconvert.sources.neox_files import Located, locate, looks_like_neox

TITLE = "GPT-NeoX original (DeepSpeed layers or ranks, YAML configuration)"

#: How ranks' tensors become one: joined along axis 0 or 1; the head, split along either; a bias that every rank
#: adds, before or after the sum over ranks; the same on every rank.
Rule = Literal["rows", "columns", "head", "bias", "same"]
RULES: tuple[tuple[str, Rule], ...] = (
    (r"word_embeddings\.weight", "rows"),
    (r"attention\.query_key_value\.(?:weight|bias)", "rows"),
    (r"mlp\.(?:dense_h_to_4h|linear1)\.(?:weight|bias)", "rows"),
    (r"attention\.dense\.weight|mlp\.(?:dense_4h_to_h|linear2)\.weight", "columns"),
    (r"final_linear\.weight", "head"),
    (r"attention\.dense\.bias|mlp\.(?:dense_4h_to_h|linear2)\.bias", "bias"),
    (r"(?:input_layernorm|post_attention_layernorm|norm)\.(?:weight|bias)", "same"),
    (r"attention\.(?:rotary_emb\.inv_freq|bias|masked_bias)", "same"),
)
#: Tensors of options that are not implemented → the option.
VARIANTS = (
    (r".*_extra_state|.*layer_norm_(?:weight|bias)|mlp\.fc[12]_.*|attention\.(?:qkv|proj)\..*", "TransformerEngine"),
    (r"position_embeddings\..*", "learned positions (pos-emb)"),
    (r"(?:.*\.)?rpe\..*|.*relative_attention_bias.*", "relative positions (pos-emb: rpe)"),
    (r".*norm\.(?:scale|g|d)", "a norm other than layernorm (norm)"),
    (r"mlp\.(?:w[123]|gate_proj|up_proj)\..*", "gated MLP (mlp-type)"),
    (r".*(?:expert|moe|router).*", "mixture of experts (moe-num-experts)"),
    (r"attention\.(?:q|k|qk|query|key)_?(?:layer)?norm\..*", "norms of queries and keys (use-qk-layernorm)"),
    (r"(?:mixer|att|ffn|gmlp)\..*", "another kind of layer than attention (attention-config)"),
    (r".*(?:lora|adapter|soft_embedding).*", "adapters or soft prompts"),
)
#: Number of the first block among the program's layers: the embedding and a function without weights come before.
_FIRST_BLOCK = 2
_BLOCK = re.compile(r"layers\.(\d+)\.(.+)")
_SEQUENTIAL = re.compile(r"sequential\.(\d{1,5})\.(.+)", re.DOTALL)


def open_neox(path: str, options: Options) -> Source:
    """Open the checkpoint at ``path``: the directory with ``latest``, one step's directory, or a file in it.

    Raises:
        InputError: files or the configuration are missing, damaged or do not belong together.
        UnsupportedError: an architecture option that is not implemented, named; another program's checkpoint.
        UnsafeInputError: a pickle that names what no such checkpoint holds, or a file that is no regular file.
        UsageError: the path and ``options.step`` name different steps.
    """
    located = locate(path, options.step)
    held = _Held()
    (_read_layers if located.layers else _read_ranks)(located, held)
    _refuse_variants(located.folder, held)
    _check_blocks(located, held)
    paths = located.configs(options.hparams)
    config = read_yaml_configs(paths)
    ranks = _count_ranks(located, config)
    tensors = _merge_all(held, ranks, config.get("gpt_j_residual") is True, located.folder)
    return Source(
        scheme=FORMAT.name,
        format=TITLE,
        path=located.folder,
        tensors=TensorSet(tensors, (*located.files, *paths[1:]), tuple(held.notes), tuple(held.checksums)),
        config=config,
        config_path=paths[0],
        tokenizer=located.tokenizer(config),
        notes=located.notes,
    )


@dataclass
class _Held:
    """What the ranks hold, by the name in a model on one rank and then by rank."""

    tensors: dict[str, dict[int, LazyTensor]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    checksums: list[FileChecksum] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, layer: int, key: str, rank: int, value: object) -> None:
        """What ``rank`` holds as ``key`` of the program's layer number ``layer``."""
        in_block = re.match(r"(?:attention|mlp|input_layernorm|post_attention_layernorm)\.", key)
        name = f"layers.{layer - _FIRST_BLOCK}.{key}" if in_block else key
        if key == "word_embeddings.weight" and layer >= _FIRST_BLOCK:
            name = "final_linear.weight"  # a tied head, saved a second time
        if isinstance(value, LazyTensor):
            self.tensors.setdefault(name, {})[rank] = value
        elif name not in self.others:
            self.others.append(name)


def _read_layers(located: Located, held: _Held) -> None:
    """One file per layer and rank: a state dict of that layer."""
    for (layer, rank), path in located.layers.items():
        file = read_torch_pickle(path)
        state = _state(file.tree, path)
        for key, value in state.items():
            held.add(layer, key, rank, value)
        _note(held, file, state, path)


def _read_ranks(located: Located, held: _Held) -> None:
    """One file per rank: its whole training state, the weights under ``module``."""
    for rank, path in located.ranks.items():
        file = read_torch_pickle(path)
        state = _state(_state(file.tree, path).get("module"), path)
        strange = [name for name in state if not _SEQUENTIAL.fullmatch(name)]
        if strange:
            raise UnsupportedError(
                "this DeepSpeed checkpoint is not GPT-NeoX's: another program wrote it",
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
            "no weights by name in this file",
            path=path,
            expected="a dictionary of tensors",
            found=type(value).__name__,
            hint="of a pipeline-parallel run, the layer_XX-model_YY files hold the weights"
            if value is None
            else None,
        )
    return value


def _note(held: _Held, file: TorchFile, state: Mapping[str, object], path: str) -> None:
    """The checksums of the bytes under a state dict's tensors, and what its reader noted."""
    if any(isinstance(value, LazyTensor) for value in state.values()):
        held.checksums += tensors_of(file, dict(state.items()), path).checksums
    held.notes += file.notes


def _refuse_variants(folder: str, held: _Held) -> None:
    """Every tensor is one we know what to do with."""
    names = {name: _key(name) for name in (*held.tensors, *held.others)}
    unknown = [n for n, key in names.items() if _rule(key) is None or n in held.others]
    found: dict[str, str] = {}
    for name in unknown:
        why = next((why for pattern, why in VARIANTS if re.fullmatch(pattern, names[name])), "unknown tensors")
        found.setdefault(why, name)
    if found:
        raise UnsupportedError(
            f"this variant of GPT-NeoX is not implemented: {', '.join(found)}",
            path=folder,
            found=", ".join(list(found.values())[:5]),
            hint="transformers has no such GPT-NeoX either" if "unknown tensors" not in found else None,
        )


def _check_blocks(located: Located, held: _Held) -> None:
    """No block is missing between the others, nor the embedding."""
    blocks = {int(match[1]) for name in held.tensors if (match := _BLOCK.fullmatch(name))}
    missing = [_FIRST_BLOCK + i for i in range(max(blocks, default=0)) if i not in blocks]
    missing = [0] * ("word_embeddings.weight" not in held.tensors) + missing
    if missing or not blocks:
        raise InputError(
            f"layers are missing: {', '.join(f'{number:02}' for number in missing[:20])}",
            path=located.folder,
            expected="00 (the embedding), 02 and on (the blocks)",
            found=f"{len(blocks)} blocks",
            hint="copy all files of the step into one directory",
        )


def _count_ranks(located: Located, config: Mapping[str, object]) -> int:
    """Over how many ranks tensors are split: as many as there are files of, which is what the configuration says."""
    found = 1 + max((rank for _, rank in located.layers), default=max(located.ranks, default=0))
    told = config.get("model_parallel_size", found)
    if told != found:
        raise InputError(
            "the configuration names another number of tensor-parallel ranks than there are files of",
            path=located.folder,
            item="model_parallel_size",
            expected=told,
            found=f"{found} ranks",
            hint="copy the files of all ranks; if the checkpoint was resharded, correct the configuration",
        )
    return found


def _merge_all(held: _Held, ranks: int, summed: bool, folder: str) -> dict[str, LazyTensor]:
    """The tensors of a model on one rank, made of their parts when they are read. What is odd is noted."""
    unequal: dict[Rule, list[str]] = {}
    merged: dict[str, LazyTensor] = {}
    width = held.tensors["word_embeddings.weight"].get(0)
    for name, by_rank in held.tensors.items():
        parts, rule = _parts(name, by_rank, ranks, folder), _rule(_key(name))
        if rule in ("same", "bias") and not (rule == "bias" and summed) and not _all_equal(parts):
            unequal.setdefault(rule, []).append(name)
        across = rule == "columns" or (rule == "head" and width is not None and parts[0].shape[1:] != width.shape[1:])
        if rule in ("rows", "columns", "head"):
            merged[name] = concatenate(parts, 1 if across else 0)
        elif rule == "bias":
            merged[name] = total(parts) if summed and ranks > 1 else parts[0]
        else:
            merged[name] = mean(parts) if name in unequal.get("same", ()) else parts[0]
    if "same" in unequal:
        held.notes.append(_differ(unequal["same"], "norms", "their mean was taken"))
    if "bias" in unequal:
        held.notes.append(_differ(unequal["bias"], "biases", "those of rank 0 were taken"))
    return merged


def _differ(names: Sequence[str], what: str, how: str) -> str:
    return f"{len(names)} {what} that should be the same on every rank are not ({names[0]} first): {how}"


def mean(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The element-wise mean of tensors of one shape, taken in float64 and rounded once."""
    dtype, shape = parts[0].dtype, parts[0].shape

    def read(box: Box) -> Array:
        result: Array = np.mean([part.read(box).astype(np.float64) for part in parts], axis=0).astype(dtype)
        return result

    return Computed(read, dtype, shape)


def _parts(name: str, by_rank: Mapping[int, LazyTensor], ranks: int, folder: str) -> list[LazyTensor]:
    """What each rank holds of one tensor: all of them something, alike in shape and type."""
    missing = [str(rank) for rank in range(ranks) if rank not in by_rank]
    if missing:
        raise InputError("some ranks do not hold this tensor", path=folder, item=name, found=", ".join(missing))
    parts = [by_rank[rank] for rank in range(ranks)]
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        listed = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
        raise InputError("the ranks' parts differ in shape or type", path=folder, item=name, found=listed)
    return parts


def _all_equal(parts: Sequence[LazyTensor]) -> bool:
    """Whether all parts hold the same bytes. For vectors only: they are read whole."""
    first = parts[0].read().tobytes() if len(parts) > 1 else b""
    return all(part.read().tobytes() == first for part in parts[1:])


def _key(name: str) -> str:
    """A tensor's name inside its layer."""
    match = _BLOCK.fullmatch(name)
    return match[2] if match else name


def _rule(key: str) -> Rule | None:
    return next((rule for pattern, rule in RULES if re.fullmatch(pattern, key)), None)


FORMAT = path_format(
    name="neox", title=TITLE, recognises=looks_like_neox, read=open_neox, accepts=frozenset({"step", "hparams"})
)
