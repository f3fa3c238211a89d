"""A byte-level BPE tokenizer as GGUF's metadata.

llama.cpp splits text by its own regular expressions, chosen by name; ``gpt-2`` is that of GPT-2's tokenizer and of
GPT-NeoX's. A tokenizer that splits otherwise is refused: the file would read text wrongly, without an error.
Source: ggml-org/llama.cpp ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gptconvert.containers.gguf import Value
from gptconvert.errors import UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.sources.gguf import CHAT_TEMPLATE, CONTROL, MERGES, MODEL, TOKEN_TYPES, TOKENS, UNUSED, USER_DEFINED
from gptconvert.sources.tokenizer_files import CHAT_TEMPLATE as TEMPLATE_FILE
from gptconvert.targets.package.tokenizer import stored_bpe, tokenizer_files
from gptconvert.targets.package.tokenizer_process import describe

NORMAL = 1
NO_TOKENIZER = (
    "the GGUF file has placeholders in place of tokens, because the checkpoint has no tokenizer: "
    "llama.cpp runs it on token ids only"
)


def tokenizer_metadata(checkpoint: Checkpoint) -> tuple[dict[str, Value], tuple[str, ...]]:
    """The keys of the tokenizer, and notes for the user.

    Raises:
        UnsupportedError: the format cannot express the tokenizer, or it has more tokens than the model.
        InputError: a tokenizer file is corrupt.
    """
    files, _ = tokenizer_files(checkpoint)
    vocabulary, notes = checkpoint.config.vocab_size, list[str]()
    raw: Any = json.loads(files["tokenizer.json"]) if "tokenizer.json" in files else None
    if raw is None and any(not name.endswith("_config.json") for name in files):
        raise _refused(["it is not a byte-level BPE tokenizer"], checkpoint)
    ids: Mapping[str, int] = {}
    merges: list[tuple[str, str]] = []
    added: dict[str, int] = {}
    if raw is None:
        notes.append(NO_TOKENIZER)
    elif reasons := [*_why_not(raw)]:
        raise _refused(reasons, checkpoint)
    else:
        if raw.get("normalizer") is not None:
            notes.append("llama.cpp does not normalise text to NFC, as the tokenizer does")
        _, merges = stored_bpe(raw["model"], checkpoint.source.path)
        ids = describe(files["tokenizer.json"], checkpoint.source.path).tokens  # the library numbers added tokens
        flags = {token["content"]: token.get("special") for token in raw.get("added_tokens") or ()}
        added = {token: CONTROL if special else USER_DEFINED for token, special in flags.items()}
    tokens, types = _tokens(ids, added, checkpoint)
    end, beginning, invented = _ends(checkpoint, types)
    notes += [f"the model has no end-of-text token: GGUF needs one, and token {end} is named in its place"] * invented
    settings: Any = json.loads(files.get("tokenizer_config.json", b"{}"))
    metadata: dict[str, Value] = {
        MODEL: "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        TOKENS: tokens,
        TOKEN_TYPES: types,
        MERGES: [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": beginning,
        "tokenizer.ggml.eos_token_id": end,
    }
    pad = checkpoint.special_ids.pad
    if pad is not None and 0 <= pad < vocabulary:
        metadata["tokenizer.ggml.padding_token_id"] = pad
    for name in ("bos", "eos"):
        metadata[f"tokenizer.ggml.add_{name}_token"] = settings.get(f"add_{name}_token") is True
    template = files[TEMPLATE_FILE].decode() if TEMPLATE_FILE in files else settings.get("chat_template")
    if isinstance(template, str) and template:
        metadata[CHAT_TEMPLATE] = template
    return metadata, tuple(notes)


def _refused(reasons: list[str], checkpoint: Checkpoint) -> UnsupportedError:
    return UnsupportedError(
        "llama.cpp cannot tokenize text as this model's tokenizer does: " + "; ".join(reasons),
        path=checkpoint.source.path,
        expected="GPT-2's rules for splitting text, and its byte alphabet",
        hint="use another target",
    )


def _why_not(raw: Mapping[str, Any]) -> Iterator[str]:
    """Differences between a tokenizer.json and llama.cpp's ``gpt-2`` rules."""
    model = raw.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        yield f"its model is {model.get('type')}, not BPE"
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield f"{key} is {model[key]!r}"
    for key in ("byte_fallback", "ignore_merges"):
        if model.get(key):
            yield f"{key} is on"
    before = raw.get("pre_tokenizer") or {}
    if before.get("type") != "ByteLevel":
        yield f"its pre-tokenizer is {before.get('type') or 'absent'}, not ByteLevel"
    elif before.get("add_prefix_space") or before.get("use_regex") is False:
        yield "it does not split text as GPT-2's does"
    normalizer = raw.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        yield f"it normalises text ({normalizer.get('type')})"


def _tokens(ids: Mapping[str, int], added: Mapping[str, int], checkpoint: Checkpoint) -> tuple[list[str], list[int]]:
    """Every token and its type; ids without a token get placeholders.

    Raises:
        UnsupportedError: a token's id is outside the model's vocabulary.
    """
    size = checkpoint.config.vocab_size
    named = {number: (token, added.get(token, NORMAL)) for token, number in ids.items()}
    outside = [number for number in named if number >= size]
    if outside:
        raise UnsupportedError(
            "the tokenizer has tokens that the model lacks, and GGUF needs a row of weights for each",
            path=checkpoint.source.path,
            item=named[min(outside)][0],
            expected=f"ids below {size}",
            found=f"{len(outside)} tokens from id {min(outside)} on",
            hint="use the tokenizer of this model, or remove these tokens from its files",
        )
    entries = [named.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [token for token, _ in entries], [kind for _, kind in entries]


def _ends(checkpoint: Checkpoint, types: list[int]) -> tuple[int, int, bool]:
    """The ids that end and begin a text, and whether the model has none: llama.cpp would take 11 for both."""
    special, size = checkpoint.special_ids, checkpoint.config.vocab_size
    stops = special.stops(size)
    begins = [special.bos] if special.bos is not None and 0 <= special.bos < size else []
    unused = [number for number, kind in enumerate(types) if kind == UNUSED]
    end = (*stops, *begins, *unused[-1:], size - 1)[0]
    return end, (*begins, end)[0], not (stops or begins)
