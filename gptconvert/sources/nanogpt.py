"""nanoGPT's ``ckpt.pt``: a ``torch.save`` of the state dict, ``model_args`` and the state of the training run.

build-nanogpt saves the state dict and ``config``, an instance of a dataclass, which is read as plain data.
Sources: karpathy/nanoGPT ``train.py``, karpathy/build-nanogpt ``train_gpt2.py``.

nanoGPT's file also holds the optimizer state, twice the size of the weights; it is never read. The tokenizer is kept
elsewhere: GPT-2's, or a character vocabulary in ``meta.pkl`` in the data directory, a pickle that is never opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from gptconvert.containers.torch import TorchFile, read_if_torch, read_torch_pickle, tensors_of
from gptconvert.containers.untrusted import entries, no_such_path
from gptconvert.errors import InputError, UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources.advice import by_number
from gptconvert.sources.format import EDITS, Format
from gptconvert.sources.tokenizer_files import find_tokenizer

TITLE = "nanoGPT (ckpt.pt)"
CHECKPOINT = "ckpt.pt"
#: Entries that identify such a file.
MODEL, ARGUMENTS = "model", "model_args"
#: The configuration in build-nanogpt's files, and keys that identify it: nanoGPT's entry of that name holds the
#: settings of the training run.
CONFIG, CONFIG_KEYS = "config", frozenset(("block_size", "vocab_size", "n_layer", "n_head", "n_embd"))
BUILD_TITLE = "build-nanogpt (model, config)"
#: Vocabulary sizes that imply GPT-2's tokenizer: exact, and padded to a multiple of 64.
GPT2_SIZES = (50257, 50304)


def read_nanogpt(file: TorchFile, options: Options) -> Source:
    """Read the checkpoint in this file.

    Raises:
        InputError: nanoGPT did not write it.
    """
    path = file.path
    state, arguments = _parts(file)
    is_build = _is_build(file.tree)
    tensors = tensors_of(file, state, path)
    folder = os.path.dirname(path)
    tokenizer = find_tokenizer([folder])
    return Source(
        scheme=f"{FORMAT.name}:build" if is_build else FORMAT.name,
        format=BUILD_TITLE if is_build else TITLE,
        path=path,
        tensors=tensors,
        config=arguments,
        config_path=path,
        tokenizer=tokenizer,
        notes=_tokenizer_notes(arguments.get("vocab_size"), tokenizer, folder),
    )


def find_nanogpt(path: str, options: Options) -> TorchFile:
    """Open the checkpoint file, or the one in a run's output directory.

    Raises:
        InputError: the file is missing or damaged.
        UnsafeInputError: its pickle names anything but tensors and plain data.
        UsageError: both the path and ``options.weights_file`` name a file.
    """
    return read_torch_pickle(_checkpoint_file(path, options))


def _checkpoint_file(path: str, options: Options) -> str:
    if not os.path.lexists(path):
        raise no_such_path(path, hub=False)
    if os.path.isdir(path):
        names, name = entries(path, files_only=True), options.weights_file or CHECKPOINT
        others = [other for other in names if other.endswith(".pt")]
        if name not in names and others:
            listed, last = ", ".join(others[:8]), max(others, key=by_number)
            hint = f"choose one: --weights-file {last}"
            raise InputError("the checkpoint is missing", path=path, expected=name, found=listed, hint=hint)
        return os.path.join(path, name)
    if options.weights_file is not None:
        hint = "pass the directory, or omit --weights-file"
        raise UsageError("--weights-file needs a directory, and this is a file", path=path, hint=hint)
    return path


def locate_nanogpt(path: str, options: Options) -> TorchFile | None:
    """As :func:`find_nanogpt` for a ``ckpt.pt`` or any PyTorch file with nanoGPT's entries; None for other paths."""
    named = os.path.join(path, CHECKPOINT) if os.path.isdir(path) else path
    if os.path.basename(named) == CHECKPOINT and os.path.lexists(named):
        return find_nanogpt(path, options)
    file = None if os.path.isdir(path) else read_if_torch(path)
    matches = (
        file is not None
        and isinstance(file.tree, dict)
        and ({MODEL, ARGUMENTS} <= file.tree.keys() or _is_build(file.tree))
    )
    if matches:
        _checkpoint_file(path, options)
    return file if matches else None


def _parts(file: TorchFile) -> tuple[Mapping[object, object], dict[str, object]]:
    """The state dict and ``model_args``."""
    tree = file.tree if isinstance(file.tree, dict) else {}
    state, arguments = tree.get(MODEL), tree.get(CONFIG if _is_build(tree) else ARGUMENTS)
    if not isinstance(state, dict) or not isinstance(arguments, dict):
        found = ", ".join(str(key) for key in list(tree)[:8]) or f"a {type(file.tree).__name__}"
        raise InputError(
            "not a nanoGPT checkpoint",
            path=file.path,
            expected="a dictionary with 'model' and 'model_args'",
            found=found,
            hint="save a bare nanoGPT state dict as {'model': STATE_DICT, 'model_args': {…}}, as train.py does; "
            "for a Hugging Face state dict with its config.json, use `gptconvert hf`",
        )
    return state, {str(key): value for key, value in arguments.items()}


def _is_build(tree: object) -> bool:
    """Whether build-nanogpt wrote the file: the entry ``config`` is its dataclass, or a dictionary of its fields."""
    config = tree.get(CONFIG) if isinstance(tree, dict) and ARGUMENTS not in tree else None
    return isinstance(config, dict) and config.keys() >= CONFIG_KEYS


def _tokenizer_notes(vocabulary: object, tokenizer: Mapping[str, str], folder: str) -> tuple[str, ...]:
    if tokenizer:
        return ()
    if os.path.lexists(os.path.join(folder, "meta.pkl")):
        return ("no tokenizer is written: the character vocabulary, meta.pkl, is a pickle and is not opened",)
    text = (
        "no tokenizer is written: nanoGPT uses GPT-2's tokenizer but saves no copy; to include it, put GPT-2's "
        "encoder.json and vocab.bpe next to the checkpoint"
    )
    return (text,) if vocabulary in GPT2_SIZES else ()


FORMAT = Format(
    name="nanogpt",
    title=TITLE,
    locate=locate_nanogpt,
    find=find_nanogpt,
    read=read_nanogpt,
    accepts=frozenset({"weights_file", "n_head", "activation"}) | EDITS,
)
