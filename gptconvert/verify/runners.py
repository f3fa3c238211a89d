"""The protocol that runs a candidate, and the reference model as a candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gptconvert.model.tensors import Array
from gptconvert.verify.probes import Integers
from reference_model.config import GPTConfig

Cache = Sequence[tuple[Array, Array]]


class RunError(Exception):
    """The runtime failed on a probe; the message is one line."""


@dataclass(frozen=True, eq=False)
class Feeds:
    """Input arrays: input_ids [B, S], attention_mask [B, T], position_ids [B, S], per layer past [B, H, P, hd].

    For multiple-choice, B counts the choices of one question, and mc_token_ids [B] is the token that scores each.
    """

    input_ids: Integers
    attention_mask: Integers
    position_ids: Integers
    past: Cache = ()
    mc_token_ids: Integers | None = None


@dataclass(frozen=True, eq=False)
class Outputs:
    """Output arrays: the task's by name and, if requested, per layer present [B, H, T, hd] and taps by name."""

    named: Mapping[str, Array]
    presents: Cache = ()
    taps: Mapping[str, Array] = field(default_factory=dict)


class Runner(Protocol):
    """A candidate.

    Attributes:
        kv_cache: whether it takes and returns keys and values.
        free_positions: whether the caller chooses positions.
        compute: its computing type, by the name that torch and numpy use.
    """

    kv_cache: bool
    free_positions: bool
    compute: str

    def run(self, feeds: Feeds, presents: bool) -> Outputs:
        """Run once.

        Raises:
            RunError: the runtime failed.
        """


def one_line(error: Exception) -> str:
    """A runtime's message on one line, cut to fit a report."""
    return " ".join(str(error).split())[:400]


class TorchRunner:
    """The reference model as a candidate, which every verifier must pass.

    Args:
        config: the architecture to run (tests pass wrong ones).
        weights: canonical name → torch tensor.
    """

    kv_cache, free_positions, compute = True, True, "float32"

    def __init__(self, config: GPTConfig, weights: Mapping[str, Any]) -> None:
        from reference_model.model import GPT

        self.model = GPT.from_weights(config, weights)

    def run(self, feeds: Feeds, presents: bool) -> Outputs:
        """See :class:`Runner`."""
        import torch

        axis = (None,) if self.model.config.task == "multiple-choice" else ()  # one question, B choices
        arrays = (feeds.input_ids, feeds.attention_mask, feeds.position_ids)
        ids, mask, positions = (torch.from_numpy(array[axis]) for array in arrays)
        chosen = None if feeds.mc_token_ids is None else torch.from_numpy(feeds.mc_token_ids[axis])
        past = [(torch.from_numpy(k), torch.from_numpy(v)) for k, v in feeds.past]
        try:
            with torch.no_grad():
                named, cache = self.model.outputs(ids, mask, positions, past or None, chosen)
        except (RuntimeError, IndexError) as error:
            raise RunError(one_line(error)) from error
        pairs = tuple((k.numpy(), v.numpy()) for k, v in cache) if presents else ()
        return Outputs({name: value.numpy() for name, value in named.items()}, pairs)


def available_memory() -> int:
    """Bytes available without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30  # not Linux: assume a small machine
