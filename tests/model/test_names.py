"""Names with layer numbers folded, as shown in error messages, the manifest and ``inspect``."""

from __future__ import annotations

from gptconvert.model.names import collapse, grouped


def test_runs_of_layers_are_folded() -> None:
    names = [*(f"h.{i}.w" for i in (10, 0, 1, 2, 5)), "wte", "h.3.b"]
    assert collapse(names) == ["h.{0-2,5,10}.w", "wte", "h.3.b"]


def test_groups_keep_their_names_in_order() -> None:
    names = ["model/h1/w", "model/h0/w", "model/wpe", "shard/layer_0/linear_1/w", "shard/layer_1/linear_1/w"]
    assert grouped(names, to="..") == {
        "model/h{0..1}/w": names[:2],
        "model/wpe": names[2:3],
        "shard/layer_{0..1}/linear_1/w": names[3:],
    }


def test_layers_in_several_places_are_folded() -> None:
    names = [f"h.{i}.ln.weight" for i in (0, 1, 2, 5)] + ["wte.weight", "model/h7/w"]
    assert collapse(names) == ["h.{0-2,5}.ln.weight", "wte.weight", "model/h7/w"]
