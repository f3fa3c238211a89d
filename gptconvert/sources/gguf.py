"""GPT-2 and GPT-NeoX from GGUF files (llama.cpp) with float weights, and the tokenizer in them.

Quantised files are refused: their weights are approximations, and the model that was quantised is what to convert.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptconvert.containers.gguf import TYPES, GgufModel, Value, begins_as_gguf, is_later_file, read_gguf
from gptconvert.containers.untrusted import entries, no_such_path
from gptconvert.errors import InputError, UnsupportedError, UsageError, short_repr
from gptconvert.model.options import Options
from gptconvert.model.source import Source, StoredTokenizer
from gptconvert.model.tensors import TensorSet
from gptconvert.sources.format import EDITS, path_format

TITLE = "GGUF (llama.cpp)"
ENDING = ".gguf"
#: Architecture → naming scheme.
SCHEMES: Mapping[str, str] = {"gpt2": "gguf:gpt2", "gptneox": "gguf:gptneox"}
#: First parts of the keys that do not affect the output; the tokenizer's are read apart.
HARMLESS = ("general.", "tokenizer.", "split.", "quantize.")
#: Keys of the tokenizer.
MODEL, TOKENS, TOKEN_TYPES, MERGES = (
    f"tokenizer.ggml.{name}" for name in ("model", "tokens", "token_type", "merges")
)
CHAT_TEMPLATE = "tokenizer.chat_template"
#: llama.cpp's types of tokens: special ones, ones that users added, and ids without a token.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
#: Special ids in the file → in config.json.
SPECIAL_IDS: Mapping[str, str] = {"bos": "bos", "eos": "eos", "padding": "pad"}


def open_gguf(path: str, options: Options) -> Source:
    """Open a file, the first of several, or the one in a directory.

    Raises:
        InputError: missing, damaged, or not one model.
        UnsupportedError: quantised, or of another architecture.
        UsageError: ``weights_file`` given for a path that is not a directory.
    """
    path = _model_file(path, options)
    model = read_gguf(path)
    architecture = model.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in SCHEMES:
        raise UnsupportedError(
            "this architecture is not read from GGUF files",
            path=path,
            item="general.architecture",
            expected=" or ".join(SCHEMES),
            found=short_repr(architecture),
        )
    _refuse_quantised(model, path)
    tokenizer, notes = _tokenizer(model.metadata)
    tensors = {name: tensor.stored for name, tensor in model.tensors.items()}
    return Source(
        scheme=SCHEMES[architecture],
        format=TITLE,
        path=path,
        tensors=TensorSet(tensors, model.files),
        config=_config(model.metadata, architecture),
        config_path=path,
        stored_tokenizer=tokenizer,
        notes=notes,
    )


def _refuse_quantised(model: GgufModel, path: str) -> None:
    rounded = sorted({t.type.name for t in model.tensors.values() if t.type.dtype is None})
    if rounded:
        floats = " or ".join(name for name, kind in TYPES.items() if kind.dtype is not None)
        raise UnsupportedError(
            "this is a quantised GGUF file, whose weights are approximations",
            path=path,
            expected=floats,
            found=", ".join(rounded),
            hint="convert the model that it was quantised from, or its F16, BF16 or F32 file",
        )


def _config(metadata: Mapping[str, Value], architecture: str) -> dict[str, object]:
    """The keys of the architecture without its prefix, and the special ids."""
    config: dict[str, object] = {}
    for key, value in metadata.items():
        if key.startswith(f"{architecture}."):
            config[key.removeprefix(f"{architecture}.").replace(".", "_")] = _shortest(value)
        elif not key.startswith(HARMLESS):
            config[key] = value  # refused by name
    for stored, name in SPECIAL_IDS.items():
        if (number := metadata.get(f"tokenizer.ggml.{stored}_token_id")) is not None:
            config[f"{name}_token_id"] = number
    return config


def _shortest(value: Value) -> Value:
    """A float32 as the shortest decimal number that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _tokenizer(metadata: Mapping[str, Value]) -> tuple[StoredTokenizer | None, tuple[str, ...]]:
    """The byte-level BPE tokenizer; None if the file has none, or one of another kind, which is noted."""
    kind, tokens, merges = (metadata.get(key) for key in (MODEL, TOKENS, MERGES))
    types = metadata.get(TOKEN_TYPES)
    if kind != "gpt2" or not _is_text(tokens) or not _is_text(merges):
        found = "none" if kind is None else short_repr(kind)
        return None, (
            f"no tokenizer is written: {TITLE} files of these models have a gpt2 tokenizer, this has {found}",
        )
    assert isinstance(tokens, list) and isinstance(merges, list)  # as just checked
    kinds: list[Any] = types if isinstance(types, list) and len(types) == len(tokens) else [1] * len(tokens)
    used = {str(t): i for i, (t, of) in enumerate(zip(tokens, kinds, strict=True)) if of != UNUSED}
    if not used:
        return None, ("no tokenizer is written: the file has placeholders in place of its tokens",)
    pairs = [tuple(str(merge).split(" ")) for merge in merges]
    settings: dict[str, object] = {}
    for stored, name in SPECIAL_IDS.items():
        number = metadata.get(f"tokenizer.ggml.{stored}_token_id")
        if type(number) is int and 0 <= number < len(tokens) and kinds[number] != UNUSED:
            settings[f"{name}_token"] = str(tokens[number])
        if metadata.get(f"tokenizer.ggml.add_{name}_token") is True:
            settings[f"add_{name}_token"] = True
    if isinstance(template := metadata.get(CHAT_TEMPLATE), str):
        settings["chat_template"] = template
    special = tuple(token for token, number in used.items() if kinds[number] == CONTROL)
    added = tuple(token for token, number in used.items() if kinds[number] == USER_DEFINED)
    return StoredTokenizer(used, tuple(pairs), special, added, settings), ()


def _is_text(value: Value | None) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _model_file(path: str, options: Options) -> str:
    if not os.path.lexists(path):
        raise no_such_path(path, hub=False)
    if not os.path.isdir(path):
        if options.weights_file is not None:
            hint = "pass the directory, or omit --weights-file"
            raise UsageError("--weights-file needs a directory, and this is a file", path=path, hint=hint)
        return path
    if options.weights_file is not None:
        return os.path.join(path, options.weights_file)
    found = _files(path)
    if len(found) != 1:
        raise InputError(
            "several GGUF files in this directory" if found else "no GGUF file in this directory",
            path=path,
            expected="one",
            found=", ".join(found[:8]) or ", ".join(entries(path)[:8]) or "an empty directory",
            hint="pass the path of one, or --weights-file NAME" if found else None,
        )
    return os.path.join(path, found[0])


def _files(folder: str) -> list[str]:
    """Names of the GGUF files in a directory, of split models the first."""
    names = entries(folder, quiet=True, files_only=True)
    return [name for name in names if name.endswith(ENDING) and not is_later_file(name)]


def recognises(path: str) -> bool:
    """Whether a file begins with GGUF's magic bytes, or a directory holds a file with its ending."""
    return bool(_files(path)) if os.path.isdir(path) else begins_as_gguf(path)


FORMAT = path_format(
    name="gguf",
    title=TITLE,
    recognises=recognises,
    read=open_gguf,
    accepts=frozenset({"weights_file", "activation"}) | EDITS,
)
