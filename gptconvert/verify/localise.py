"""Which kind of input an error depends on, from the groups that failed.

This is all that can be said of a graph that returns only its result, without any block's output or cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gptconvert.verify.metrics import Measure
from gptconvert.verify.outputs import Group

#: Kind of sequence → where an error begins that affects no simpler kind; the simplest kind first.
KINDS: Mapping[str, str] = {
    "plain": "",
    "padded behind": "the attention mask: only sequences with padding fail",
    "padded before": "the positions or the attention mask: only sequences with padding or holes before a token fail",
    "continued": "the cache: only sequences with a past fail",
}


class Location(NamedTuple):
    """Where an error begins.

    Attributes:
        place: as text.
        blocks: the outputs of the embedding and of every block, on the probe that was used; empty if unknown.
    """

    place: str
    blocks: tuple[Measure, ...] = ()


def from_groups(groups: Sequence[Group]) -> str | None:
    """Where an error begins that depends on padding or a past, as text; None if unpadded prompts fail too."""
    failing = {kind_of(group) for group in groups if not group.ok}
    passing = {kind_of(group) for group in groups if group.ok}
    first = next((kind for kind in KINDS if kind in failing), "plain")
    if first == "plain" or "plain" not in passing:
        return None
    return KINDS[first]


def kind_of(group: Group) -> str:
    """The simplest of :data:`KINDS` that the group's sequences are; chunks are continued."""
    found = set()
    for probe in group.probes:
        for name, mask in zip(probe.groups, probe.attention_mask, strict=True):
            if name == group.name:
                ends = np.flatnonzero(mask)[-1] + 1
                padded = (
                    "padded before" if not mask[:ends].all() else "padded behind" if ends < len(mask) else "plain"
                )
                found.add("continued" if probe.past_length else padded)
    return next((kind for kind in KINDS if kind in found), "continued")
