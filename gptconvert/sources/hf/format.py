"""Hugging Face checkpoints: a directory, a weights file next to its config.json, or a repository name."""

from __future__ import annotations

import os
from dataclasses import replace

from gptconvert.containers.json import read_json_object
from gptconvert.containers.untrusted import entries, file_size, is_regular, no_such_path, read_small
from gptconvert.errors import InputError, UsageError
from gptconvert.model.generation import GENERATION_CONFIG
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.model.tensors import TensorSet
from gptconvert.sources import hub
from gptconvert.sources.advice import advice_for, refuse_archive
from gptconvert.sources.format import EDITS, path_format
from gptconvert.sources.hf.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LEFT_BEHIND,
    adapter_directory,
    is_adapter,
    lone_adapter,
    read_adapter,
)
from gptconvert.sources.hf.files import (
    CONFIG,
    STANDARD_NAMES,
    Weights,
    choose_weights,
    could_be_weights,
    unsupported_kind,
    weights_named,
)
from gptconvert.sources.hf.shards import read_sharded
from gptconvert.sources.tokenizer_files import find_tokenizer, huggingface_names

#: Largest config.json accepted, in bytes.
MAX_CONFIG = 16 << 20


def open_hf(path: str, options: Options) -> Source:
    """Open a checkpoint in Hugging Face's layout, reading only headers.

    Args:
        path: directory, weights file, index file or config.json; otherwise a repository on the hub (``org/name``).
        options: ``hparams`` replaces config.json; ``weights_file`` chooses among several; ``revision``,
            ``cache_dir`` and ``offline`` apply to the hub; ``adapter`` is merged into the weights.

    Raises:
        InputError: files missing, damaged or inconsistent, or the repository cannot be fetched.
        UnsupportedError: unsupported kind of weights.
        UnsafeInputError: files that run code, leave the directory or are not regular files.
    """
    source = _open_model(path, options)
    return source if options.adapter is None else _with_adapter(source, options.adapter, options)


def _with_adapter(source: Source, path: str, options: Options) -> Source:
    """The source with an adapter to merge. A tokenizer saved with the adapter replaces the base's as a whole."""
    notes: tuple[str, ...] = ()
    if not os.path.lexists(path) and hub.is_repo_id(path):
        fetched = hub.fetch_adapter(path, options)
        adapter = replace(read_adapter(fetched.directory), repo=path, revision=fetched.revision)
        notes = fetched.notes
    else:
        adapter = read_adapter(adapter_directory(path))
    tokenizer = source.tokenizer
    if adapter.tokenizer:
        generation = {name: file for name, file in tokenizer.items() if name == GENERATION_CONFIG}
        tokenizer = {**generation, **adapter.tokenizer}
    beside = {os.path.dirname(os.path.abspath(file)) for file in source.tensors.files}
    own = beside == {os.path.abspath(adapter.path)}
    return replace(
        source,
        format=f"{source.format}, with a LoRA adapter",
        adapter=adapter,
        tokenizer=tokenizer,
        notes=(*(note for note in source.notes if not (own and note == LEFT_BEHIND)), *notes),
    )


def _open_model(path: str, options: Options) -> Source:
    """Open the model itself, local or on the hub."""
    if os.path.lexists(path):
        if options.revision is not None:
            hint = "omit --revision; to read the repository instead, run in a directory without this path"
            raise UsageError("--revision applies to hub repositories, and this is a local path", path=path, hint=hint)
        return _open_local(path, options)
    if not hub.is_repo_id(path):
        raise no_such_path(path)
    fetched = hub.fetch(path, options)
    source = _open_local(fetched.directory, Options(hparams=options.hparams, weights_file=fetched.weights_file))
    notes = tuple(dict.fromkeys((*fetched.notes, *source.notes)))
    return replace(
        source,
        format=f"{source.format} (hub)",
        revision=fetched.revision,
        repo=path,
        notes=notes,
        listing=fetched.names,
    )


def _open_local(path: str, options: Options) -> Source:
    directory, wanted = _split(path, options.weights_file)
    names = entries(directory, files_only=True)
    if is_adapter(names) and (wanted in ADAPTER_WEIGHTS or not any(map(could_be_weights, names))):
        raise lone_adapter(directory, names)
    config_path = options.hparams or os.path.join(directory, CONFIG)
    if options.hparams is None and CONFIG not in names:
        raise _no_config(directory, names)
    config = read_json_object(config_path, MAX_CONFIG, CONFIG)
    weights, notes = choose_weights(names, wanted, directory)
    notes += [LEFT_BEHIND] if is_adapter(names) else []
    return Source(
        scheme="hf",
        format=f"Hugging Face, {weights.kind.title}{', sharded' if weights.sharded else ''}",
        path=path,
        tensors=_read(os.path.join(directory, weights.name), weights),
        config=config,
        config_path=config_path,
        tokenizer=find_tokenizer([directory], huggingface_names(names)),
        folder=directory,
        notes=tuple(notes),
    )


def _split(path: str, weights_file: str | None) -> tuple[str, str | None]:
    """Directory and name of the weights file, from ``path`` and the option."""
    if os.path.isdir(path):
        return path, weights_file
    file_size(path)
    refuse_archive(path)
    directory, name = os.path.split(path)
    if name in (CONFIG, ADAPTER_CONFIG):
        return directory or ".", weights_file
    if weights_file is not None and weights_file != name:
        raise InputError(
            "the path and --weights-file name different weights files",
            path=path,
            found=f"--weights-file {weights_file}",
            hint="pass the directory with --weights-file, or the file without it",
        )
    return directory or ".", name


def _read(path: str, weights: Weights) -> TensorSet:
    kind = weights.kind
    return read_sharded(path, kind.read, kind.index_name) if weights.sharded else kind.read(path)


def _no_config(directory: str, names: list[str]) -> InputError:
    advice = advice_for(directory)
    if advice is not None and ADAPTER_CONFIG not in names:
        return InputError(f"config.json is missing: this is {advice[0]}", path=directory, hint=advice[1])
    hint = "fetch it from the weights' origin, or pass --hparams FILE"
    return InputError("config.json is missing", path=directory, found=", ".join(names[:8]) or "no files", hint=hint)


def recognises(path: str) -> bool:
    """Whether a local path looks like a Hugging Face checkpoint."""
    if os.path.isdir(path):
        names = entries(path, files_only=True, quiet=True)
        return (
            bool(STANDARD_NAMES.intersection(names))
            or is_adapter(names)
            or (
                CONFIG in names
                and (_names_model_type(os.path.join(path, CONFIG)) or any(map(unsupported_kind, names)))
            )
        )
    directory, name = os.path.split(path)
    if name in (CONFIG, ADAPTER_CONFIG, *ADAPTER_WEIGHTS) or name.endswith((".safetensors", ".h5", ".msgpack")):
        return True
    return weights_named(name) is not None and is_regular(path) and os.path.lexists(os.path.join(directory, CONFIG))


def _names_model_type(path: str) -> bool:
    """Whether a config.json is transformers'; other programs use that name too."""
    try:
        return b'"model_type"' in read_small(path, MAX_CONFIG, CONFIG)
    except InputError:
        return False


FORMAT = path_format(
    name="hf",
    title="Hugging Face transformers (safetensors, .bin, tf_model.h5, flax_model.msgpack; directory or hub)",
    recognises=recognises,
    read=open_hf,
    accepts=frozenset({"hparams", "weights_file", "revision", "pad_token_id", "scope", "adapter", "base"}) | EDITS,
)
