"""A checkpoint understood: configuration, canonical lazy weights, tokenizer files and provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.model.tensors import LazyTensor
from reference_model.config import GPTConfig


@dataclass(frozen=True)
class Checkpoint:
    """What the targets and the verifier work from. Nothing of it has been read but headers.

    Attributes:
        config: the architecture.
        weights: canonical name → lazy tensor; names are the reference model's.
        source: where it came from, in its own names; every tensor whole.
        prefix: what stood before the tensor names in the file.
        dropped: file name → why it carries nothing.
        carried: harmless keys of the source's config.json, written to the output's.
        notes: decisions the user should know (one sentence each).
        options: what the user chose when opening it.
    """

    config: GPTConfig
    weights: Mapping[str, LazyTensor]
    source: Source
    prefix: str = ""
    dropped: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(weight.nbytes for weight in self.weights.values())
