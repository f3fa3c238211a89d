"""Token for token what transformers generates, for all families and deterministic options; and like samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UsageError
from gptconvert.families.registry import FAMILIES
from gptconvert.generation.processors import best, needed, nucleus, probabilities, without_repeats
from gptconvert.generation.sampling import Sampling, settle, stated
from gptconvert.generation.search import beam_search, decode
from tests.families.witness import Case, checkpoint, hf_model, reference

PROMPT, NEW = [5, 6, 7, 50, 3, 7], 20
NAMES = [family.name for family in FAMILIES]


class Reference:
    """The reference model as a runtime."""

    n_ctx, vocab_size = 40, 97

    def __init__(self, model: Any) -> None:
        self.model, self.past = model, []

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Any:
        import torch

        chosen = list(parents)
        past = [(k[chosen], v[chosen]) for k, v in self.past]
        with torch.no_grad():
            logits, self.past = self.model(torch.tensor([list(row) for row in rows]), past=past)
        return logits[:, -1].float().numpy()

    def reset(self, most: int | None = None) -> None:
        self.past = []

    def close(self) -> None:
        pass


class Largest(Reference):
    """Returns the largest logits alone, as many as :func:`needed` says."""

    most: int | None = None

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Any:
        logits = super().step(rows, parents)
        return logits if self.most is None else best(logits, self.most)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family → (ours, transformers')."""

    @cache
    def pair(name: str) -> tuple[Any, Any]:
        case = Case(name)
        return reference(checkpoint(case, tmp_path_factory.mktemp("saved"))), hf_model(case).eval()

    return pair


def theirs(model: Any, stops: Sequence[int], **options: Any) -> list[list[int]]:
    import torch

    prompt = torch.tensor([PROMPT])
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    if "max_length" in options:
        del options["max_new_tokens"]
    found = model.float().generate(
        prompt, attention_mask=torch.ones_like(prompt), eos_token_id=list(stops) or None, pad_token_id=96, **options
    )
    rows = found[:, len(PROMPT) :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def ours(model: Any, stops: Sequence[int], **options: Any) -> list[list[int]]:
    if "early_stopping" in options:
        options["early_stopping"] = str(options["early_stopping"]).lower()
    if "max_length" not in options:
        options = {"max_new_tokens": NEW} | options
    settings, runtime = settle(Sampling(**options), {}, len(PROMPT), 40), Reference(model)
    if settings.num_beams > 1:
        return [list(beam.ids) for beam in beam_search(runtime, PROMPT, settings, stops)]
    rows = [list[int]() for _ in range(settings.num_return_sequences)]
    for tokens in decode(runtime, PROMPT, settings, stops):
        for row, token in tokens:
            rows[row] += [] if token is None else [token]
    return rows


#: Options → whether they need end tokens to show anything.
MODES: list[dict[str, Any]] = [
    {},
    {"max_length": 15},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 30},
    {"min_new_tokens": 7},
    {"num_beams": 4},
    {"num_beams": 5, "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": 2.5, "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": -1.0, "num_return_sequences": 3},
    {"num_beams": 4, "early_stopping": True, "num_return_sequences": 4},
    {"num_beams": 4, "early_stopping": "never", "num_return_sequences": 4},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": -0.5, "num_return_sequences": 2},
    {"num_beams": 4, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 5},
    {"num_beams": 2, "max_length": 12, "num_return_sequences": 2},
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", MODES, ids=str)
def test_token_for_token(options: dict[str, Any], name: str, models: Any) -> None:
    """Without end tokens, with one, and with several that soon occur."""
    mine, other = models(name)
    free = ours(mine, (), **options)[0]
    for stops in ((), (free[3],), tuple({free[2], free[-1], 11, 12, 13})):
        assert ours(mine, stops, **options) == theirs(other, stops, **options), stops


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 1),
        ({"temperature": 0.0}, 1),
        ({"top_k": 5, "seed": 2, "num_return_sequences": 4}, 5),
        ({"top_k": 9, "top_p": 0.7, "temperature": 1.8}, 9),
        ({"seed": 2}, None),
        ({"top_p": 0.7}, None),
        ({"repetition_penalty": 1.7}, None),
        ({"no_repeat_ngram_size": 2}, None),
        ({"min_new_tokens": 7, "top_k": 3}, None),
    ],
    ids=str,
)
def test_the_largest_logits_are_enough(options: dict[str, Any], most: int | None, models: Any) -> None:
    mine, _ = models("gpt2")
    settings = settle(Sampling(NEW, **options), {}, len(PROMPT), 40)
    assert needed(settings) == most
    runtime = Largest(mine)
    runtime.most = most
    assert list(decode(runtime, PROMPT, settings, (11,))) == list(decode(Reference(mine), PROMPT, settings, (11,)))


def test_samples_have_the_distribution(models: Any) -> None:
    """A chi-square test against transformers' probabilities after all of its own processors."""
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    mine, other = models("gpt2")
    with torch.no_grad():
        logits = other.float()(torch.tensor([PROMPT])).logits[:, -1]
    processed = LogitsProcessorList([TemperatureLogitsWarper(1.5), TopKLogitsWarper(30), TopPLogitsWarper(0.9)])
    expected = processed(torch.tensor([PROMPT]), logits)[0].softmax(0).numpy()
    count = 4000
    sampling = Sampling(1, temperature=1.5, top_k=30, top_p=0.9, seed=1, num_return_sequences=count)
    settings = settle(sampling, {}, len(PROMPT), 40)
    (drawn,) = decode(Reference(mine), PROMPT, settings, ())
    counts = np.bincount([token for _, token in drawn if token is not None], minlength=97)
    assert not counts[expected == 0].any()
    likely = expected * count >= 5
    assert likely.sum() > 10
    statistic = ((counts - expected * count)[likely] ** 2 / (expected * count)[likely]).sum()
    freedom = int(likely.sum())
    assert statistic < freedom + 3.1 * np.sqrt(2 * freedom)  # about one in a thousand


def test_rows_of_samples_do_not_depend_on_their_number(models: Any) -> None:
    mine, _ = models("gpt2")
    rows = ours(mine, (11, 12), seed=3, num_return_sequences=5)
    assert len({tuple(row) for row in rows}) > 1
    assert ours(mine, (11, 12), seed=3, num_return_sequences=2) == rows[:2]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_nucleus(share: float) -> None:
    """The fewest most likely tokens that have this share."""
    scores = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    kept = np.isfinite(nucleus(scores, share))
    for row, mask in zip(probabilities(scores), kept, strict=True):
        assert row[mask].sum() >= share > row[mask].sum() - row[mask].min()
        assert row[mask].min() > row[~mask].max(initial=0)


def test_repeats_are_those_of_the_row() -> None:
    ids = np.array([[1, 2, 3, 1, 2], [4, 4, 4, 4, 4]])
    found = without_repeats(ids, np.zeros((2, 6), np.float32), 3)
    assert [np.flatnonzero(np.isinf(row)).tolist() for row in found] == [[3], [4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "seed": 1}, "--num-beams contradicts --seed"),
        ({"temperature": 0.0, "top_k": 3}, "--temperature 0 contradicts --top-k"),
        ({"length_penalty": 2.0}, "--length-penalty has no effect without --num-beams"),
        ({"early_stopping": "true", "num_beams": 1}, "--early-stopping has no effect"),
        ({"max_length": 9, "max_new_tokens": 2}, "--max-length contradicts --max-new-tokens"),
        ({"num_return_sequences": 2}, "one most likely continuation only"),
        ({"num_return_sequences": 3, "num_beams": 2}, "more continuations than beams"),
        ({"max_length": 6}, "as long as the text may be"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "no room"),
        ({"min_new_tokens": 40}, "no room"),
    ],
    ids=str,
)
def test_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settle(Sampling(**options), {}, len(PROMPT), 40)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"num_beams": 0}, "--num-beams"),
        ({"num_return_sequences": 0}, "--num-return-sequences"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"repetition_penalty": float("nan")}, "--repetition-penalty"),
        ({"no_repeat_ngram_size": -1}, "--no-repeat-ngram-size"),
        ({"length_penalty": float("inf")}, "--length-penalty"),
        ({"early_stopping": "maybe"}, "--early-stopping"),
        ({"max_length": True}, "--max-length"),
        ({"top_k": 0}, "--top-k"),
        ({"stop": ("",)}, "--stop"),
        ({"stop": "text"}, "--stop"),
    ],
    ids=str,
)
def test_invalid_values(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**options)
    assert caught.value.item == flag


def test_settings_of_generation_config() -> None:
    """They hold where no option is given; top_k is transformers' 50 if sampling does not state one."""
    config = {"do_sample": True, "temperature": 0.7, "num_beams": None, "max_length": 30, "early_stopping": True}
    found = stated(config, None)
    settings = settle(Sampling(), found, 6, 40)
    assert (settings.samples, settings.temperature, settings.top_k, settings.length) == (True, 0.7, 50, 30)
    settings = settle(Sampling(temperature=0.0, max_new_tokens=3), found, 6, 40)
    assert (settings.samples, settings.length, settings.limited_by) == (False, 9, "max_new_tokens")
    settings = settle(Sampling(num_beams=2), found, 6, 40)
    assert (settings.samples, settings.num_beams, settings.early_stopping) == (False, 2, "true")
    settings = settle(Sampling(seed=1), stated({"num_beams": 4, "num_return_sequences": 3}, None), 6, 40)
    assert (settings.samples, settings.num_beams, settings.num_return_sequences) == (True, 1, 3)
    settings = settle(Sampling(), stated({"num_beams": 4, "top_k": 0, "top_p": 0.5, "do_sample": False}, None), 6, 40)
    assert (settings.samples, settings.num_beams, settings.num_return_sequences) == (False, 4, 1)


@pytest.mark.parametrize(
    "config",
    [{"num_beams": 0}, {"temperature": "hot"}, {"do_sample": 1}, {"top_p": 1.5}, {"max_length": -1}, {"top_k": [1]}],
    ids=str,
)
def test_invalid_generation_config(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="invalid"):
        stated(config, "generation_config.json")
