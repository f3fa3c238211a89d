"""A checkpoint opened and described: what can be known of it from headers alone.

Apart from the rest of the flow (:mod:`gptconvert.pipeline`), whose imports would take longer than the look.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from gptconvert.checkpoint import Checkpoint
from gptconvert.families import Request, family_named, understand
from gptconvert.sources.detect import open_source
from gptconvert.sources.source import OpenOptions


def open_checkpoint(
    source: str,
    *,
    format: str | None = None,
    opening: OpenOptions | None = None,
    request: Request | None = None,
) -> Checkpoint:
    """The checkpoint at a path or hub name: configuration checked, every tensor accounted for, nothing read.

    Raises:
        GptConvertError: it is damaged, incomplete, unsupported or unsafe.
    """
    opened = open_source(source, opening or OpenOptions(), format=format)
    directory = source if os.path.isdir(source) else None
    return understand(dataclasses.replace(opened, directory=directory), request or Request())


def inspect(source: str, *, opening: OpenOptions | None = None, request: Request | None = None) -> dict[str, Any]:
    """What a checkpoint is, as plain values. Only headers are read."""
    checkpoint = open_checkpoint(source, opening=opening, request=request)
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
        "bytes": checkpoint.nbytes,
        "dtypes": sorted({weight.dtype.name for weight in weights.values()}),
        "config": checkpoint.config.as_dict(),
        "tensors": [
            {"name": name, "dtype": t.dtype.name, "shape": list(t.shape), "bytes": t.nbytes}
            for name, t in stored.items()
        ],
        "dropped": dict(checkpoint.dropped),
        "tokenizer": sorted(checkpoint.source.tokenizer),
        "notes": list(checkpoint.notes),
    }
