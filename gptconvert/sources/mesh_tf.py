"""EleutherAI's own GPT-Neo checkpoints: a TensorFlow bundle of Mesh-TensorFlow's variables and a ``config.json``.

The bundle is read like OpenAI's, but its variables have other names (``gpt2/h0/attn/q``), and ``config.json`` is the
training program's, not transformers'. Source: EleutherAI/gpt-neo ``models/gpt2/gpt2.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from gptconvert.containers.json import read_json_object
from gptconvert.containers.tf_bundle import bundle_tensors
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources.format import EDITS, Format
from gptconvert.sources.tf_checkpoint import TfCheckpoint, find_checkpoint, locate_checkpoint
from gptconvert.sources.tokenizer_files import find_tokenizer

TITLE = "GPT-Neo original (Mesh-TensorFlow checkpoint and config.json)"
CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
#: Variables that only this program writes, with any options.
_NEO_ONLY = re.compile(
    r"(?:.*/)?(?:h\d+/)?(?:norm_[12]/[gb]|attn/compute_output_bias/o_b|mlp/conv1d_main/c_fc/kernel)"
)
#: Pattern of variable names → the unsupported option that creates them.
_VARIANTS = (
    (r"(?:.*/)?moe(?:_\w+)?/.*|.*/expert_?\w*/.*", "mixture of experts (moe_layers)"),
    (r"(?:.*/)?axial_wpe_\d+", "axial positions (axial_pos_emb)"),
    (r"(?:.*/)?norm_rezero_\d+/g", "ReZero (rezero)"),
    (r"(?:.*/)?mlp_macaron/.*", "macaron layers (macaron)"),
    (r"(?:.*/)?mem_[kv]", "memory keys and values (num_mem_kv)"),
    (r"(?:.*/)?wte_final_linear/.*", "an untied head (no_weight_tie)"),
    (r"(?:.*/)?activation-[0-9a-f]+", "a trained activation function"),
)


def read_mesh_tf(checkpoint: TfCheckpoint, options: Options) -> Source:
    """Read the GPT-Neo checkpoint with this index.

    Raises:
        InputError: data files or the configuration are missing or damaged.
        UnsupportedError: a variant of the architecture that transformers never supported.
        UnsafeInputError: one of its files is not a regular file.
    """
    prefix, folder = checkpoint.index.prefix, checkpoint.folder
    tensors = bundle_tensors(checkpoint.index)
    _refuse_variants(prefix, tensors)
    config_path = options.hparams or os.path.join(folder, CONFIG)
    if not os.path.lexists(config_path):
        raise InputError(
            "config.json is missing; only it holds the number of heads and the attention types",
            path=config_path,
            hint="fetch it from the checkpoint's origin, or pass --hparams FILE",
        )
    return Source(
        scheme=FORMAT.name,
        format=TITLE,
        path=prefix,
        tensors=tensors,
        config=read_json_object(config_path, MAX_CONFIG_BYTES, CONFIG),
        config_path=config_path,
        tokenizer=find_tokenizer([folder]),
        notes=checkpoint.notes,
    )


def is_gpt_neo(names: Iterable[str]) -> bool:
    """Whether any of these variables is GPT-Neo's."""
    return any(_NEO_ONLY.fullmatch(name) for name in names)


def _refuse_variants(prefix: str, names: Iterable[str]) -> None:
    names = sorted(names)
    found = {why: n for pattern, why in reversed(_VARIANTS) for n in reversed(names) if re.fullmatch(pattern, n)}
    if found:
        raise UnsupportedError(
            f"this variant of GPT-Neo is not implemented: {', '.join(reversed(found))}",
            path=prefix,
            found=", ".join(list(reversed(found.values()))[:5]),
            hint="only the released architecture is supported, as in transformers",
        )


FORMAT = Format(
    name="mesh-tf",
    title=TITLE,
    locate=locate_checkpoint,
    find=find_checkpoint,
    read=read_mesh_tf,
    claims=lambda checkpoint: is_gpt_neo(checkpoint.index.tensors),
    accepts=frozenset({"step", "hparams"}) | EDITS,
)
