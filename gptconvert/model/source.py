"""The result of opening any source: tensors under their original names, the raw configuration, and provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gptconvert.model.lora import Adapter
from gptconvert.model.tensors import LazyTensor, Segment, TensorSet


@dataclass(frozen=True)
class Run:
    """The elements of a file that does not record tensor boundaries.

    Attributes:
        segment: the byte range of the elements.
        dtype: of every element.
        sizes: sizes given by the header but not by the configuration, by their symbols in shapes.
    """

    segment: Segment
    dtype: np.dtype[np.generic]
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One entry of the source directory and what becomes of it.

    Attributes:
        name: its name; that of a directory ends with ``/``.
        outcome: ``read``, ``carried`` (copied byte for byte), ``not needed`` or ``left behind``.
        reason: what it is.
    """

    name: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class StoredTokenizer:
    """A byte-level BPE tokenizer in the weights file itself.

    Attributes:
        vocabulary: token, in the byte alphabet unless it is special or added → id.
        merges: pairs of symbols, best first; as the file has them, not checked.
        special: special tokens.
        added: other tokens that are found in text before it is split.
        settings: as in tokenizer_config.json.
    """

    vocabulary: Mapping[str, int]
    merges: tuple[tuple[str, ...], ...]
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, still in its own names and layout.

    Attributes:
        scheme: naming scheme of the tensors (``openai-tf``, ``hf`` …), the key into the families' tables.
        format: display name of the file format (``TensorFlow checkpoint V2``).
        path: the path given by the user, resolved to a file, prefix or directory.
        tensors: lazy tensors by their names in the file; :class:`~gptconvert.model.shards.Parts` for sharded tensors,
            until the family's name table merges them.
        unnamed: arrays of files without tensor names, in file order, until the name table names them.
        run: elements of a file without tensor boundaries, until the name table cuts them.
        config: the parsed configuration file, or empty.
        config_path: path of that file, or None.
        tokenizer: original file name (``encoder.json``, ``merges.txt`` …) → path.
        stored_tokenizer: the one in the weights file, if it has one.
        revision: hub commit, if the source came from a hub.
        repo: hub repository, if the source came from a hub.
        notes: what the user should know, one sentence each.
        directory: the directory given by the user, if any; the output must be outside it.
        adapter: the LoRA adapter to merge, if one was given.
        folder: the directory that holds the checkpoint's files, if they have one to themselves.
        listing: names in the hub repository; None for local files, whose ``folder`` lists them.
        inventory: what becomes of every entry of ``folder`` or ``listing``.
        documents: licence files, and the model card: file name → path.
        card: name, licence, languages, tags and the like from the model card's front matter.
    """

    scheme: str
    format: str
    path: str
    tensors: TensorSet
    unnamed: tuple[LazyTensor, ...] = ()
    run: Run | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    config_path: str | None = None
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    stored_tokenizer: StoredTokenizer | None = None
    revision: str | None = None
    repo: str | None = None
    notes: tuple[str, ...] = ()
    directory: str | None = None
    adapter: Adapter | None = None
    folder: str | None = None
    listing: tuple[str, ...] | None = None
    inventory: tuple[Entry, ...] = ()
    documents: Mapping[str, str] = field(default_factory=dict)
    card: Mapping[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Source {self.path!r}: {self.format}, {len(self.tensors)} tensors>"

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that has been or will be read, once each."""
        config = () if self.config_path is None else (self.config_path,)
        adapter = () if self.adapter is None else self.adapter.files
        # Training scripts store the configuration in the weights file, which must be listed only once.
        beside = (*self.tokenizer.values(), *self.documents.values())
        return tuple(dict.fromkeys((*self.tensors.files, *config, *adapter, *beside)))
