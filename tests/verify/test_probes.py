from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.model.options import Level
from gptconvert.verify.packing import Pack
from gptconvert.verify.probes import Integers, Probe, default_positions, make_probes, waves
from reference_model.config import TASKS, GPTConfig
from reference_model.model import default_positions as torch_positions
from tests.helpers import checkpoint_of, tiny_gpt2


def config_of(n_ctx: int = 40, vocabulary: int = 97, window: int | None = None) -> GPTConfig:
    return GPTConfig(
        family="gpt2",
        vocab_size=vocabulary,
        n_ctx=n_ctx,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=56,
        attn_scale=(0.5, 0.5),
        attn_window=(None, window),
    )


def all_groups(probes: tuple[Probe, ...]) -> set[str]:
    return {group for probe in probes for group in probe.groups}


@settings(max_examples=60, deadline=None)
@given(
    n_ctx=st.integers(1, 200),
    vocabulary=st.integers(1, 300),
    window=st.none() | st.integers(1, 100),
    kv_cache=st.booleans(),
    full=st.booleans(),
)
def test_probes_are_valid_input(n_ctx: int, vocabulary: int, window: int | None, kv_cache: bool, full: bool) -> None:
    probes = make_probes(config_of(n_ctx, vocabulary, window), kv_cache=kv_cache, level="full" if full else "default")
    assert probes
    for probe in probes:
        batch, new = probe.input_ids.shape
        assert len(probe.groups) == batch and probe.position_ids.shape == (batch, new)
        assert probe.attention_mask.shape == (batch, probe.past_length + new)
        assert probe.past_length + new <= n_ctx
        assert probe.input_ids.min() >= 0 and probe.input_ids.max() < vocabulary
        assert probe.position_ids.min() >= 0 and probe.position_ids.max() < n_ctx
        assert set(np.unique(probe.attention_mask)) <= {0, 1}
        assert probe.attention_mask[:, probe.past_length :].any(1).all()  # every row has a real token
        assert sum(probe.chunks) <= new and all(size > 0 for size in probe.chunks)
        assert kv_cache or not probe.past_length


def test_all_kinds_of_probes_are_made() -> None:
    probes = make_probes(config_of(1024, window=256), kv_cache=True)
    assert {"length 1", "length 2", "length 7", "length 64"} <= all_groups(probes)
    assert {"no padding", "left padding", "right padding", "holes", "one token"} <= all_groups(probes)
    assert {"past 5", "past 5, left padding", "past 5, holes", "past 1023"} <= all_groups(probes)
    assert "beyond window 256" in all_groups(probes)
    assert [probe.chunks for probe in probes if probe.chunks] == [(1, 1, 5)]  # the second has a past of 1
    assert "past 1" in all_groups(make_probes(config_of(7), kv_cache=True))
    ids = np.concatenate([probe.input_ids.ravel() for probe in probes])
    assert {0, 96} <= set(ids.tolist())
    assert max(int(probe.position_ids.max()) for probe in probes) == 1023
    everything = all_groups(make_probes(config_of(1024), kv_cache=True, level="full"))
    assert {"length 1023", "length 1024", "past 7, 4 new", "past 1020"} <= everything


def test_last_positions_and_windows_are_reached_without_a_cache() -> None:
    probes = make_probes(config_of(1024, window=256), kv_cache=False)
    assert max(int(probe.position_ids.max()) for probe in probes) == 1023
    assert max(probe.input_ids.shape[1] for probe in probes) == 259
    fixed = make_probes(config_of(1024), kv_cache=False, free_positions=False)
    assert all((p.position_ids == defaults(p, "text-generation")).all() for p in fixed)
    assert all(
        (p.position_ids == np.arange(p.input_ids.shape[1])).all()
        for p in make_probes(of_task("feature-extraction"), kv_cache=False, free_positions=False)
    )


def defaults(probe: Probe, task: str) -> Integers:
    return default_positions(task, probe.attention_mask, probe.input_ids.shape[1])


def of_task(task: str) -> GPTConfig:
    return dataclasses.replace(config_of(40), task=task)


@pytest.mark.parametrize("kv_cache", [True, False])
def test_positions_that_the_caller_chooses(kv_cache: bool) -> None:
    """A graph that ignores them, and one that uses the first row's for all, must fail."""
    probes = make_probes(of_task("feature-extraction"), kv_cache=kv_cache)
    (probe,) = (p for p in probes if "last positions" in p.groups)
    assert probe.position_ids.tolist() == [[36, 37, 38, 39], [0, 0, 1, 2], [0, 0, 1, 2]]
    assert probe.attention_mask.tolist() == [[1] * 4, [1, 0, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize("kv_cache", [True, False])
def test_default_level_is_bounded(kv_cache: bool) -> None:
    assert sum(probe.tokens for probe in make_probes(config_of(2048), kv_cache=kv_cache)) <= 130
    assert all(sum(p.tokens for p in wave) <= 256 for wave in waves(make_probes(config_of(2048), kv_cache=kv_cache)))


def test_prompts_of_different_lengths_differ_in_one_id() -> None:
    """The causality check relies on this."""
    for config in (SMALLER, LARGE):
        prompts = [
            ids
            for probe in make_probes(config, kv_cache=True)
            for row, ids in enumerate(probe.input_ids)
            if probe.is_prompt(row) and len(ids) >= 7
        ]
        short, long = sorted(prompts, key=len)
        assert np.flatnonzero(short != long[: len(short)]).tolist() == [6]


def test_neighbours_in_the_batch_of_masks_differ() -> None:
    """A candidate that mixes up rows must fail."""
    (probe,) = (p for p in make_probes(config_of(), kv_cache=True) if "holes" in p.groups)
    real = [ids[mask == 1].tolist() for ids, mask in zip(probe.input_ids, probe.attention_mask, strict=True)]
    assert all(a[0] != b[0] for a, b in pairwise(real))


def test_past_is_seeded_and_differs_by_layer_unless_shared() -> None:
    config = config_of(100)
    first, again, other = (make_probes(config, kv_cache=True, seed=seed) for seed in (1, 1, 2))
    distinct, shared = (next(p for p in first if p.past_length and p.shared_past == s) for s in (False, True))
    assert np.array_equal(distinct.past(0, config), next(p for p in again if p.past_length).past(0, config))
    assert not np.array_equal(distinct.past(0, config), next(p for p in other if p.past_length).past(0, config))
    assert not np.array_equal(distinct.past(0, config), distinct.past(1, config))
    assert np.shares_memory(shared.past(0, config)[0], shared.past(1, config)[0])
    assert shared.past(0, config)[0].shape == (1, 3, 99, 8)


def test_default_positions_equal_the_reference_models() -> None:
    import torch

    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]])
    for task in TASKS:
        assert default_positions(task, mask, 3).tolist() == torch_positions(task, torch.from_numpy(mask), 3).tolist()


def test_waves_keep_order_and_bound_tokens() -> None:
    probes = make_probes(config_of(200), kv_cache=True, level="full")
    cut = list(waves(probes, 100))
    assert [probe for wave in cut for probe in wave] == list(probes)
    assert all(len(wave) == 1 or sum(p.tokens for p in wave) <= 100 for wave in cut)


def test_beginning() -> None:
    probe = next(p for p in make_probes(config_of(), kv_cache=True) if p.past_length == 5)
    cut = probe.beginning(2)
    assert (cut.input_ids.shape[1], cut.attention_mask.shape[1], cut.position_ids.shape[1]) == (2, 7, 2)
    assert dataclasses.asdict(cut)["past_seed"] == probe.past_seed


def sized(n_layer: int, n_embd: int) -> GPTConfig:
    layers = {"attn_scale": (0.5,) * n_layer, "attn_window": (None,) * n_layer}
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_inner": 4 * n_embd, "n_head": n_embd // 64}
    return dataclasses.replace(config_of(1024), **sizes, **layers)


LARGE, SMALLER = sized(48, 1600), sized(36, 1280)


def test_lengths_by_model_size() -> None:
    everywhere = {"length 1", "length 2", "no padding", "left padding", "right padding", "holes", "one token"}
    for config, longest, chunks in ((LARGE, 17, (1, 1, 1)), (SMALLER, 64, (1, 1, 5))):
        probes = make_probes(config, kv_cache=True)
        assert everywhere | {f"length {longest}", "past 5, holes", "past 1023"} <= all_groups(probes)
        assert 7 in {probe.input_ids.shape[1] for probe in probes}
        assert [(p.input_ids.shape[1], p.chunks) for p in probes if p.chunks] == [(longest, chunks)]
    full = all_groups(make_probes(LARGE, kv_cache=True, level="full"))
    assert {"length 7", "length 64", "length 1024"} <= full


def test_large_model_runs_few_passes() -> None:
    """Each run is a pass over all weights, except for the first chunk, which reuses the prompt of one token."""
    probes = make_probes(LARGE, kv_cache=True)
    assert len(probes) + sum(len(probe.chunks) - 1 for probe in probes if probe.chunks) == 8
    assert Pack(probes).length <= 36


@pytest.mark.parametrize("kv_cache", [True, False])
def test_seed_adds_probes_that_an_exporter_cannot_foresee(kv_cache: bool) -> None:
    found = checkpoint_of(*tiny_gpt2(n_positions=300)).config

    def added(seed: int, level: Any = "full") -> list[Probe]:
        probes = make_probes(found, kv_cache=kv_cache, level=level, seed=seed)
        return [probe for probe in probes if probe.name.startswith("random")]

    assert added(0, "default") == [] and len(added(1, "default")) == 3
    assert len(added(0)) == 12
    first, again, other = added(1), added(1), added(2)
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first, again, strict=True))
    assert [p.input_ids.shape for p in first] != [p.input_ids.shape for p in other]
    assert len({len(p.input_ids) for p in first + other}) > 4 and len({p.attention_mask.shape[1] for p in first}) > 4
    assert {bool(p.past_length) for p in first} == ({True, False} if kv_cache else {False})
    assert all((p.attention_mask[:, p.past_length :].sum(1) > 0).all() for p in first + other)


def test_seed_changes_the_fixed_probes() -> None:
    config = checkpoint_of(*tiny_gpt2()).config
    a, b = (make_probes(config, kv_cache=True, seed=seed) for seed in (0, 1))
    assert any(not np.array_equal(x.input_ids, y.input_ids) for x, y in zip(a, b, strict=False))


#: What a malicious graph could wait for before it computes something else.
TRIGGERS: Mapping[str, Callable[[Probe], bool]] = {
    "more than 64 new tokens": lambda probe: probe.input_ids.shape[1] > 64,
    "exactly 100 tokens": lambda probe: probe.attention_mask.shape[1] == 100,
    "batch of 2": lambda probe: len(probe.input_ids) == 2,
    "batch of 4": lambda probe: len(probe.input_ids) == 4,
    "batch above 6": lambda probe: len(probe.input_ids) > 6,
    "past of 10": lambda probe: probe.past_length == 10,
    "one id of 97": lambda probe: 41 in probe.input_ids[:, 1:],
}


def unseen(level: Level, seed: int) -> set[str]:
    config = checkpoint_of(*tiny_gpt2(n_positions=256)).config
    probes = make_probes(config, kv_cache=True, level=level, seed=seed)
    return {name for name, trigger in TRIGGERS.items() if not any(map(trigger, probes))}


def test_triggers_that_no_probe_meets() -> None:
    """The figures of docs/verification.md: one batch size, length or past among many may be missed, but no range."""
    rare = {"exactly 100 tokens", "past of 10"}
    assert unseen("default", 0) == TRIGGERS.keys() - {"one id of 97"}
    for seed in range(6):
        assert unseen("full", seed) <= rare
        assert unseen("default", seed + 1) < unseen("default", 0)
