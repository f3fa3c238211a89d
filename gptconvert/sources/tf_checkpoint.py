"""A TensorFlow checkpoint found and its index read: what OpenAI's and EleutherAI's formats have in common."""

from __future__ import annotations

import os
from dataclasses import dataclass

from gptconvert.containers.tf_index import Index, read_index
from gptconvert.model.options import Options
from gptconvert.sources.tf_locate import locate, looks_like_checkpoint


@dataclass(frozen=True)
class TfCheckpoint:
    """A checkpoint's index.

    Attributes:
        index: what the checkpoint holds.
        notes: what had to be decided to find it.
    """

    index: Index
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The directory of its files."""
        return os.path.dirname(self.index.prefix)


def find_checkpoint(path: str, options: Options) -> TfCheckpoint:
    """The checkpoint that ``path`` means: a prefix, a directory, a ``checkpoint`` file, an index or a data file.

    Raises:
        InputError: there is none, or it is not clear which, or its index is damaged.
        UnsupportedError: it is something else that TensorFlow writes.
        UnsafeInputError: a named pipe, device or socket.
        UsageError: the path and ``options.step`` name different steps.
    """
    found = locate(path, options.step)
    return TfCheckpoint(read_index(found.prefix), found.notes)


def locate_checkpoint(path: str, options: Options) -> TfCheckpoint | None:
    """The same for a path that is probably meant so; None for others. Raises as :func:`find_checkpoint`."""
    return find_checkpoint(path, options) if looks_like_checkpoint(path) else None
