"""Candidates that misbehave in ways our graphs cannot, and failures that need no figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.verify import metrics, outputs, truth
from gptconvert.verify.metrics import Errors
from gptconvert.verify.outputs import CHUNKED, Group, OutputComparison
from gptconvert.verify.probes import make_probes
from gptconvert.verify.run_probes import run_probes
from gptconvert.verify.runners import Feeds, Outputs, RunError, TorchRunner
from gptconvert.verify.truth import TruthPass
from tests.helpers import checkpoint_of, tiny_gpt2, torch_weights
from tests.verify.exports import altered

Spoil = Callable[[Feeds, Outputs], Outputs]


class Spoiled(TorchRunner):
    """The reference model with its outputs altered."""

    def __init__(self, checkpoint: Checkpoint, spoil: Spoil) -> None:
        super().__init__(checkpoint.config, torch_weights(checkpoint, torch.float32))
        self.spoil = spoil

    def run(self, feeds: Feeds, presents: bool) -> Outputs:
        return self.spoil(feeds, super().run(feeds, presents))


def judge(checkpoint: Checkpoint, runner: Any, kv_cache: bool = True) -> dict[str, Group]:
    probes = make_probes(checkpoint.config, kv_cache=kv_cache)
    exact = TruthPass(checkpoint, probes, "float32", presents=kv_cache).run()
    groups: dict[str, Group] = {}
    answers = run_probes(runner, probes, checkpoint.config)
    OutputComparison(answers, runner.compute, exact, checkpoint.config, groups).judge()
    return groups


def problems(groups: dict[str, Group]) -> str:
    return "\n".join(f"{g.name}: {p}" for g in groups.values() for p in g.problems)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return checkpoint_of(*tiny_gpt2(2))


def logits(change: Callable[[Feeds, Any], Any]) -> Spoil:
    return lambda feeds, out: dataclasses.replace(out, named={"logits": change(feeds, out.named["logits"])})


def test_reference_model_passes(checkpoint: Checkpoint) -> None:
    groups = judge(checkpoint, Spoiled(checkpoint, lambda feeds, out: out))
    assert all(group.ok for group in groups.values()), problems(groups)
    assert CHUNKED in groups and groups[CHUNKED].tokens == 7


@pytest.mark.parametrize("most", [1, 300], ids=["one row", "3 rows"])
def test_outputs_are_compared_a_few_rows_at_a_time(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """So that the memory does not grow with the number of tokens; the figures are the same."""
    at_once: list[int] = []

    class Watched(Errors):
        @classmethod
        def of(cls, values: Any, truth: Any) -> Errors:
            at_once.append(len(truth) if truth.shape[1] == 97 else 0)
            return super().of(values, truth)

    runner = Spoiled(checkpoint, lambda feeds, out: out)
    expected = judge(checkpoint, runner)
    monkeypatch.setattr(metrics, "ELEMENTS_AT_ONCE", most)
    for module in (outputs, truth):
        monkeypatch.setattr(module, "Errors", Watched)
    found = judge(checkpoint, runner)
    assert max(at_once) == max(1, most // 97)
    assert [measure.as_dict() for group in found.values() for measure in group.measures.values()] == [
        measure.as_dict() for group in expected.values() for measure in group.measures.values()
    ]
    assert [group.similarity.as_dict() for group in found.values()] == [
        group.similarity.as_dict() for group in expected.values()
    ]


def one_nan(feeds: Feeds, array: Any) -> Any:
    array = array.copy()
    array[0, 0, 0] = np.nan
    return array


HARD: list[tuple[str, Spoil, str]] = [
    ("NaN", logits(one_nan), "logits has NaN"),
    ("shape", logits(lambda feeds, a: a[:, -1:]), "logits has shape [1, 1, 97], expected [1, 2, 97]"),
    ("type", logits(lambda feeds, a: a.astype(np.float64)), "logits has type float64, expected float32"),
    ("constant", logits(lambda feeds, a: a * 0), "logits is constant"),
    (
        "input ignored",
        logits(lambda feeds, a: np.broadcast_to(np.arange(97, dtype=np.float32), a.shape)),
        "the output does not depend on the input",
    ),
    (
        "not causal",
        logits(lambda feeds, a: a + 0.01 * feeds.input_ids.sum(1)[:, None, None].astype(np.float32)),
        "a token changes the outputs before it",
    ),
    (
        "past rounded",
        lambda feeds, out: dataclasses.replace(
            out, presents=[(k.astype(np.float16).astype(np.float32), v) for k, v in out.presents]
        ),
        "present.0.key does not begin with the past",
    ),
    (
        "present without past",
        lambda feeds, out: dataclasses.replace(
            out, presents=[(k[:, :, -feeds.input_ids.shape[1] :], v) for k, v in out.presents]
        ),
        "present.0.key has shape",
    ),
]


@pytest.mark.parametrize(("spoil", "words"), [h[1:] for h in HARD], ids=[h[0] for h in HARD])
def test_hard_failures(checkpoint: Checkpoint, spoil: Spoil, words: str) -> None:
    groups = judge(checkpoint, Spoiled(checkpoint, spoil))
    assert words in problems(groups)
    assert not all(group.ok for group in groups.values())


def test_runtime_error_fails_the_probe(checkpoint: Checkpoint) -> None:
    def fail(feeds: Feeds, out: Outputs) -> Outputs:
        if len(feeds.input_ids) > 1:
            raise RunError("batch of one only")
        return out

    groups = judge(checkpoint, Spoiled(checkpoint, fail))
    assert "holes: the run failed: batch of one only" in problems(groups)
    assert groups["length 7"].ok and not groups["left padding"].ok


def test_error_that_shows_only_in_chunks(checkpoint: Checkpoint) -> None:
    """Correct on random pasts, wrong on the candidate's own."""

    def forget(feeds: Feeds, out: Outputs) -> Outputs:
        if feeds.past and feeds.past[0][0].shape[2] == 2:  # only the chunked prefill has this past
            return dataclasses.replace(out, named={"logits": out.named["logits"][::-1] * 1.01})
        return out

    groups = judge(checkpoint, Spoiled(checkpoint, forget))
    assert [name for name, group in groups.items() if not group.ok] == [CHUNKED]


def test_padding_may_hold_anything_but_nan(checkpoint: Checkpoint) -> None:
    """Finite outputs at padding are not compared."""

    def scribble(feeds: Feeds, out: Outputs) -> Outputs:
        new = feeds.input_ids.shape[1]
        padding = feeds.attention_mask[:, -new:] == 0
        array = out.named["logits"].copy()
        array[padding] = 1e6
        return dataclasses.replace(out, named={"logits": array})

    assert all(group.ok for group in judge(checkpoint, Spoiled(checkpoint, scribble)).values())


@pytest.mark.parametrize("wrong", [{"norm_eps": 1e-6}, {"activation": "gelu_erf"}, {"attn_scale": (0.35, 0.35)}])
def test_mildest_bugs_are_far_above_the_noise(checkpoint: Checkpoint, wrong: dict[str, Any]) -> None:
    runner = TorchRunner(altered(checkpoint, **wrong).config, torch_weights(checkpoint, torch.float32))
    groups = judge(checkpoint, runner)
    assert min(g.measures["logits"].ratio for name, g in groups.items() if name.startswith("length 40")) > 20


def test_bare_model() -> None:
    bare = checkpoint_of(*tiny_gpt2(2), request=Options(task="feature-extraction"))
    groups = judge(bare, Spoiled(bare, lambda feeds, out: out))
    assert all(group.ok for group in groups.values())
    wrong = judge(bare, TorchRunner(altered(bare, norm_eps=1e-6).config, torch_weights(bare, torch.float32)))
    assert not any(group.ok for group in wrong.values())
