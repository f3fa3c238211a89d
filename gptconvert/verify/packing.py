"""Many probes as one sequence: which token is which, and which sees which.

Padding is left out: by the contract nothing may depend on it. Shapes: N tokens of all probes, n and p tokens and
past tokens of one part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.tensors import Array
from gptconvert.verify.probes import Integers, Probe
from reference_model.config import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor

    from reference_model.model import KeyValue


#: A past of more tokens is long.
LONG_PAST = 64


@dataclass(frozen=True, eq=False)
class Row:
    """One row of one probe and where its tokens lie in the packed sequence.

    Attributes:
        probe, row: which.
        new: [n] indices, among the S new tokens, of the real ones.
        past: [p] indices, among the P past tokens, of the real ones.
        tokens: their place in the packed sequence.
        past_tokens: the past ones' place among all past tokens.
    """

    probe: Probe
    row: int
    new: Integers
    past: Integers
    tokens: slice
    past_tokens: slice

    def beginning(self, count: int) -> Row:
        """The row without its tokens from index ``count`` on."""
        new = self.new[self.new < count]
        tokens = slice(self.tokens.start, self.tokens.start + len(new))
        return dataclasses.replace(self, probe=self.probe.beginning(count), new=new, tokens=tokens)


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive rows whose tokens attend together, each to its own row's keys.

    Attributes:
        rows: which.
        tokens: their tokens, of all.
    """

    rows: tuple[Row, ...]
    tokens: slice

    @property
    def past_start(self) -> int:
        """Where the first row's past begins, among all past tokens."""
        return int(self.rows[0].past_tokens.start)

    @property
    def past_length(self) -> int:
        """p."""
        return int(self.rows[-1].past_tokens.stop) - self.past_start

    def seen(self, window: int | None) -> Tensor:
        """Which key each token sees: bool [1, 1, n, p + n]."""
        import torch

        from reference_model.model import visible

        n, p = self.tokens.stop - self.tokens.start, self.past_length
        seen = torch.zeros(n, p + n, dtype=torch.bool)
        for row in self.rows:
            probe = row.probe
            mask = torch.from_numpy(probe.attention_mask[row.row : row.row + 1])  # (1, T)
            own = visible(mask, probe.input_ids.shape[1], window)[0, 0][row.new]  # (own n, T)
            tokens = seen[row.tokens.start - self.tokens.start : row.tokens.stop - self.tokens.start]
            before = slice(row.past_tokens.start - self.past_start, row.past_tokens.stop - self.past_start)
            after = slice(p + row.tokens.start - self.tokens.start, p + row.tokens.stop - self.tokens.start)
            tokens[:, before], tokens[:, after] = own[:, row.past], own[:, probe.past_length + row.new]
        return seen[None, None]

    def past(self, layer: int, config: GPTConfig) -> KeyValue | None:
        """Keys and values of its pasts, [1, H, p, hd] each."""
        import torch

        if not self.past_length:
            return None
        pieces: list[list[Tensor]] = [[], []]
        made: dict[Probe, tuple[Array, Array]] = {}
        for row in (row for row in self.rows if len(row.past)):
            if row.probe not in made:
                made[row.probe] = row.probe.past(layer, config)
            for piece, array in zip(pieces, made[row.probe], strict=True):
                piece.append(torch.from_numpy(array[row.row][:, row.past]))  # (H, own p, hd)
        return torch.cat(pieces[0], 1)[None], torch.cat(pieces[1], 1)[None]  # (1, H, p, hd) each


class Pack:
    """The real tokens of several probes as one sequence.

    Attributes:
        rows: of all probes.
        parts: the rows in as few parts as make sense: a token whose past is long is a part of its own, so that not
            every other token's scores have a column for it.
        length: N.
        ids, positions: [N].
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.rows: list[Row] = []
        n = p = 0
        for probe in probes:
            for row, mask in enumerate(probe.attention_mask):
                new, past = np.flatnonzero(mask[probe.past_length :]), np.flatnonzero(mask[: probe.past_length])
                place = slice(n, n + len(new)), slice(p, p + len(past))
                self.rows.append(Row(probe, row, new, past, *place))
                n, p = n + len(new), p + len(past)
        self.length = n
        self.ids = np.concatenate([r.probe.input_ids[r.row, r.new] for r in self.rows])  # (N)
        self.positions = np.concatenate([r.probe.position_ids[r.row, r.new] for r in self.rows])  # (N)
        self.parts = list(_parts(self.rows))


def _parts(rows: Sequence[Row]) -> Iterator[Part]:
    for _, group in groupby(rows, lambda row: row.probe if len(row.past) > LONG_PAST else None):
        members = tuple(group)
        yield Part(members, slice(members[0].tokens.start, members[-1].tokens.stop))
