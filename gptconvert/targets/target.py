"""What a target is: everything the rest of the program needs to know of one output format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Export
from gptconvert.model.options import Level, Options
from gptconvert.model.progress import Stage
from gptconvert.verify.report import ArtifactReport

if TYPE_CHECKING:
    from gptconvert.verify.greedy import Continuation
    from gptconvert.verify.outputs import Group


@dataclass(frozen=True)
class Candidate:
    """An artifact on disk, and what it is held against.

    Attributes:
        target: that it is of.
        path: of the artifact: a graph file, a directory, or the directory of the weights files.
        shown_as: the path for reports, relative to what was asked for.
        checkpoint: the original; with its weights as stored, if ``export`` is there.
        export: what was planned; None: somebody else's artifact, of which nothing is known but its bytes.
    """

    target: str
    path: str
    shown_as: str
    checkpoint: Checkpoint
    export: Export | None = None


class Runtime(Protocol):
    """A loaded model that keeps its own keys and values."""

    n_ctx: int

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [V] after ``ids``, which continue the ids of earlier steps."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


Verifier = Callable[[Candidate, Level, Stage], ArtifactReport]


@dataclass(frozen=True)
class CardFacts:
    """What the model card is written from.

    Attributes:
        checkpoint: as exported.
        exports: what was exported.
        options: the user's choices.
        files: path → bytes, of the other files in the directory.
    """

    checkpoint: Checkpoint
    exports: tuple[Export, ...]
    options: Options
    files: Mapping[str, int]

    @property
    def generates(self) -> bool:
        """Whether the model continues text."""
        return self.checkpoint.config.task == "text-generation"

    @property
    def tokenized(self) -> bool:
        """Whether a tokenizer is there."""
        return "tokenizer.json" in self.files

    def of(self, target: str) -> Export | None:
        """The first export of a target."""
        return next((export for export in self.exports if export.target == target), None)


@dataclass(frozen=True)
class Snippet:
    """How one library loads the artifact.

    Attributes:
        title: of the library.
        language: of the code block.
        code: for these facts; None: this library cannot load it.
    """

    title: str
    language: str
    code: Callable[[CardFacts], str | None]


@dataclass(frozen=True)
class Target:
    """One output format.

    Attributes:
        name: as in ``--to``.
        title: in lists of formats.
        short_title: in the model card.
        plan: its exports of a checkpoint, before any weight is read.
        verify: holds an artifact against its checkpoint, from the bytes on disk.
        runs: whether ``verify`` runs the artifact; else it compares bytes alone.
        load: the artifact in a directory, with its config.json, as a :class:`Runtime`; None: nothing runs it.
        check_continuation: holds another artifact's greedy text against one of this target that has passed.
        snippets: of the model card.
        library: the hub's name of the library that loads it.
        requires: (module, extra) that must be installed.
        families: names of the families it can express; empty: all.
        libraries: installed distributions that have a hand in the bytes.

    Raises:
        TypeError: there is no verifier.
    """

    name: str
    title: str
    short_title: str
    plan: Callable[[Checkpoint, Options], tuple[Export, ...]]
    verify: Verifier
    runs: bool = True
    load: Callable[[str, Mapping[str, object]], Runtime] | None = None
    check_continuation: Callable[[Continuation, Candidate, Sequence[Group]], Group] | None = None
    snippets: tuple[Snippet, ...] = ()
    library: str | None = None
    requires: tuple[tuple[str, str], ...] = ()
    families: frozenset[str] = frozenset()
    libraries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.verify):
            raise TypeError(f"target {self.name!r} has no verifier: nothing it writes could be published")
