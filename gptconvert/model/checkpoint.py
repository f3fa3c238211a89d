"""A checkpoint in canonical form: configuration, lazy weights, tokenizer files and provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gptconvert.model.generation import SpecialIds
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.model.tensors import LazyTensor
from reference_model.config import GPTConfig


@dataclass(frozen=True)
class Checkpoint:
    """The input of targets and verification. Only headers have been read.

    Attributes:
        config: the architecture.
        weights: canonical name → lazy tensor; names are the reference model's.
        source: the source, under its original names and with every tensor whole.
        prefix: prefix of the tensor names in the file.
        dropped: tensor name in the file → why it is not needed.
        carried: harmless keys and special ids of the source's config.json, copied to the exported one.
        generation: generation_config.json: the source's, or else the settings of its config.json.
        special_ids: the ids that generation uses.
        notes: decisions that the user should know, one sentence each.
        options: the options it was opened with.
    """

    config: GPTConfig
    weights: Mapping[str, LazyTensor]
    source: Source
    prefix: str = ""
    dropped: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, object] = field(default_factory=dict)
    generation: Mapping[str, object] = field(default_factory=dict)
    special_ids: SpecialIds = field(default_factory=SpecialIds)
    notes: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.source.path!r}: {self.config.family}, {len(self.weights)} weights>"

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(weight.nbytes for weight in self.weights.values())
