"""Tokens are packed once if and only if they have the same history."""

from __future__ import annotations

import numpy as np

from gptconvert.verify.packing import Pack
from gptconvert.verify.probes import Probe, default_positions


def probe(ids: list[list[int]], mask: list[str], past: int = 0) -> Probe:
    attention_mask = np.array([[int(c) for c in row] for row in mask], np.int64)
    tokens = np.array(ids, np.int64)
    return Probe(
        tuple("g" for _ in ids),
        tokens,
        attention_mask,
        default_positions("text-generation", attention_mask, tokens.shape[1]),
        past_length=past,
    )


def places(pack: Pack) -> list[list[int]]:
    return [row.tokens.tolist() for row in pack.rows]


def test_common_prefix_is_shared_at_any_offset() -> None:
    batch = probe([[5, 6, 7, 9], [1, 1, 5, 6], [5, 1, 6, 8]], ["1111", "0011", "1011"])
    pack = Pack([probe([[5, 6]], ["11"]), batch])
    assert places(pack) == [[0, 1], [0, 1, 2, 3], [0, 1], [0, 1, 4]]
    assert (pack.length, pack.ids.tolist(), pack.positions.tolist()) == (5, [5, 6, 7, 9, 8], [0, 1, 2, 3, 2])


def test_holes_are_history_if_a_layer_has_a_window() -> None:
    batch = probe([[5, 6, 7], [5, 1, 6], [1, 5, 6]], ["111", "101", "011"])
    assert places(Pack([batch], windowed=True)) == [[0, 1, 2], [0, 3], [0, 1]]


def test_same_id_at_another_position_or_after_another_id_is_another_token() -> None:
    first, second = probe([[5, 6]], ["11"]), probe([[6, 6]], ["11"])
    second.position_ids[0] = [1, 2]
    assert places(Pack([first, second])) == [[0, 1], [2, 3]]


def test_rows_with_a_past_share_nothing() -> None:
    batch = probe([[5], [5]], ["111", "111"], past=2)
    assert places(Pack([probe([[5]], ["1"]), batch])) == [[0], [1], [2]]


def test_each_token_sees_its_own_history_and_past() -> None:
    batch = probe([[5, 6], [5, 8]], ["1111", "0111"], past=2)
    pack = Pack([probe([[5, 6]], ["11"]), probe([[5, 7]], ["11"]), batch])
    (part,) = pack.parts
    assert places(pack) == [[0, 1], [0, 2], [3, 4], [5, 6]]
    seen = part.seen(None)[0, 0].int().tolist()  # pasts of 2 and 1, then 7 tokens
    assert seen == [
        [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 0, 0, 0, 1, 1],
    ]
