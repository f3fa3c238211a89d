"""Find a TensorFlow checkpoint and read its index; shared by OpenAI's and EleutherAI's formats."""

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
        index: the checkpoint's tensors and where they are stored.
        notes: choices made to find it.
    """

    index: Index
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The checkpoint's directory."""
        return os.path.dirname(self.index.prefix)


def find_checkpoint(path: str, options: Options) -> TfCheckpoint:
    """Find the checkpoint for ``path``: a prefix, a directory, a ``checkpoint`` file, an index or a data file.

    Raises:
        InputError: no checkpoint, an ambiguous one, or a damaged index.
        UnsupportedError: another kind of TensorFlow file.
        UnsafeInputError: a named pipe, device or socket.
        UsageError: the path and ``options.step`` name different steps.
    """
    found = locate(path, options.step)
    return TfCheckpoint(read_index(found.prefix), found.notes)


def locate_checkpoint(path: str, options: Options) -> TfCheckpoint | None:
    """As :func:`find_checkpoint` if the path looks like a TensorFlow checkpoint; None otherwise."""
    return find_checkpoint(path, options) if looks_like_checkpoint(path) else None
