"""Many probes as one sequence: which token is which, and which sees which.

Padding is left out: by the contract nothing may depend on it. Shapes: N tokens and P past tokens of all probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.tensors import Array
from gptconvert.verify.probes import Integers, Probe
from reference_model.config import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor

    from reference_model.model import KeyValue


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


class Pack:
    """The real tokens of several probes as one sequence."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.rows: list[Row] = []
        n = p = 0
        for probe in probes:
            for row, mask in enumerate(probe.attention_mask):
                new, past = np.flatnonzero(mask[probe.past_length :]), np.flatnonzero(mask[: probe.past_length])
                place = slice(n, n + len(new)), slice(p, p + len(past))
                self.rows.append(Row(probe, row, new, past, *place))
                n, p = n + len(new), p + len(past)
        self.length, self.past_length = n, p
        self.ids = np.concatenate([r.probe.input_ids[r.row, r.new] for r in self.rows])  # (N)
        self.positions = np.concatenate([r.probe.position_ids[r.row, r.new] for r in self.rows])  # (N)

    def seen(self, window: int | None) -> Tensor:
        """Which key each token sees: bool [1, 1, N, P + N]."""
        import torch

        from reference_model.model import visible

        seen = torch.zeros(self.length, self.past_length + self.length, dtype=torch.bool)
        for row in self.rows:
            probe = row.probe
            mask = torch.from_numpy(probe.attention_mask[row.row : row.row + 1])  # (1, T)
            own = visible(mask, probe.input_ids.shape[1], window)[0, 0][row.new]  # (n, T)
            seen[row.tokens, row.past_tokens] = own[:, row.past]
            after = slice(self.past_length + row.tokens.start, self.past_length + row.tokens.stop)
            seen[row.tokens, after] = own[:, probe.past_length + row.new]
        return seen[None, None]

    def past(self, layer: int, config: GPTConfig) -> KeyValue | None:
        """Keys and values of all pasts, [1, H, P, hd] each."""
        import torch

        if not self.past_length:
            return None
        pieces: list[list[Tensor]] = [[], []]
        made: dict[int, tuple[Array, Array]] = {}
        for row in self.rows:
            if len(row.past):
                if id(row.probe) not in made:
                    made[id(row.probe)] = row.probe.past(layer, config)
                for piece, array in zip(pieces, made[id(row.probe)], strict=True):
                    piece.append(torch.from_numpy(array[row.row][:, row.past]))  # (H, p, hd)
        return torch.cat(pieces[0], 1)[None], torch.cat(pieces[1], 1)[None]  # (1, H, P, hd) each
