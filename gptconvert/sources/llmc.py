"""llm.c's model files: a header of 256 int32 values, then GPT-2's tensors, each stacked over the layers.

Source: karpathy/llm.c ``train_gpt2.py`` (``write_model``) and ``train_gpt2.c``. Version 3 holds float32, version 5
bfloat16, both with the vocabulary padded to a multiple of 128 rows; version 1 is version 3 without the padding.
The file stores neither tensor names nor offsets; the family's name table supplies them. It has no checksums either,
so its size must match the header exactly.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from gptconvert.containers.untrusted import entries, explain_file, file_size, no_such_path
from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.source import Run, Source
from gptconvert.model.tensors import Segment, TensorSet
from gptconvert.sources.format import path_format
from gptconvert.sources.tokenizer_files import find_tokenizer

TITLE = "llm.c (.bin)"
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAGIC = 20240326
#: Other llm.c files by magic number.
OTHERS: Mapping[int, str] = {
    20240327: "llm.c's debug state (activations and gradients)",
    20240328: "llm.c's tokenizer",
    20240520: "llm.c's tokenised training data",
    20240803: "an llm.c Llama 3 checkpoint",
}
#: Version → element type.
VERSIONS: Mapping[int, np.dtype[np.generic]] = {1: np.dtype("<f4"), 3: np.dtype("<f4"), 5: BFLOAT16}
MAX_SIZE, MAX_LAYERS = 1 << 31, 10_000


@dataclass(frozen=True)
class Header:
    """The sizes at the start of the file, under llm.c's names."""

    version: int
    max_seq_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int
    padded_vocab_size: int


def open_llmc(path: str, options: Options) -> Source:
    """Open a model file, or the one in a directory.

    Raises:
        InputError: the file is missing or not a model file, or the directory holds none or several.
        UnsupportedError: an unsupported version.
        UsageError: ``weights_file`` given for a path that is not a directory.
    """
    path = _model_file(path, options)
    size = file_size(path)
    header = read_header(path, size)
    folder, notes = os.path.dirname(path), []
    if header.padded_vocab_size > header.vocab_size:
        rows = f"{header.vocab_size}–{header.padded_vocab_size - 1}"
        notes.append(f"the vocabulary is padded to {header.padded_vocab_size} rows: rows {rows} are left out")
    return Source(
        scheme=FORMAT.name,
        format=f"{TITLE}, version {header.version}",
        path=path,
        tensors=TensorSet({}, (path,)),
        run=Run(
            Segment(path, HEADER_BYTES, size - HEADER_BYTES),
            VERSIONS[header.version],
            {"P": header.padded_vocab_size},
        ),
        config=dict(vars(header)),
        config_path=path,
        tokenizer=find_tokenizer([folder]),
        notes=tuple(notes),
    )


def _model_file(path: str, options: Options) -> str:
    """The file at ``path``; in a directory, the file the options name or the only model file."""
    if not os.path.lexists(path):
        raise no_such_path(path, hub=False)
    if not os.path.isdir(path):
        if options.weights_file is not None:
            hint = "pass the directory, or omit --weights-file"
            raise UsageError("--weights-file needs a directory, and this is a file", path=path, hint=hint)
        return path
    if options.weights_file is not None:
        return _model_file(os.path.join(path, options.weights_file), replace(options, weights_file=None))
    found = _model_files(path)
    if not found:
        raise InputError(
            "no llm.c model file in this directory",
            path=path,
            expected=f"a .bin file that begins with the number {MAGIC}",
            found=", ".join(entries(path)[:8]) or "an empty directory",
        )
    if len(found) > 1:
        raise InputError(
            "several llm.c model files in this directory",
            path=path,
            expected="one",
            found=", ".join(found),
            hint="pass the path of one, or --weights-file NAME",
        )
    return os.path.join(path, found[0])


def _model_files(folder: str) -> list[str]:
    """Names of the model files in a directory; other .bin files may be a tokenizer or debug states."""
    names = entries(folder, quiet=True)
    return [name for name in names if name.endswith(".bin") and _begins_with_magic(os.path.join(folder, name))]


def read_header(path: str, size: int) -> Header:
    """Read and check the header of a file of ``size`` bytes.

    Raises:
        InputError: unreadable, truncated, not a model file, or sizes out of range.
        UnsupportedError: another kind of llm.c file, or an unsupported version.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(HEADER_BYTES)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    magic = int.from_bytes(data[:4], "little")
    if magic in OTHERS:
        raise UnsupportedError(f"this file is {OTHERS[magic]}, not a GPT-2 model", path=path)
    if magic != MAGIC:
        explained = explain_file(path)
        raise InputError(
            "not an llm.c model file" + (f": this file {explained}" if explained else ""),
            path=path,
            expected=f"the number {MAGIC} at the start",
            found=magic,
        )
    if len(data) < HEADER_BYTES:
        raise InputError("file is truncated", path=path, expected=f"{HEADER_BYTES} bytes", found=f"{size} bytes")
    version, context, vocabulary, layers, heads, channels, padded = struct.unpack("<7i", data[4:32])
    if version not in VERSIONS:
        raise _unknown_version(version, path)
    if version == 1:
        padded = vocabulary  # version 1 predates the padding and leaves this word unused
    header = Header(version, context, vocabulary, layers, heads, channels, padded)
    _check(header, path)
    return header


def _check(header: Header, path: str) -> None:
    wrong = {k: v for k, v in vars(header).items() if not 0 < v < (MAX_LAYERS if k == "num_layers" else MAX_SIZE)}
    if header.padded_vocab_size < header.vocab_size:
        wrong["padded_vocab_size"] = header.padded_vocab_size
    if wrong:
        listed = ", ".join(f"{key} = {value}" for key, value in wrong.items())
        raise InputError(
            f"impossible sizes in the header: {listed}", path=path, hint="the file is damaged: fetch or save it again"
        )


def _unknown_version(version: int, path: str) -> UnsupportedError:
    old = version == 2
    return UnsupportedError(
        "unsupported old version of llm.c's model file (bfloat16, layer norms stored separately)"
        if old
        else "unknown version of llm.c's model file",
        path=path,
        expected=f"version {', '.join(map(str, VERSIONS))}",
        found=f"version {version}",
        hint="save the model again with a current train_gpt2.py, which writes version 5" if old else None,
    )


def recognises(path: str) -> bool:
    """Whether a file begins with llm.c's magic number, or a directory holds such a file."""
    return bool(_model_files(path)) if os.path.isdir(path) else _begins_with_magic(path)


def _begins_with_magic(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) == struct.pack("<i", MAGIC)
    except OSError:
        return False


FORMAT = path_format(
    name="llmc", title=TITLE, recognises=recognises, read=open_llmc, accepts=frozenset({"weights_file"})
)
