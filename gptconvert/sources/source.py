"""What every source hands on: tensors by their file names, the raw configuration, and where it all came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gptconvert.errors import UsageError
from gptconvert.tensors import TensorSet


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, still in its own names and layout.

    Attributes:
        scheme: naming scheme of the tensors (``openai-tf``, ``hf`` …), the key into the families' tables.
        format: file format in words, for people (``TensorFlow checkpoint V2``).
        path: what the user named, resolved to a file, prefix or directory.
        tensors: lazy tensors by file name.
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


@dataclass(frozen=True)
class OpenOptions:
    """How to open a source; every field has its command-line option.

    Attributes:
        step: training step, where a directory holds several checkpoints.
        hparams: a configuration file to use instead of the one beside the weights.
        weights_file: which weights file to read, where a directory holds several.
        revision: hub branch, tag or commit.
        cache_dir: hub cache; None: the hub library's own.
        offline: never ask the network.
    """

    step: int | None = None
    hparams: str | None = None
    weights_file: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    offline: bool = False


def refuse_options(options: OpenOptions, title: str, *names: str) -> None:
    """Refuse options that mean nothing for a format, so that none is ignored.

    Raises:
        UsageError: one of ``names`` is set.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if given:
        raise UsageError(f"{', '.join(given)} means nothing for {title} files")


@dataclass(frozen=True)
class Format:
    """One checkpoint format.

    Attributes:
        name: the naming scheme and, where it has one, the command (``openai-tf``, ``hf``).
        title: for people.
        recognises: whether this local path looks like the format, judged cheaply (names, magic bytes).
        open: headers read, :class:`Source` returned.
    """

    name: str
    title: str
    recognises: Callable[[str], bool]
    open: Callable[[str, OpenOptions], Source]
