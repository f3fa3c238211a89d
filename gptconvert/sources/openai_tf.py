"""OpenAI's own releases: GPT-2 as a TensorFlow checkpoint with ``hparams.json``, ``encoder.json``, ``vocab.bpe``.

The same layout is what fine-tuning tools write: gpt-2-simple copies the three small files into each run,
nshepperd's gpt-2 leaves them with the base model, so any of them may be missing here.
"""

from __future__ import annotations

import os

from gptconvert.containers.json import read_json_object
from gptconvert.containers.tf_bundle import bundle_tensors
from gptconvert.containers.tf_index import Index, read_index
from gptconvert.containers.untrusted import file_size
from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources import mesh_tf, openai_gpt1
from gptconvert.sources.format import Format
from gptconvert.sources.tf_locate import locate, looks_like_checkpoint

TITLE = "TensorFlow checkpoint V2"
HPARAMS = "hparams.json"
MAX_HPARAMS_BYTES = 1 << 20
#: OpenAI's names first, then those Hugging Face gave the same files.
TOKENIZER_FILES = ("encoder.json", "vocab.bpe", "vocab.json", "merges.txt", "tokenizer.json")
_OBJECT_GRAPH, _OBJECT_SUFFIX = "_CHECKPOINTABLE_OBJECT_GRAPH", "/.ATTRIBUTES/VARIABLE_VALUE"


def open_openai_tf(path: str, options: Options) -> Source:
    """Open the GPT-2 checkpoint that ``path`` means: prefix, directory, ``checkpoint``, index or data file.

    The same command reads OpenAI's GPT-1, whose files :mod:`gptconvert.sources.openai_gpt1` knows.
    Every numeric tensor is handed on; which of them are weights is the family's business.

    Raises:
        InputError: no checkpoint, an incomplete or damaged one, or a bad ``hparams.json``.
        UnsupportedError: another kind of TensorFlow file.
        UnsafeInputError: a file of it is no regular file.
        UsageError: the path and ``options.step`` name different steps, or it is GPT-Neo's.
    """
    if openai_gpt1.recognises(path):
        return openai_gpt1.FORMAT.open(path, options)
    found = locate(path, options.step)
    index = read_index(found.prefix)
    _refuse_object_checkpoint(index)
    if mesh_tf.are_ours(index.tensors):
        raise UsageError(
            "these are the variables of EleutherAI's GPT-Neo, not of OpenAI's GPT-2",
            path=index.path,
            hint="use `gptconvert mesh-tf` or `gptconvert convert`",
        )
    folder = os.path.dirname(found.prefix)
    config_path = options.hparams or _beside(folder, HPARAMS)
    return Source(
        scheme=FORMAT.name,
        format=TITLE,
        path=found.prefix,
        tensors=bundle_tensors(index),
        config={} if config_path is None else _hparams(config_path),
        config_path=config_path,
        tokenizer={name: there for name in TOKENIZER_FILES if (there := _beside(folder, name)) is not None},
        notes=found.notes,
    )


def _hparams(path: str) -> dict[str, object]:
    """The file's keys. An empty object would read like a missing file, whose sizes are then guessed."""
    config = read_json_object(path, MAX_HPARAMS_BYTES, HPARAMS)
    if not config:
        raise InputError("hparams.json is empty", path=path, hint="remove it to have the sizes taken from the shapes")
    return config


def _beside(folder: str, name: str) -> str | None:
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return None
    file_size(path)  # a named pipe must not reach those who read it later
    return path


def _refuse_object_checkpoint(index: Index) -> None:
    """TensorFlow 2's checkpoints name tensors by the Python attributes that held them, which differ per program."""
    found = [name for name in index.tensors if name == _OBJECT_GRAPH or name.endswith(_OBJECT_SUFFIX)]
    if found:
        raise UnsupportedError(
            "this is a TensorFlow 2 object checkpoint (tf.train.Checkpoint, or Keras), not OpenAI's variables",
            path=index.path,
            expected="variables named model/wte, model/h0/attn/c_attn/w …",
            found=", ".join(found[:3]),
            hint="restore it in the program that wrote it and save the variables under OpenAI's names with "
            "tf.compat.v1.train.Saver, or export a Hugging Face checkpoint",
        )


FORMAT = Format(
    name="openai-tf",
    title=TITLE,
    recognises=looks_like_checkpoint,
    read=open_openai_tf,
    accepts=frozenset({"step", "hparams", "n_head"}),
)
