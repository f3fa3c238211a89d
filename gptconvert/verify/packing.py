"""Many probes as one sequence: which token is which, and which sees which.

Padding is left out: by the contract nothing may depend on it. Tokens with one history (the same ids at the same
positions before them, and no past) are one token: the truth about them is one. Shapes: N tokens of all probes, n
and p tokens and past tokens of one part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.model.tensors import Array
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
        tokens: [n] their place in the packed sequence.
    """

    probe: Probe
    row: int
    new: Integers
    past: Integers
    tokens: Integers

    def beginning(self, count: int) -> Row:
        """The row without its tokens from index ``count`` on."""
        new = self.new[self.new < count]
        return dataclasses.replace(self, probe=self.probe.beginning(count), new=new, tokens=self.tokens[: len(new)])


@dataclass(frozen=True, eq=False)
class Part:
    """Rows whose tokens attend together, each to its own row's keys.

    Attributes:
        rows: which.
        tokens: [n] their tokens, of all.
    """

    rows: tuple[Row, ...]
    tokens: Integers

    @property
    def past_length(self) -> int:
        """p."""
        return sum(len(row.past) for row in self.rows)

    @property
    def same_past_everywhere(self) -> bool:
        """Whether all layers have one past."""
        return all(row.probe.shared_past for row in self.rows)

    def seen(self, window: int | None) -> Tensor:
        """Which key each token sees: bool [1, 1, n, p + n]."""
        import torch

        from reference_model.model import visible

        n, p, before = len(self.tokens), self.past_length, 0
        seen = torch.zeros(n, p + n, dtype=torch.bool)
        for row in self.rows:
            probe = row.probe
            mask = torch.from_numpy(probe.attention_mask[row.row : row.row + 1])  # (1, T)
            own = visible(mask, probe.input_ids.shape[1], window)[0, 0][row.new]  # (own n, T)
            here = torch.from_numpy(np.searchsorted(self.tokens, row.tokens))  # (own n)
            seen[here, before : before + len(row.past)] = own[:, row.past]
            seen[here[:, None], p + here] = own[:, probe.past_length + row.new]
            before += len(row.past)
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

    Args:
        probes: which.
        windowed: whether a layer sees by distance, so that holes are part of a token's history.

    Attributes:
        rows: of all probes.
        parts: the rows in as few parts as make sense: a token whose past is long is a part of its own, so that not
            every other token's scores have a column for it.
        length: N.
        ids, positions: [N].
    """

    def __init__(self, probes: Sequence[Probe], *, windowed: bool = False) -> None:
        histories: dict[tuple[object, ...], int] = {}
        ids: list[int] = []
        positions: list[int] = []
        self.rows: list[Row] = []
        for probe in probes:
            for row, mask in enumerate(probe.attention_mask):
                new, past = np.flatnonzero(mask[probe.past_length :]), np.flatnonzero(mask[: probe.past_length])
                parent: object = (probe, row) if len(past) else None
                tokens, steps = [], np.diff(new, prepend=new[:1])
                for index, step in zip(new.tolist(), steps.tolist(), strict=True):
                    token, position = int(probe.input_ids[row, index]), int(probe.position_ids[row, index])
                    history = (parent, token, position, step if windowed else 0)
                    parent = histories.setdefault(history, len(ids))
                    if parent == len(ids):
                        ids.append(token)
                        positions.append(position)
                    tokens.append(parent)
                self.rows.append(Row(probe, row, new, past, np.array(tokens, np.int64)))
        self.length = len(ids)
        self.ids, self.positions = np.array(ids), np.array(positions)  # (N) each
        self.parts = list(_parts(self.rows))


def _parts(rows: Sequence[Row]) -> Iterator[Part]:
    members: dict[Probe | None, list[Row]] = {}
    for row in rows:
        members.setdefault(row.probe if len(row.past) > LONG_PAST else None, []).append(row)
    for group in members.values():
        yield Part(tuple(group), np.unique(np.concatenate([row.tokens for row in group])))
