"""Sizes missing in a trainer's configuration: from tensor shapes, from options, or by convention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gptconvert.errors import InputError, UsageError
from gptconvert.families.family import ConfigInput
from gptconvert.model.config_table import Reading, Values
from gptconvert.model.names import collapse
from gptconvert.model.options import Options
from gptconvert.model.resolution import find_prefix
from gptconvert.model.schemes import Scheme
from gptconvert.model.tensors import LazyTensor

#: Vocabulary sizes of GPT-2's tokenizer: exact, and padded to a multiple of 64.
GPT2_VOCABULARIES = (50257, 50304)
GPT2_END = 50256


@dataclass(frozen=True)
class TableSizes:
    """Sizes from the shapes of the token and position tables, and the number of layers.

    Attributes:
        prefix: of the names in these files.
        fields: field of ``GPTConfig`` → size.
    """

    prefix: str
    fields: Mapping[str, int]


def table_sizes(scheme: Scheme, tensors: Mapping[str, LazyTensor]) -> TableSizes | None:
    """Vocabulary, context, width and depth, from tensors named as in ``scheme``; None without both tables."""
    prefix = find_prefix(scheme, tensors)
    tables = [tensors.get(f"{prefix or ''}{name}") for name in _table_names(scheme)]
    shapes = [() if tensor is None else tensor.shape for tensor in tables]
    if prefix is None or [len(shape) for shape in shapes] != [2, 2]:
        return None
    stems = {n.partition("{i}")[0] for row in scheme.rows for n in (*row.names, *row.aliases) if "{i}" in n}
    layer = re.compile(f"{re.escape(prefix)}(?:{'|'.join(map(re.escape, sorted(stems)))})([0-9]{{1,5}})[./]")
    layers = max((int(m[1]) for name in tensors if (m := layer.match(name))), default=-1) + 1
    (vocabulary, width), (context, _) = shapes
    return TableSizes(prefix, {"vocab_size": vocabulary, "n_ctx": context, "n_embd": width, "n_layer": layers})


def required_sizes(scheme: Scheme, tensors: Mapping[str, LazyTensor], path: str | None) -> TableSizes:
    """As :func:`table_sizes`.

    Raises:
        InputError: the token or position table is missing or not two-dimensional.
    """
    sizes = table_sizes(scheme, tensors)
    if sizes is None:
        tables = ", ".join(f"…{name}" for name in _table_names(scheme))
        raise InputError(
            f"no token and position tables ({tables}) of two axes each",
            path=path,
            found=", ".join(collapse(sorted(tensors))[:6]) or "no tensors",
        )
    return sizes


def _table_names(scheme: Scheme) -> list[str]:
    rows = {row.canonical: row for row in scheme.rows}
    return [rows[canonical].names[0] for canonical in ("wte.weight", "wpe.weight")]


def heads_of_width(width: int, options: Options, missing: str) -> tuple[int, str]:
    """The number of heads if no file records it: ``--n-head``, else one per 64 features, as in OpenAI's models.

    Args:
        width: D.
        options: the user's choices.
        missing: why it is unknown, used in error messages.

    Returns:
        The number, and where it comes from.

    Raises:
        UsageError: ``--n-head`` is required, or does not divide the width.
    """
    if options.n_head is None:
        if width % 64 or not width:
            raise UsageError(
                f"{missing}, and the shapes do not give the number of heads (n_embd {width} is not a multiple of 64, "
                "OpenAI's head size)",
                hint="pass --n-head N or --hparams FILE",
            )
        return width // 64, f"{width} / 64, OpenAI's head size"
    if options.n_head < 1 or width % options.n_head:
        raise UsageError(
            f"--n-head {options.n_head} does not divide the embedding's width", expected=f"a divisor of {width}"
        )
    return options.n_head, "--n-head"


def stated_heads(given: ConfigInput, reading: Reading, missing: str) -> tuple[int, list[str]]:
    """The number of heads, and a note if no file records it.

    Raises:
        UsageError: see :func:`heads_of_width`; or ``--n-head`` contradicts the file.
    """
    heads: int | None = reading.values["n_head"]
    requested = given.options.n_head
    if heads is None:
        heads, how = heads_of_width(reading.values["n_embd"], given.options, missing)
        return heads, [f"n_head = {heads} ({how})"]
    if requested not in (None, heads):
        raise UsageError("--n-head contradicts the checkpoint", path=given.path, expected=heads, found=requested)
    return heads, []


def gpt2_end(values: Values) -> int | None:
    """Id of ``<|endoftext|>`` if the vocabulary is that of GPT-2's tokenizer."""
    return GPT2_END if values["vocab_size"] in GPT2_VOCABULARIES else None
