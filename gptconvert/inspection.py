"""Open a checkpoint, and describe it from its headers alone.

Separate from :mod:`gptconvert.pipeline`, whose imports take longer than the description.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from gptconvert.containers.untrusted import boundary
from gptconvert.errors import UsageError
from gptconvert.families.registry import family_named, understand
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.generation import GENERATION_CONFIG
from gptconvert.model.options import Options, as_options
from gptconvert.model.source import Source
from gptconvert.sources.detect import open_source
from gptconvert.targets.registry import check_names


def open_checkpoint(
    source: str | os.PathLike[str], options: Options | None = None, *, format: str | None = None
) -> Checkpoint:
    """Open the checkpoint at a path or in a hub repository: check its configuration and tensors, read no weights.

    Args:
        source: a local path or a hub repository.
        options: how to open it; the output options among them become the defaults of ``convert``.
        format: name of a source format (``openai-tf``); None detects it.

    Raises:
        GptConvertError: it is damaged, incomplete, unsupported or unsafe, or an option does not apply to it.
    """
    options, source = as_options(options), os.fsdecode(source)
    check_names(options.targets)
    if options.base is not None:
        source, options = _adapted(source, options, options.base)
    opened = open_source(source, options, format=format)
    directory = source if os.path.isdir(source) else None
    with boundary(source, opened.format):
        return understand(dataclasses.replace(opened, directory=directory), options)


def _adapted(adapter: str, options: Options, base: str) -> tuple[str, Options]:
    """The base model, and the options that merge the adapter into it.

    Raises:
        UsageError: another adapter was given too.
    """
    if options.adapter is not None:
        hint = "to merge one adapter, pass --adapter with the base as SOURCE, or --base with the adapter as SOURCE"
        raise UsageError("--adapter and --base exclude each other", path=adapter, hint=hint)
    return base, dataclasses.replace(options, adapter=adapter, base=None)


def summary(checkpoint: Checkpoint) -> dict[str, object]:
    """The fields ``model`` and ``source`` of a report."""
    config, source = checkpoint.config, checkpoint.source
    return {
        "model": {
            "title": family_named(config.family).title,
            "family": config.family,
            "task": config.task,
            "parameters": sum(weight.size for weight in checkpoint.weights.values()),
            "layers": config.n_layer,
        },
        "source": {"format": source.format, "repo": source.repo, "revision": source.revision},
    }


def inspect(source: str | os.PathLike[str], options: Options | None = None) -> dict[str, Any]:
    """Describe a checkpoint as plain values. Only headers are read."""
    checkpoint = open_checkpoint(source, options)
    weights = checkpoint.weights
    stored = {name: t for name, t in checkpoint.source.tensors.items() if name not in checkpoint.dropped}
    return {
        "title": family_named(checkpoint.config.family).title,
        "format": checkpoint.source.format,
        "family": checkpoint.config.family,
        "task": checkpoint.config.task,
        "revision": checkpoint.source.revision,
        "prefix": checkpoint.prefix,
        "parameters": sum(weight.size for weight in weights.values()),
        "size": checkpoint.nbytes,
        "dtypes": sorted({weight.dtype.name for weight in weights.values()}),
        "config": checkpoint.config.as_dict(),
        "special_ids": dataclasses.asdict(checkpoint.special_ids),
        "tensors": [
            {"name": name, "dtype": t.dtype.name, "shape": list(t.shape), "size": t.nbytes}
            for name, t in stored.items()
        ],
        "dropped": dict(checkpoint.dropped),
        "tokenizer": _tokenizer(checkpoint.source),
        "inventory": [dataclasses.asdict(entry) for entry in checkpoint.source.inventory],
        "notes": list(checkpoint.notes),
    }


def _tokenizer(source: Source) -> list[str]:
    """Names of the tokenizer's files, or that of the weights file if it holds a tokenizer."""
    stored = [] if source.stored_tokenizer is None else [os.path.basename(source.path)]
    return stored or sorted(source.tokenizer.keys() - {GENERATION_CONFIG})
