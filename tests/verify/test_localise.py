"""Where an error begins in a graph that shows nothing but its result: judged by the kinds of probes that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptconvert.verify.localise import from_groups, kind_of
from gptconvert.verify.outputs import Group
from gptconvert.verify.probes import make_probes
from tests.verify.exports import edit, export, node, report_on, tiny
from tests.verify.test_good_exports import foreign
from tests.verify.test_planted_bugs import padding_ignored

UNTAPPED = "the graph names no block's output and returns no keys or values"


def own_positions(model: Any) -> None:
    """No input position_ids; positions count slots, as other exporters do."""
    node(model, "positions").input[1] = "bias.key"
    (given,) = (i for i, value in enumerate(model.graph.input) if value.name == "position_ids")
    del model.graph.input[given]


def final_norm_skipped(model: Any) -> None:
    """A wrong head, which affects every token."""
    node(model, "logits_2d").input[0] = "h.1"


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        (
            own_positions,
            "begins in the positions or the attention mask: only sequences with padding or holes before a token fail "
            "(the graph has no input position_ids); " + UNTAPPED,
        ),
        (
            padding_ignored,
            "begins in the positions or the attention mask: only sequences with padding or holes before a token "
            "fail; " + UNTAPPED,
        ),
        (final_norm_skipped, "begins in an unknown place; " + UNTAPPED),
    ],
)
def test_graph_that_shows_only_its_result(bug: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint, kv_cache=False)
    edit(path, bug)
    edit(path, foreign)
    report = report_on(checkpoint, path)
    assert not report.passed
    assert words in report.table()
    assert "the head" not in report.table()


def test_correct_cache_leaves_the_last_block_or_the_head(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    edit(path, final_norm_skipped)
    edit(path, foreign)
    assert "begins in the last block after its keys and values, or the head" in report_on(checkpoint, path).table()


def groups(tmp_path: Path, failing: set[str]) -> list[Group]:
    found: dict[str, Group] = {}
    for probe in make_probes(tiny(tmp_path).config, kv_cache=True):
        for name in probe.groups:
            found.setdefault(name, Group(name, problems=["wrong"] if name in failing else [])).probes.append(probe)
    return [*found.values(), Group("chunked prefill")]


def test_kinds(tmp_path: Path) -> None:
    assert {group.name: kind_of(group) for group in groups(tmp_path, set())} == {
        "length 1": "plain",
        "length 2": "plain",
        "length 7": "plain",
        "length 40": "plain",
        "no padding": "plain",
        "left padding": "padded before",
        "right padding": "padded behind",
        "holes": "padded before",
        "holes, left padding": "padded before",
        "one token": "padded before",
        "past 5": "continued",
        "past 5, left padding": "continued",
        "past 5, holes": "continued",
        "past 39": "continued",
        "chunked prefill": "continued",
    }


@pytest.mark.parametrize(
    ("failing", "place"),
    [
        (set(), None),
        ({"length 7", "left padding"}, None),
        ({"right padding", "left padding"}, "the attention mask"),
        ({"left padding", "past 5, left padding"}, "the positions or the attention mask"),
        ({"past 5", "past 39"}, "the cache"),
    ],
)
def test_place(failing: set[str], place: str | None, tmp_path: Path) -> None:
    found = from_groups(groups(tmp_path, failing))
    assert found is None if place is None else str(found).startswith(place)
