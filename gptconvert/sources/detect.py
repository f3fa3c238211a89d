"""The list of formats, and detection of a path's format when the user names none.

:data:`FORMATS` feeds the command line, ``inspect`` and the documentation. Known but unsupported kinds of checkpoint
are refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gptconvert.containers.torch import SUFFIXES, read_if_torch, read_torch
from gptconvert.containers.untrusted import boundary, entries, explain_file, is_regular, no_such_path, read_head
from gptconvert.errors import GptConvertError, InputError, UnsupportedError, UsageError
from gptconvert.model.names import collapse
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.model.strangers import refusal
from gptconvert.sources import gguf, hub, llmc, megatron, mesh_jax, mesh_tf, nanogpt, neox, openai_tf
from gptconvert.sources import openai_gpt1 as gpt1_npy
from gptconvert.sources.advice import advice_for, by_number, refuse_archive
from gptconvert.sources.format import Format
from gptconvert.sources.hf import format as hf
from gptconvert.sources.hf.files import could_be_weights, weights_named
from gptconvert.sources.inventory import with_inventory

#: In detection order: Hugging Face's file names are the least ambiguous, and GPT-Neo's checkpoints, which differ from
#: OpenAI's only in their variable names, must come before them.
FORMATS: tuple[Format[Any], ...] = (
    hf.FORMAT,
    mesh_tf.FORMAT,
    openai_tf.FORMAT,
    gpt1_npy.FORMAT,
    mesh_jax.FORMAT,
    neox.FORMAT,
    nanogpt.FORMAT,
    llmc.FORMAT,
    megatron.FORMAT,
    gguf.FORMAT,
)


def open_source(path: str | os.PathLike[str], options: Options, format: str | None = None) -> Source:
    """Open the checkpoint at ``path``, reading only headers.

    Args:
        path: local file or directory, or a repository on the hub.
        options: how to open it.
        format: name of a :class:`Format`; None to detect it.

    Raises:
        UsageError: unknown format name.
        InputError: missing, unreadable, or not a checkpoint.
        UnsupportedError: a kind of checkpoint that is not supported.
        UnsafeInputError: not a regular file, or a file that tries to run code.
    """
    path = os.fspath(path)
    named = None if format is None else _format_named(format)
    with boundary(path, "a checkpoint" if named is None else named.title):
        if format in (None, openai_tf.FORMAT.name):
            path = _own_output(path)
        return with_inventory(_open(path, options, named), path, options)


def _open(path: str, options: Options, named: Format[Any] | None) -> Source:
    """The source, before the inventory of its directory."""
    if named is not None:
        return named.open(path, options)
    found = detect(path, options)
    if found is not None:
        form, located = found
        form.check_options(path, options)
        with boundary(path, form.title):
            return form.read(located, options)
    if os.path.lexists(path):
        raise _unrecognised(path)
    if hub.is_repo_id(path) and not _in_local_directory(path):
        return hf.FORMAT.open(path, options)
    raise no_such_path(path)


def detect(path: str, options: Options) -> tuple[Format[Any], Any] | None:
    """The format of a local path and the input of its ``read``; None if unknown.

    Raises:
        GptConvertError: the path can only be one format, or one of a group of formats, but is unusable.
    """
    located: dict[Callable[..., Any], Any] = {}
    for each in FORMATS:
        if each.locate not in located:
            located[each.locate] = each.locate(path, options)
        found = located[each.locate]
        if found is not None and each.claims(found):
            return each, found
    return None


def _own_output(path: str) -> str:
    """The checkpoint inside an output directory of this program that holds OpenAI's format; otherwise ``path``."""
    inside = os.path.join(path, openai_tf.FORMAT.name)
    if not os.path.isfile(os.path.join(path, "manifest.json")) or not os.path.isdir(inside):
        return path
    names = entries(path, files_only=True, quiet=True)
    return path if any(weights_named(name) for name in names) else inside


def _format_named(name: str) -> Format[Any]:
    for each in FORMATS:
        if each.name == name:
            return each
    raise UsageError("unknown source format", expected=f"one of {', '.join(f.name for f in FORMATS)}", found=name)


def _in_local_directory(path: str) -> bool:
    """Whether ``org/name`` is more likely a mistyped file in an existing directory ``org``."""
    parent = os.path.dirname(path)
    return parent != "" and os.path.isdir(parent)


@dataclass(frozen=True)
class Lookalike:
    """A recognisable kind of checkpoint that no format reads.

    Attributes:
        title: its name.
        names: pattern that matches the whole name of such a file, or of an entry of such a directory.
        magic: first bytes of such a file; empty if it is recognised by name alone.
    """

    title: str
    names: str
    magic: bytes = b""


LOOKALIKES: tuple[Lookalike, ...] = (
    Lookalike("mesh-transformer-jax shards (GPT-J) without their arrays", r"step_\d+|shard_\d+"),
    Lookalike("a DeepSpeed run (possibly GPT-NeoX) without weights", r"global_step\d+"),
    Lookalike("ggml weights", r"ggml-.*\.bin", b"lmgg"),
    Lookalike("a CTranslate2 model", r"vocabulary\.(?:json|txt)"),
    Lookalike("Keras weights (HDF5)", r".*\.(?:hdf5|keras)", b"\x89HDF\r\n\x1a\n"),
    Lookalike("an ONNX model", r".*\.onnx"),
    Lookalike("a TensorFlow SavedModel", r"saved_model\.pb(?:txt)?"),
    Lookalike("rust-bert weights", r".*\.ot"),
    Lookalike("NumPy arrays", r".*\.np[yz]", b"\x93NUMPY"),
)


def lookalike(path: str) -> str | None:
    """The title of the unsupported kind of checkpoint at ``path``; None if unknown."""
    if os.path.isdir(path):
        names = entries(path)
        return next((k.title for k in LOOKALIKES if any(re.fullmatch(k.names, name) for name in names)), None)
    head = read_head(path)
    by_bytes = next((k.title for k in LOOKALIKES if k.magic and head.startswith(k.magic)), None)
    if by_bytes is not None:
        return by_bytes
    name = os.path.basename(path)
    return next((k.title for k in LOOKALIKES if re.fullmatch(k.names, name)), None)


PUT_CONFIG = "put the model's config.json next to them"
#: PyTorch files of a directory that are opened to find out what they hold.
MAX_FILES = 8
#: Format → pattern of the names of its files and of the entries beside them, and the files that it needs.
FILES: Mapping[str, tuple[str, str]] = {
    "hf": (
        r"config\.json|.*\.(safetensors|bin|h5|msgpack)|.*token.*\.json|merges\.txt|vocab\.json|generation_config\.json",
        "config.json and model.safetensors or pytorch_model.bin",
    ),
    "openai-tf": (
        r".*\.(index|meta|data-.*)|hparams\.json|encoder\.json|vocab\.bpe|checkpoint",
        "model.ckpt.index, model.ckpt.data-… and hparams.json",
    ),
    "nanogpt": (r".*\.pt|meta\.pkl", "ckpt.pt"),
    "mesh-tf": (r".*\.(index|meta|data-.*)|config\.json", "model.ckpt-N.index, .data-… and config.json"),
    "openai-gpt1": (r"params_.*|.*_40000\..*", "params_0.npy … params_9.npy"),
    "mesh-jax": (r"step_\d+|shard_\d+|.*\.npz", "shard_0 … with .npz files"),
    "neox": (r"global_step\d+|latest|configs|.*\.ya?ml|(layer|mp_rank|zero)_.*", "global_stepN and configs/*.yml"),
    "llmc": (r".*\.bin", "gpt2_124M.bin"),
    "gguf": (r".*\.gguf", "model.gguf"),
    "megatron": (r"iter_.*|mp_rank_.*|latest_.*|model_.*rng\.pt", "mp_rank_00/model_optim_rng.pt"),
}


def nearest(names: Collection[str]) -> str:
    """The two formats that most of these files could belong to, and the files that they need."""
    scores = {
        form: sum(re.fullmatch(pattern, name) is not None for name in names) for form, (pattern, _) in FILES.items()
    }
    best = sorted(FILES, key=lambda form: -scores[form])[:2]
    return " or ".join(f"{form} ({FILES[form][1]})" for form in best)


def _torch_inside(path: str, names: Collection[str]) -> GptConvertError | None:
    """The error for a directory that holds PyTorch files under names of their own; None if it holds none.

    Raises:
        GptConvertError: there is one such file, and it cannot be read.
    """
    named = [name for name in names if name.endswith(SUFFIXES) and could_be_weights(name)]
    files = [os.path.join(path, name) for name in sorted(named, key=by_number, reverse=True)]
    files = [file for file in files if is_regular(file)]
    fitting = [file for file in files[:MAX_FILES] if _is_checkpoint(file)]
    if fitting:
        listed = ", ".join(map(os.path.basename, fitting))
        return InputError(
            "no checkpoint under a standard name in this directory",
            path=path,
            found=listed,
            hint=f"pass {'one of the files' if len(fitting) > 1 else 'the file'}: {fitting[0]}",
        )
    return _torch_without_config(files[0]) if len(files) == 1 else _directory_inside(path, names)


def _directory_inside(path: str, names: Collection[str]) -> InputError | None:
    """The error for a directory with a checkpoint in a subdirectory, such as that of a training program's run."""
    inside = [os.path.join(path, name) for name in names if os.path.isdir(os.path.join(path, name))]
    found = next((each for each in inside[:MAX_FILES] if _is_checkpoint(each)), None)
    if found is None:
        return None
    listed = ", ".join(map(os.path.basename, inside[:MAX_FILES]))
    hint = f"pass the directory inside: {found}"
    return InputError("no checkpoint directly in this directory", path=path, found=listed, hint=hint)


def _is_checkpoint(file: str) -> bool:
    """Whether a file is a checkpoint by itself; a Hugging Face directory would have been recognised."""
    try:
        found = detect(file, Options())
        return found is not None and found[0] is not hf.FORMAT
    except GptConvertError:
        return False


def _torch_without_config(file: str) -> GptConvertError | None:
    """The error for PyTorch weights that no format claims; None for other files.

    Raises:
        GptConvertError: PyTorch wrote the file, but it cannot be read.
    """
    if read_if_torch(file) is None:
        return None
    tensors = read_torch(file)
    return refusal(tensors, file) or InputError(
        "not a checkpoint of a known format: this file holds PyTorch weights without their configuration",
        path=file,
        found=", ".join(collapse(sorted(tensors))[:5]),
        hint=f"if these are Hugging Face weights, {PUT_CONFIG}",
    )


def _unrecognised(path: str) -> GptConvertError:
    """The error for an existing path that no format claims: what was found, then the nearest formats."""
    refuse_archive(path)
    advice = advice_for(path) if os.path.isdir(path) else None
    if advice is not None:
        return InputError(f"no checkpoint in this directory: this is {advice[0]}", path=path, hint=advice[1])
    names = entries(path) if os.path.isdir(path) else [os.path.basename(path)]
    inside = _torch_inside(path, names) if os.path.isdir(path) else _torch_without_config(path)
    if inside is not None:
        return inside
    close = f"the nearest formats: {nearest(names)} (all: gptconvert formats)"
    title = lookalike(path)
    if title is not None:
        return UnsupportedError(f"recognised as {title}, which this version does not support", path=path, hint=close)
    if os.path.isdir(path):
        found = ", ".join(names[:8]) or "an empty directory"
        return InputError("no checkpoint of a known format in this directory", path=path, found=found, hint=close)
    explained = explain_file(path) or f"begins with {read_head(path)[:16]!r}"
    hint = f"if these are Hugging Face weights, {PUT_CONFIG}"
    return InputError(
        f"not a checkpoint of a known format: this file {explained}",
        path=path,
        hint=hint if could_be_weights(path) else close,
    )
