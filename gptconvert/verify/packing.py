"""Many probes packed into one sequence, with the mask of which token sees which.

Padding is dropped: by contract, nothing may depend on it. Tokens with the same history (the same ids at the same
positions before them, and no past) are packed once, since their outputs are the same. Shapes: N tokens of all probes;
n tokens and p past tokens of one part.
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


#: A past with more tokens than this is long.
LONG_PAST = 64


@dataclass(frozen=True, eq=False)
class Row:
    """One row of one probe, and where its tokens are in the packed sequence.

    Attributes:
        probe: the probe.
        row: index in its batch.
        new: [n] indices of the real tokens among the S new ones.
        past: [p] indices of the real tokens among the P past ones.
        tokens: [n] indices of the new tokens in the packed sequence.
    """

    probe: Probe
    row: int
    new: Integers
    past: Integers
    tokens: Integers

    def beginning(self, count: int) -> Row:
        """The row cut to the tokens before index ``count``."""
        new = self.new[self.new < count]
        return dataclasses.replace(self, probe=self.probe.beginning(count), new=new, tokens=self.tokens[: len(new)])


@dataclass(frozen=True, eq=False)
class Part:
    """Rows whose attention is computed at once, each token seeing only its own row's keys.

    Attributes:
        rows: the rows.
        tokens: [n] sorted indices of their tokens in the packed sequence.
    """

    rows: tuple[Row, ...]
    tokens: Integers

    @property
    def past_length(self) -> int:
        """Past tokens of all rows, p."""
        return sum(len(row.past) for row in self.rows)

    @property
    def same_past_everywhere(self) -> bool:
        """Whether all layers have the same past."""
        return all(row.probe.shared_past for row in self.rows)

    def seen(self, window: int | None) -> Tensor:
        """Which keys each token sees: bool [1, 1, n, p + n]."""
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
        """Keys and values of the rows' pasts, [1, H, p, hd] each; None if p = 0."""
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
        probes: the probes to pack.
        windowed: whether a layer sees by distance, which makes holes part of a token's history.

    Attributes:
        rows: of all probes.
        parts: the rows in few parts. A probe with a long past is a part of its own, so that other tokens' scores have
            no columns for that past.
        length: N.
        ids: [N].
        positions: [N].
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
