"""What every source hands on: tensors by their file names, the raw configuration, and where it all came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gptconvert.model.tensors import LazyTensor, Segment, TensorSet


@dataclass(frozen=True)
class Run:
    """The elements of a file that does not say where one tensor ends and the next begins.

    Attributes:
        segment: their bytes.
        dtype: of every element.
        sizes: sizes that the header gives beyond those of the configuration, by their symbols in shapes.
    """

    segment: Segment
    dtype: np.dtype[np.generic]
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, still in its own names and layout.

    Attributes:
        scheme: naming scheme of the tensors (``openai-tf``, ``hf`` …), the key into the families' tables.
        format: file format in words, for people (``TensorFlow checkpoint V2``).
        path: what the user named, resolved to a file, prefix or directory.
        tensors: lazy tensors by file name; :class:`~gptconvert.model.shards.Parts` where several shards hold them,
            until the family's name table joins them.
        unnamed: the arrays of files that do not name them, in their order, until the name table does.
        run: the elements of a file that does not separate its tensors, until the name table does.
        config: the parsed configuration file; empty if there is none.
        config_path: that file; None if there is none.
        tokenizer: file name as in its own world (``encoder.json``, ``merges.txt`` …) → path.
        revision: hub commit, if the source came from a hub.
        repo: hub repository, if the source came from a hub.
        notes: what the user should know (one sentence each).
        directory: the directory that was named, if it was one; no output may lie in it.
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
    revision: str | None = None
    repo: str | None = None
    notes: tuple[str, ...] = ()
    directory: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that was, or will be, read."""
        config = () if self.config_path is None else (self.config_path,)
        # A training script's own format keeps the configuration in the file of the weights.
        return tuple(dict.fromkeys((*self.tensors.files, *config, *self.tokenizer.values())))
