"""GPT-NeoX as its trainer saved it (DeepSpeed): one file per layer and rank, or one file per rank.

Pipeline: ``global_stepN/layer_XX-model_YY-model_states.pt``, XX counted through the layers of the program (00 the
embedding, 02 the first block), YY the tensor-parallel rank. Sequential: ``mp_rank_YY_model_states.pt``, whose
``module`` names its tensors ``sequential.XX.…``. A rank holds its part of every split tensor and a copy of the rest.
What is split how is in :data:`RULES`; the parts are put together when they are read.
Sources: EleutherAI/gpt-neox ``megatron/model/transformer.py``, ``tools/ckpts/convert_neox_to_hf.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.sources.neox_files import Located, locate
from gptconvert.sources.source import Format, OpenOptions, Source
from gptconvert.sources.torch_zip import TorchFile, read_torch_pickle
from gptconvert.sources.yaml_config import read_yaml_configs
from gptconvert.tensors import Array, Box, Computed, FileChecksum, LazyTensor, Stored, TensorSet, Transposed, total
from gptconvert.transforms import concatenate

TITLE = "GPT-NeoX original (DeepSpeed layers or ranks, YAML configuration)"

#: How ranks' tensors become one: joined along axis 0 or 1; a bias that ranks add before, or after, their sums are
#: summed; the same on every rank; the head, split along either axis.
Rule = Literal["rows", "columns", "bias", "same", "head"]
RULES: tuple[tuple[str, Rule], ...] = (
    (r"word_embeddings\.weight", "rows"),
    (r"attention\.query_key_value\.(?:weight|bias)", "rows"),
    (r"mlp\.(?:dense_h_to_4h|linear1)\.(?:weight|bias)", "rows"),
    (r"attention\.dense\.weight|mlp\.(?:dense_4h_to_h|linear2)\.weight", "columns"),
    (r"attention\.dense\.bias|mlp\.(?:dense_4h_to_h|linear2)\.bias", "bias"),
    (r"(?:input_layernorm|post_attention_layernorm|norm)\.(?:weight|bias)", "same"),
    (r"attention\.rotary_emb\.inv_freq|attention\.(?:bias|masked_bias)", "same"),
    (r"final_linear\.weight", "head"),
)
#: Tensors of options that are not implemented → the option.
VARIANTS = (
    (r".*_extra_state|.*layer_norm_(?:weight|bias)|mlp\.fc[12]_.*|attention\.(?:qkv|proj)\..*", "TransformerEngine"),
    (r"position_embeddings\..*", "learned positions (pos-emb)"),
    (r"(?:.*\.)?rpe\..*|.*relative_attention_bias.*", "relative positions (pos-emb: rpe)"),
    (r".*\.scale|.*norm\.(?:g|d)", "a norm other than layernorm (norm)"),
    (r"mlp\.(?:w[123]|gate_proj|up_proj)\..*", "gated MLP (mlp-type)"),
    (r".*(?:experts?|moe|router)\..*", "mixture of experts (moe-num-experts)"),
    (r"attention\.(?:q|k)(?:_|)(?:layer|)norm\..*", "norms of queries and keys (use-qk-layernorm)"),
    (r"(?:mixer|att|ffn|gmlp)\..*", "another kind of layer than attention (attention-config)"),
    (r".*(?:lora|adapter|soft_embedding).*", "adapters"),
)
#: Number of the first block among the program's layers: the embedding and a function without weights come before.
_FIRST_BLOCK = 2
_BLOCK = re.compile(r"(?:attention|mlp|input_layernorm|post_attention_layernorm)\.")


def open_neox(path: str, options: OpenOptions) -> Source:
    """Open the checkpoint at ``path``: the directory with ``latest``, one step's directory, or a file in it.

    Raises:
        InputError: files or the configuration are missing, damaged or do not belong together.
        UnsupportedError: an architecture option that is not implemented, named; another program's checkpoint.
        UnsafeInputError: a pickle that names what no such checkpoint holds, or a file that is no regular file.
        UsageError: the path and ``options.step`` name different steps.
    """
    located = locate(path, options)
    config = read_yaml_configs(located.configs)
    parts = _Parts()
    if located.layers:
        _read_layers(located, parts)
    else:
        _read_ranks(located, parts)
    ranks = _check_ranks(located, config)
    _refuse_variants(located.folder, parts)
    merged = _merge_all(parts, ranks, config.get("gpt_j_residual") is True, located.folder)
    files = (*located.files, *located.configs[1:])
    return Source(
        scheme=FORMAT.name,
        format=TITLE,
        path=located.folder,
        tensors=TensorSet(merged, files, tuple(parts.notes), tuple(parts.checksums)),
        config=config,
        config_path=located.configs[0],
        tokenizer=located.tokenizer(config),
        notes=located.notes,
    )


def recognises(path: str) -> bool:
    """Whether ``path`` looks like such a checkpoint, by the names of its files."""
    from gptconvert.sources.neox_files import looks_like_neox

    return looks_like_neox(path)


@dataclass
class _Parts:
    """What the ranks hold, under the names of a model on one rank."""

    tensors: dict[str, dict[int, LazyTensor]] = field(default_factory=dict)
    checksums: list[FileChecksum] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, layer: int, key: str, rank: int, tensor: LazyTensor) -> None:
        """The tensor ``key`` of program layer ``layer``, as ``rank`` holds it."""
        name = f"layers.{layer - _FIRST_BLOCK}.{key}" if _BLOCK.match(key) else key
        if key == "word_embeddings.weight" and layer >= _FIRST_BLOCK:
            name = "final_linear.weight"  # a tied head, saved a second time
        self.tensors.setdefault(name, {})[rank] = tensor

    def add_checksums(self, file: TorchFile, tensors: Sequence[LazyTensor]) -> None:
        """The file's checksums of bytes that ``tensors`` lie in."""
        used = [part for tensor in tensors for part in _stored(tensor)]
        for c in file.checksums:
            if any(c.segment.offset <= part.offset < c.segment.end or not part.nbytes for part in used):
                self.checksums.append(c)


def _stored(tensor: LazyTensor) -> tuple:  # type: ignore[type-arg]
    base = tensor.base if isinstance(tensor, Transposed) else tensor
    return base.parts if isinstance(base, Stored) else ()
