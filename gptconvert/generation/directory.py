"""The documents that ``generate`` reads from an export's directory, all untrusted, and what they must state.

The artifact has checks of its own: :mod:`gptconvert.targets.interface`, and those of each runtime before it loads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptconvert.containers.json import read_json_object
from gptconvert.containers.untrusted import hub_homes, links_out, no_such_path, read_small
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError
from gptconvert.generation.sampling import stated
from gptconvert.model.generation import GENERATION_CONFIG, SpecialIds, special_ids
from gptconvert.targets.context import context_length, vocabulary_size
from gptconvert.targets.package.tokenizer_kinds import MAX_BYTES

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WROTE = "pass the directory that gptconvert wrote"


@dataclass(frozen=True)
class Document:
    """A file that is read whole.

    Attributes:
        most: largest size in bytes.
        missing: what its absence means, and a hint; None if it may be absent.
    """

    most: int
    missing: tuple[str, str] | None = None


#: File → its limits.
DOCUMENTS: Mapping[str, Document] = {
    CONFIG: Document(16 << 20, ("no config.json", WROTE)),
    GENERATION_CONFIG: Document(16 << 20),
    TOKENIZER: Document(
        MAX_BYTES,
        (
            "no tokenizer.json, so text cannot be tokenized",
            "the checkpoint had no tokenizer that tokenizer.json can express; put one there if you have it",
        ),
    ),
}


@dataclass(frozen=True)
class Exported:
    """An export's documents.

    Attributes:
        directory: holds them.
        config: config.json.
        special: ids of generation_config.json, else of config.json.
        defaults: settings of generation_config.json.
        tokenizer: tokenizer.json, not parsed.
        n_ctx: context length.
        vocab_size: number of ids; None if config.json does not state it.
    """

    directory: str
    config: Mapping[str, object]
    special: SpecialIds
    defaults: Mapping[str, Any]
    tokenizer: bytes
    n_ctx: int
    vocab_size: int | None

    def path(self, name: str) -> str:
        """Path of one of its files."""
        return os.path.join(self.directory, name)


def read_exported(directory: str) -> Exported:
    """Read the documents of an export.

    Raises:
        InputError: no such directory; a document is missing or damaged, or states impossible sizes or ids.
        UnsafeInputError: a document is not a regular file, or links out of the directory.
    """
    if not os.path.lexists(directory):
        raise no_such_path(directory, hub=False)
    if not os.path.isdir(directory):
        raise InputError("not a directory", path=directory, hint=WROTE)
    present = {name: os.path.join(directory, name) for name in DOCUMENTS if _is_present(directory, name)}
    config = _json(present, CONFIG)
    files: list[tuple[Mapping[str, object], str | None]] = [(config, present[CONFIG])]
    defaults: Mapping[str, Any] = {}
    if GENERATION_CONFIG in present:
        generation = _json(present, GENERATION_CONFIG)
        files.insert(0, (generation, present[GENERATION_CONFIG]))
        defaults = stated(generation, present[GENERATION_CONFIG])
    try:
        n_ctx, vocab_size = context_length(config), vocabulary_size(config)
    except GptConvertError as error:
        error.path = error.path or present[CONFIG]
        raise
    tokenizer = read_small(present[TOKENIZER], DOCUMENTS[TOKENIZER].most, TOKENIZER)
    return Exported(directory, config, special_ids(*files), defaults, tokenizer, n_ctx, vocab_size)


def _is_present(directory: str, name: str) -> bool:
    """Whether a document exists. Raises if it must and does not, or if it is stored elsewhere."""
    path, document = os.path.join(directory, name), DOCUMENTS[name]
    if not os.path.lexists(path):
        if document.missing is not None:
            message, hint = document.missing
            raise InputError(message, path=directory, hint=hint)
        return False
    if links_out(path, hub_homes(directory)):
        raise UnsafeInputError("links out of the directory", path=path, found=os.path.realpath(path))
    return True


def _json(present: Mapping[str, str], name: str) -> dict[str, object]:
    return read_json_object(present[name], DOCUMENTS[name].most, name)
