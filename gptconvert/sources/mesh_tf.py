"""EleutherAI's own GPT-Neo checkpoints: a TensorFlow bundle of Mesh-TensorFlow's variables and a ``config.json``.

The bundle is read as OpenAI's are; its variables have other names (``gpt2/h0/attn/q``), and the configuration is
that of the training program, not transformers'. Source: EleutherAI/gpt-neo ``models/gpt2/gpt2.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from gptconvert.containers.json import read_json_object
from gptconvert.containers.tf_bundle import bundle_tensors
from gptconvert.containers.tf_index import read_index
from gptconvert.containers.untrusted import file_size
from gptconvert.errors import GptConvertError, InputError, UnsupportedError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources.format import Format
from gptconvert.sources.tf_locate import locate, looks_like_checkpoint

TITLE = "GPT-Neo original (Mesh-TensorFlow checkpoint and config.json)"
CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
TOKENIZER_FILES = ("encoder.json", "vocab.bpe", "vocab.json", "merges.txt", "tokenizer.json")
#: Variables that this program alone has, whatever options it was run with.
_OURS = re.compile(r"(?:.*/)?(?:h\d+/)?(?:norm_[12]/[gb]|attn/compute_output_bias/o_b|mlp/conv1d_main/c_fc/kernel)")
#: Parts of variable names that belong to options nobody else implements → the option.
_VARIANTS = (
    (r"(?:.*/)?moe(?:_\w+)?/.*|.*/expert_?\w*/.*", "mixture of experts (moe_layers)"),
    (r"(?:.*/)?axial_wpe_\d+", "axial positions (axial_pos_emb)"),
    (r"(?:.*/)?norm_rezero_\d+/g", "ReZero (rezero)"),
    (r"(?:.*/)?mlp_macaron/.*", "macaron layers (macaron)"),
    (r"(?:.*/)?mem_[kv]", "memory keys and values (num_mem_kv)"),
    (r"(?:.*/)?wte_final_linear/.*", "a head of its own (no_weight_tie)"),
    (r"(?:.*/)?activation-[0-9a-f]+", "a trained activation function"),
)


def open_mesh_tf(path: str, options: Options) -> Source:
    """Open the GPT-Neo checkpoint that ``path`` means: prefix, directory, ``checkpoint``, index or data file.

    Raises:
        InputError: no checkpoint, no configuration, or either is damaged.
        UnsupportedError: a variant of the architecture that transformers never had, named by its variables.
        UnsafeInputError: a file of it is no regular file.
        UsageError: the path and ``options.step`` name different steps.
    """
    found = locate(path, options.step)
    tensors = bundle_tensors(read_index(found.prefix))
    _refuse_variants(found.prefix, tensors)
    folder = os.path.dirname(found.prefix)
    config_path = options.hparams or os.path.join(folder, CONFIG)
    if not os.path.lexists(config_path):
        raise InputError(
            "config.json is missing: the number of heads and the kinds of attention are in no other file",
            path=config_path,
            hint="copy it from where the checkpoint came from, or pass --hparams FILE",
        )
    return Source(
        scheme=FORMAT.name,
        format=TITLE,
        path=found.prefix,
        tensors=tensors,
        config=read_json_object(config_path, MAX_CONFIG_BYTES, CONFIG),
        config_path=config_path,
        tokenizer=_tokenizer(folder),
        notes=found.notes,
    )


def recognises(path: str) -> bool:
    """Whether ``path`` means a checkpoint with Mesh-TensorFlow's variables. Reads the index, not the data."""
    if not looks_like_checkpoint(path):
        return False
    try:
        return are_ours(read_index(locate(path).prefix).tensors)
    except GptConvertError:
        return False


def are_ours(names: Iterable[str]) -> bool:
    """Whether some of these variables are GPT-Neo's."""
    return any(_OURS.fullmatch(name) for name in names)


def _refuse_variants(prefix: str, names: Iterable[str]) -> None:
    names = sorted(names)
    found = {why: n for pattern, why in reversed(_VARIANTS) for n in reversed(names) if re.fullmatch(pattern, n)}
    if found:
        raise UnsupportedError(
            f"this variant of GPT-Neo is not implemented: {', '.join(reversed(found))}",
            path=prefix,
            found=", ".join(list(reversed(found.values()))[:5]),
            hint="transformers never had it either; only the released architecture is read",
        )


def _tokenizer(folder: str) -> dict[str, str]:
    paths = {name: os.path.join(folder, name) for name in TOKENIZER_FILES}
    present = {name: path for name, path in paths.items() if os.path.exists(path)}
    for path in present.values():
        file_size(path)  # a named pipe must not reach those who read it later
    return present


FORMAT = Format(
    name="mesh-tf", title=TITLE, recognises=recognises, read=open_mesh_tf, accepts=frozenset({"step", "hparams"})
)
