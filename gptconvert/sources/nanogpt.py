"""nanoGPT's ``ckpt.pt``: a ``torch.save`` of the state dict, ``model_args`` and the state of the training run.

Source: karpathy/nanoGPT ``train.py``. The optimizer's state, twice the size of the weights, is in the same file
and is never read. The tokenizer is elsewhere: GPT-2's, or for characters a ``meta.pkl`` in the data directory,
which is a pickle and is therefore never opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from gptconvert.containers.torch import TorchFile, read_if_torch, read_torch_pickle, tensors_of
from gptconvert.containers.untrusted import no_such_path
from gptconvert.errors import InputError, UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources.format import Format
from gptconvert.sources.tokenizer_files import find_tokenizer

TITLE = "nanoGPT (ckpt.pt)"
CHECKPOINT = "ckpt.pt"
#: The training script's entries that make such a file.
MODEL, ARGUMENTS = "model", "model_args"
#: Sizes of vocabulary that say "GPT-2's encoding": as it is, and padded to a multiple of 64.
GPT2_SIZES = (50257, 50304)


def read_nanogpt(file: TorchFile, options: Options) -> Source:
    """The checkpoint in this file.

    Raises:
        InputError: nanoGPT did not write it.
    """
    path = file.path
    state, arguments = _parts(file)
    tensors = tensors_of(file, state, path)
    folder = os.path.dirname(path)
    tokenizer = find_tokenizer([folder])
    return Source(
        scheme=FORMAT.name,
        format=TITLE,
        path=path,
        tensors=tensors,
        config=arguments,
        config_path=path,
        tokenizer=tokenizer,
        notes=_tokenizer_notes(arguments.get("vocab_size"), tokenizer, folder),
    )


def find_nanogpt(path: str, options: Options) -> TorchFile:
    """The checkpoint file, or the one in the output directory of a run.

    Raises:
        InputError: no such file, or a damaged one.
        UnsafeInputError: its pickle names anything but tensors and plain data.
        UsageError: both the path and ``options.weights_file`` name a file.
    """
    return read_torch_pickle(_checkpoint_file(path, options))


def _checkpoint_file(path: str, options: Options) -> str:
    if not os.path.lexists(path):
        raise no_such_path(path)
    if os.path.isdir(path):
        return os.path.join(path, options.weights_file or CHECKPOINT)
    if options.weights_file is not None:
        raise UsageError("--weights-file needs a directory", path=path)
    return path


def locate_nanogpt(path: str, options: Options) -> TorchFile | None:
    """A file or directory of nanoGPT's name, or any PyTorch file that holds what nanoGPT puts into one."""
    named = os.path.join(path, CHECKPOINT) if os.path.isdir(path) else path
    if os.path.basename(named) == CHECKPOINT and os.path.lexists(named):
        return find_nanogpt(path, options)
    file = None if os.path.isdir(path) else read_if_torch(path)
    ours = file is not None and isinstance(file.tree, dict) and {MODEL, ARGUMENTS} <= file.tree.keys()
    if ours:
        _checkpoint_file(path, options)
    return file if ours else None


def _parts(file: TorchFile) -> tuple[Mapping[object, object], dict[str, object]]:
    """The state dict and ``model_args``."""
    tree = file.tree if isinstance(file.tree, dict) else {}
    state, arguments = tree.get(MODEL), tree.get(ARGUMENTS)
    if not isinstance(state, dict) or not isinstance(arguments, dict):
        found = ", ".join(str(key) for key in list(tree)[:8]) or f"a {type(file.tree).__name__}"
        raise InputError(
            "not a nanoGPT checkpoint",
            path=file.path,
            expected="a dictionary with 'model' and 'model_args'",
            found=found,
            hint="a state dict alone is read as Hugging Face's pytorch_model.bin, with a config.json beside it",
        )
    return state, {str(key): value for key, value in arguments.items()}


def _tokenizer_notes(vocabulary: object, tokenizer: Mapping[str, str], folder: str) -> tuple[str, ...]:
    if tokenizer:
        return ()
    if os.path.lexists(os.path.join(folder, "meta.pkl")):
        return ("meta.pkl, the character vocabulary, is a pickle and is not opened: no tokenizer is written",)
    text = (
        "nanoGPT encodes text with GPT-2's tokenizer and keeps no copy of it: put GPT-2's encoder.json and vocab.bpe "
        "beside the checkpoint to have tokenizer files written"
    )
    return (text,) if vocabulary in GPT2_SIZES else ()


FORMAT = Format(
    name="nanogpt",
    title=TITLE,
    locate=locate_nanogpt,
    find=find_nanogpt,
    read=read_nanogpt,
    accepts=frozenset({"weights_file", "n_head", "activation"}),
)
