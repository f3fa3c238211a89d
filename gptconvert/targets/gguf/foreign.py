"""The metadata of GGUF files of any origin, compared with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from gptconvert.containers.gguf import TYPES, GgufModel, Value
from gptconvert.errors import GptConvertError, UnsupportedError, short_repr
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.sources.gguf import MERGES, TOKEN_TYPES, TOKENS, UNUSED
from gptconvert.targets.gguf.layout import ARCHITECTURES
from gptconvert.targets.gguf.metadata import architecture_metadata
from gptconvert.targets.gguf.tokenizer import tokenizer_metadata

#: Keys that may be absent → the value that llama.cpp then takes.
DEFAULTS: Mapping[str, Value] = {"gptneox.rope.freq_base": 10000.0, "phi2.rope.freq_base": 10000.0}
#: Keys of an architecture, after its name, that repeat another: (key, the other).
REPEATED = {"attention.head_count_kv": "attention.head_count"}
#: Keys that do not affect the output.
HARMLESS = frozenset(("vocab_size", "rope.scaling.original_context_length", "rope.scaling.finetuned"))
#: Keys of the tokenizer that both must have.
ENDS = ("tokenizer.ggml.eos_token_id",)


def check_model(model: GgufModel, path: str) -> None:
    """Refuse tensors of types that are not decoded.

    Raises:
        UnsupportedError: there are some.
    """
    other = sorted({t.type.name for t in model.tensors.values() if t.type.name not in TYPES})
    if other:
        raise UnsupportedError(
            "tensors of these types are not compared", path=path, expected=", ".join(TYPES), found=", ".join(other)
        )


def metadata_problems(checkpoint: Checkpoint, model: GgufModel, *, planned: bool) -> Iterator[str]:
    """Differences that would change what is computed, or how text is tokenized.

    Args:
        checkpoint: the original, with attention scores scaled as llama.cpp does.
        model: the file.
        planned: whether this program has just written the file; its tokenizer is then required.
    """
    found, architecture = model.metadata, ARCHITECTURES[checkpoint.config.family].name
    if found.get("general.architecture") != architecture:
        yield f"general.architecture is {short_repr(found.get('general.architecture'))}, expected {architecture!r}"
        return
    expected = architecture_metadata(checkpoint.config)
    for key, value in expected.items():
        stored = found.get(key, DEFAULTS.get(key))
        if not _same(stored, value):
            yield f"{key} is {short_repr(stored)}, expected {short_repr(value)}"
    for key in (key for key in found if key.startswith(f"{architecture}.") and key not in expected):
        name = key.removeprefix(f"{architecture}.")
        repeated = REPEATED.get(name)
        if repeated is not None and found[key] == expected[f"{architecture}.{repeated}"]:
            continue
        if name not in HARMLESS:
            yield f"{key} is {short_repr(found[key])}, which is not a key of this model"
    yield from _tokenizer_problems(checkpoint, found, planned=planned)


def _same(found: object, expected: Value) -> bool:
    """Whether two values are equal, numbers as float32 has them."""
    if isinstance(expected, float):
        return type(found) is float and bool(np.float32(found) == np.float32(expected))
    return type(found) is type(expected) and found == expected


def _tokenizer_problems(checkpoint: Checkpoint, found: Mapping[str, Value], *, planned: bool) -> Iterator[str]:
    try:
        expected, _ = tokenizer_metadata(checkpoint)
    except GptConvertError:
        if planned:
            raise
        return
    if planned:
        yield from (f"{key} differs" for key, value in expected.items() if found.get(key) != value)
        return
    tokens, types, stored = expected[TOKENS], expected[TOKEN_TYPES], found.get(TOKENS)
    assert isinstance(tokens, list) and isinstance(types, list)  # made by tokenizer_metadata
    if not isinstance(stored, list) or len(stored) != len(tokens):
        count = len(stored) if isinstance(stored, list) else 0
        yield f"{TOKENS} has {count} tokens, expected {len(tokens)}"
        return
    if all(kind == UNUSED for kind in types):
        return  # the checkpoint has no tokenizer
    wrong = [i for i, kind in enumerate(types) if kind != UNUSED and stored[i] != tokens[i]]
    if wrong:
        first = wrong[0]
        more = f"; {len(wrong)} tokens differ"
        yield f"token {first} is {short_repr(stored[first])}, expected {short_repr(tokens[first])}{more}"
    yield from (f"{key} differs" for key in (MERGES, *ENDS) if found.get(key) != expected[key])
