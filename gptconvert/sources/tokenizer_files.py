"""The tokenizer files next to a checkpoint: their names and the search for them."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence

from gptconvert.containers.untrusted import file_size
from gptconvert.model.generation import GENERATION_CONFIG

#: GPT-2's files: OpenAI's names first, then Hugging Face's names for the same files.
GPT2 = ("encoder.json", "vocab.bpe", "vocab.json", "merges.txt", "tokenizer.json")
#: OpenAI's names for GPT-1's files.
GPT1 = ("encoder_bpe_40000.json", "vocab_40000.bpe")
#: What transformers saves, including the generation settings.
HUGGING_FACE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION_CONFIG,
)
#: Largest tokenizer file, far above any real vocabulary.
MAX_BYTES = 256 << 20
CHAT_TEMPLATE = "chat_template.jinja"
#: Vocabularies of other tokenizers (WordPiece, SentencePiece and the like), which are copied unchanged.
FOREIGN = (
    "vocab.txt",
    "*spiece.model",
    "*spiece.vocab",
    "tokenizer.model",
    "tokenizer.vocab",
    "*spm*.model",
    "*.spm",
    "sentencepiece*.model",
    "*.bpe.model",
    "bpe.codes",
    "*.tiktoken",
    "tekken.json",
)


def is_foreign(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer other than GPT's BPE."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FOREIGN)


def is_copied(name: str) -> bool:
    """Whether a tokenizer file of this name is copied unchanged."""
    return name == CHAT_TEMPLATE or is_foreign(name)


def huggingface_names(names: Iterable[str]) -> list[str]:
    """The tokenizer files to interpret among ``names`` of a Hugging Face directory or repository.

    OpenAI's names are read only without transformers' own, which AutoTokenizer reads.
    """
    present = set(names)
    pairs = () if {"vocab.json", "tokenizer.json"} & present else (*GPT2[:2], *GPT1)
    return [name for name in (*HUGGING_FACE, *pairs) if name in present]


def find_tokenizer(folders: Sequence[str], names: Iterable[str] = GPT2) -> dict[str, str]:
    """Name → path of those of ``names`` that exist, each in the first folder that has it.

    Raises:
        UnsafeInputError: one is a named pipe or a device, which a later read must not block on.
        InputError: one is a dangling link or cannot be read.
    """
    found = {name: first_file(os.path.join(folder, name) for folder in folders) for name in names}
    return {name: path for name, path in found.items() if path is not None}


def first_file(paths: Iterable[str]) -> str | None:
    """The first of ``paths`` that exists and is not a directory. Raises as :func:`find_tokenizer`."""
    path = next((path for path in paths if os.path.lexists(path) and not os.path.isdir(path)), None)
    if path is not None:
        file_size(path)
    return path
