"""The interface of a target: one output format, as the rest of the program uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Export
from gptconvert.model.options import Level, Options
from gptconvert.model.progress import Stage
from gptconvert.verify.report import ArtifactReport

if TYPE_CHECKING:
    from gptconvert.verify.evaluation import Evaluation
    from gptconvert.verify.greedy import Continuation
    from gptconvert.verify.outputs import Group


@dataclass(frozen=True)
class Candidate:
    """An artifact on disk, and the checkpoint to compare it with.

    Attributes:
        target: name of its target.
        path: of the artifact: a graph file, a directory, or the directory of the weights files.
        shown_as: path in reports, relative to the path being verified.
        checkpoint: the original; with its weights as stored, if ``export`` is given.
        export: its plan; None for an artifact of unknown origin.
        seed: of the probes.
        evaluation: what lossy artifacts are measured on; None to measure nothing.
    """

    target: str
    path: str
    shown_as: str
    checkpoint: Checkpoint
    export: Export | None = None
    seed: int = 0
    evaluation: Evaluation | None = None


class Runtime(Protocol):
    """A loaded model that keeps its own keys and values, for a batch of rows of equal length.

    Attributes:
        n_ctx: context length.
        vocab_size: number of ids; None if the artifact does not state it.
    """

    n_ctx: int
    vocab_size: int | None

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> NDArray[np.float32]:
        """Logits [B, V] after new ids.

        Args:
            rows: new ids of each row, equally many.
            parents: for each row, the row of the step before that it continues; of the first step, any.
        """
        ...

    def reset(self, most: int | None = None) -> None:
        """Forget the ids of earlier steps.

        Args:
            most: how many of the largest logits the next steps must return; others may be −∞. None for all.
        """
        ...

    def close(self) -> None:
        """Release its resources."""
        ...


Verifier = Callable[[Candidate, Level, Stage], ArtifactReport]


@dataclass(frozen=True)
class CardFacts:
    """Facts for the model card.

    Attributes:
        checkpoint: as exported.
        exports: the exports.
        options: the user's options.
        files: path → size in bytes, of the other files in the directory.
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
        """Whether a tokenizer is included."""
        return "tokenizer.json" in self.files

    def of(self, target: str) -> Export | None:
        """The first export of a target; None if it has none."""
        return next(iter(self.all_of(target)), None)

    def all_of(self, target: str) -> list[Export]:
        """The exports of a target, in order."""
        return [export for export in self.exports if export.target == target]


@dataclass(frozen=True)
class Snippet:
    """Code that loads the artifact with one library.

    Attributes:
        title: name of the library.
        language: of the code block.
        code: returns the code for given facts; None if the library cannot load the artifact.
        remark: returns what else to know, in lower case; None if nothing. It may stand without code.
        where: where the code expects the directory, if not at the current one.
    """

    title: str
    language: str
    code: Callable[[CardFacts], str | None]
    remark: Callable[[CardFacts], str | None] = lambda _: None
    where: str | None = None


@dataclass(frozen=True)
class Target:
    """One output format.

    Attributes:
        name: as in ``--to``.
        title: in lists of formats.
        plan: returns its exports of a checkpoint, without reading weights.
        verify: compares an artifact with its checkpoint, from the bytes on disk.
        short_title: in the model card, if not ``title``.
        runs: whether ``verify`` runs the artifact; if not, it only compares bytes.
        load: loads the artifact in a directory, with its config.json, as a :class:`Runtime`; None if nothing can.
        check_continuation: checks another artifact's greedy text against a verified artifact of this target.
        snippets: for the model card.
        graphs: returns the model card's rows on artifacts of several variants, from the facts and the verification
            report: (path, bytes, use, proof) of each; none if there is one artifact that needs no explanation.
        library: the hub's name of the library that loads it.
        requires: (module, extra) pairs that must be installed.
        families: names of the families it can express; empty for all.
        refused: family that it cannot express → why, for those that need a reason.
        libraries: distributions whose versions may affect the bytes.
        loses_less: options to try if an artifact misses ``--max-kl``; empty if none has a limit.

    Raises:
        TypeError: ``verify`` is not callable.
    """

    name: str
    title: str
    plan: Callable[[Checkpoint, Options], tuple[Export, ...]]
    verify: Verifier
    short_title: str | None = None
    runs: bool = True
    load: Callable[[str, Mapping[str, object]], Runtime] | None = None
    check_continuation: Callable[[Continuation, Candidate, Sequence[Group]], Group] | None = None
    snippets: tuple[Snippet, ...] = ()
    graphs: Callable[[CardFacts, Mapping[str, Any]], Sequence[tuple[str, int, str, str]]] = lambda *_: ()
    library: str | None = None
    requires: tuple[tuple[str, str], ...] = ()
    families: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    loses_less: str = ""

    def __post_init__(self) -> None:
        if not callable(self.verify):
            raise TypeError(f"target {self.name!r} has no verifier, so its exports could not be published")
