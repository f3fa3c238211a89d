"""OpenAI's own releases: GPT-2 as a TensorFlow checkpoint with ``hparams.json``, ``encoder.json``, ``vocab.bpe``.

Fine-tuning tools write the same layout: gpt-2-simple copies the three small files into each run, nshepperd's gpt-2
leaves them with the base model, so any of them may be missing.
"""

from __future__ import annotations

import os

from gptconvert.containers.json import read_json_object
from gptconvert.containers.tf_bundle import bundle_tensors
from gptconvert.containers.tf_index import Index
from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources import mesh_tf, openai_gpt1
from gptconvert.sources.format import EDITS, Format
from gptconvert.sources.tf_checkpoint import TfCheckpoint, find_checkpoint, locate_checkpoint
from gptconvert.sources.tokenizer_files import find_tokenizer

TITLE = "TensorFlow checkpoint V2"
HPARAMS = "hparams.json"
MAX_HPARAMS_BYTES = 1 << 20
_OBJECT_GRAPH, _OBJECT_SUFFIX = "_CHECKPOINTABLE_OBJECT_GRAPH", "/.ATTRIBUTES/VARIABLE_VALUE"


def find_openai(path: str, options: Options) -> TfCheckpoint | str:
    """Find a GPT-2 checkpoint, or return the path if it is GPT-1's release: one command reads both.

    Raises:
        GptConvertError: as :func:`find_checkpoint`.
    """
    found = locate_checkpoint(path, options)
    if found is None and openai_gpt1.recognises(path):
        return path
    return found or find_checkpoint(path, options)


def read_openai_tf(located: TfCheckpoint | str, options: Options) -> Source:
    """Read the GPT-2 checkpoint with this index, or the GPT-1 release at this path.

    The source includes every numeric tensor; the family decides which of them are weights.

    Raises:
        InputError: an incomplete or damaged checkpoint, or an invalid ``hparams.json``.
        UnsupportedError: a checkpoint written by another program.
        UnsafeInputError: one of its files is not a regular file.
        UsageError: a GPT-Neo checkpoint.
    """
    if isinstance(located, str):
        return openai_gpt1.FORMAT.open(located, options)
    index, folder = located.index, located.folder
    _refuse_object_checkpoint(index)
    if mesh_tf.is_gpt_neo(index.tensors):
        raise UsageError(
            "the variables are those of EleutherAI's GPT-Neo, not of OpenAI's GPT-2",
            path=index.path,
            hint="use `gptconvert mesh-tf` or `gptconvert convert`",
        )
    beside = os.path.join(folder, HPARAMS)
    config_path = options.hparams or (beside if os.path.exists(beside) else None)
    return Source(
        scheme=FORMAT.name,
        format=TITLE,
        path=index.prefix,
        tensors=bundle_tensors(index),
        config={} if config_path is None else _hparams(config_path),
        config_path=config_path,
        tokenizer=find_tokenizer([folder]),
        notes=located.notes,
    )


def _hparams(path: str) -> dict[str, object]:
    """The file's keys. An empty object is refused: it would be taken for a missing file, and the sizes inferred."""
    config = read_json_object(path, MAX_HPARAMS_BYTES, HPARAMS)
    if not config:
        raise InputError("hparams.json is empty", path=path, hint="remove it to infer the sizes from the tensors")
    return config


def _refuse_object_checkpoint(index: Index) -> None:
    """TensorFlow 2's checkpoints name tensors after Python attributes, which differ between programs."""
    found = [name for name in index.tensors if name == _OBJECT_GRAPH or name.endswith(_OBJECT_SUFFIX)]
    if found:
        raise UnsupportedError(
            "this is a TensorFlow 2 object checkpoint (tf.train.Checkpoint, or Keras), not OpenAI's variables",
            path=index.path,
            expected="variables named model/wte, model/h0/attn/c_attn/w …",
            found=", ".join(found[:3]),
            hint="restore it in the program that wrote it, then save the variables under OpenAI's names with "
            "tf.compat.v1.train.Saver or export a Hugging Face checkpoint",
        )


FORMAT: Format[TfCheckpoint | str] = Format(
    name="openai-tf",
    title=TITLE,
    locate=locate_checkpoint,
    find=find_openai,
    read=read_openai_tf,
    accepts=frozenset({"step", "hparams", "n_head", "scope"}) | EDITS,
)
