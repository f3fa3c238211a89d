"""The reference model equals transformers in float64 to the last digits: every family, head and option."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.model.options import Options
from reference_model.config import CACHED_TASKS, INPUTS, OUTPUTS, TASKS, ConfigError, GPTConfig, Rotary
from reference_model.rotary import RopeScaling
from tests.families import witness
from tests.families.bugs import BUGS, Bug
from tests.families.witness import BY_TASK, CASES, PAD, VARIANTS, Case, gap, hf_outputs, inputs_of, our_outputs

FAMILIES = tuple(witness.TINY)
#: Allowed rounding error, relative to the largest value. (gelu_fast's constant has ten digits.)
EXACT = 2e-12
#: Smallest change of an output that a planted bug must cause.
SHOWS = 1e-6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def understood(case: Case, directory: Path) -> Any:
    return witness.checkpoint(case, directory, Options(task=case.task))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_transformers(case: Case, directory: Path) -> None:
    """All outputs, keys and values, with padding on either side and holes in the mask."""
    inputs = inputs_of(case.task)
    model = witness.reference(understood(case, directory))
    assert gap(our_outputs(model, inputs), hf_outputs(case, inputs), inputs["attention_mask"]) < EXACT


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_detected(bug: Bug, directory: Path) -> None:
    inputs = inputs_of(bug.case.task)
    right = understood(bug.case, directory)
    wrong = our_outputs(witness.reference(bug.plant(right)), inputs)
    assert gap(wrong, hf_outputs(bug.case, inputs), inputs["attention_mask"]) > SHOWS


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_ignore_padding_are_detected(family: str, directory: Path) -> None:
    case, inputs = Case(family), inputs_of("text-generation")
    model = witness.reference(understood(case, directory))
    counted = np.broadcast_to(np.arange(17), (4, 17))
    wrong = our_outputs(model, {**inputs, "position_ids": counted})
    # A shift of all positions does not affect rotary models; holes do.
    assert gap(wrong, hf_outputs(case, inputs), inputs["attention_mask"]) > SHOWS


@pytest.mark.parametrize("cuts", [(1,), (5, 9), (1, 2, 3, 16)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_add_up(family: str, cuts: tuple[int, ...], directory: Path) -> None:
    """A sequence fed in chunks, each with the keys and values of the ones before, gives the same logits."""
    import torch

    inputs = inputs_of("text-generation")
    model = witness.reference(understood(Case(family), directory))
    given = witness.tensors(inputs)
    logits, past = [], None
    for start, stop in zip((0, *cuts), (*cuts, 17), strict=True):
        with torch.no_grad():
            new, past = model(
                given["input_ids"][:, start:stop],
                given["attention_mask"][:, :stop],
                given["position_ids"][:, start:stop],
                past,
            )
        logits.append(new.numpy())
    found = {"logits": np.concatenate(logits, 1)}
    expected = {"logits": hf_outputs(Case(family), inputs)["logits"]}
    assert gap(found, expected, inputs["attention_mask"]) < EXACT


def test_default_positions_of_a_language_model_count_the_masks_ones(directory: Path) -> None:
    inputs = inputs_of("text-generation")
    model = witness.reference(understood(Case("gpt2"), directory))
    explicit = our_outputs(model, inputs)
    del inputs["position_ids"]
    assert gap(our_outputs(model, inputs), explicit, inputs["attention_mask"]) == 0


@pytest.mark.parametrize("case", [c for c in BY_TASK if c.task != "text-generation"], ids=str)
def test_chosen_positions(case: Case, directory: Path) -> None:
    """Every head accepts positions, as transformers does."""
    inputs = inputs_of(case.task)
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clip(0)
    model = witness.reference(understood(case, directory))
    assert gap(our_outputs(model, inputs), hf_outputs(case, inputs), mask) < EXACT


@pytest.mark.parametrize("case", [c for c in BY_TASK if c.task != "text-generation"], ids=str)
def test_left_padding_shifts_positions(case: Case, directory: Path) -> None:
    """Only learned positions are affected by the shift, as in transformers."""
    inputs = inputs_of(case.task)
    mask = inputs["attention_mask"] = np.ones_like(inputs["attention_mask"])
    mask[..., :3] = 0
    model = witness.reference(understood(case, directory))
    counted = our_outputs(model, {**inputs, "position_ids": (mask.cumsum(-1) - 1).clip(0)})
    expected = hf_outputs(case, inputs)
    assert gap(our_outputs(model, inputs), expected, mask) < EXACT
    outputs = {name: value for name, value in expected.items() if not name.startswith("present.")}
    assert (gap(counted, outputs, mask) > SHOWS) == (model.config.rotary is None)


def test_padding_does_not_affect_classification(directory: Path) -> None:
    """With positions that count tokens, neither leading nor trailing padding matters."""
    case = Case("gpt2", "text-classification")
    model = witness.reference(understood(case, directory))
    bare = np.arange(7)[None] + 11
    padded = np.concatenate([np.full((1, 3), PAD), bare, np.full((1, 4), PAD)], 1)
    mask = (padded != PAD).astype(np.int64)
    positions = (mask.cumsum(1) - 1).clip(0)
    long = our_outputs(model, {"input_ids": padded, "attention_mask": mask, "position_ids": positions})
    short = our_outputs(model, {"input_ids": bare, "attention_mask": np.ones((1, 7), np.int64)})
    assert np.allclose(long["logits"], short["logits"], rtol=0, atol=1e-12)


def test_choice_is_scored_at_its_last_token_by_default(directory: Path) -> None:
    inputs = witness.choices(witness.batch(mask=np.ones((4, 17), np.int64)))
    model = witness.reference(understood(Case("gpt1", "multiple-choice"), directory))
    explicit = our_outputs(model, inputs)
    del inputs["mc_token_ids"]
    assert np.array_equal(our_outputs(model, inputs)["mc_logits"], explicit["mc_logits"])


def test_sequence_of_padding_is_classified_at_its_first_token(directory: Path) -> None:
    case = Case("gpt_neox", "text-classification")
    inputs = {**inputs_of(case.task), "input_ids": np.full((4, 17), PAD)}
    model = witness.reference(understood(case, directory))
    found, expected = our_outputs(model, inputs), hf_outputs(case, inputs)
    assert np.allclose(found["logits"][0], expected["logits"][0], rtol=0, atol=1e-11)


def test_without_a_padding_token_the_last_token_is_classified(directory: Path) -> None:
    """transformers does the same for one sequence and rejects more."""
    case = Case("gpt2", "text-classification")
    right = understood(case, directory)
    blind = dataclasses.replace(right, config=dataclasses.replace(right.config, pad_token_id=None))
    one = {name: value[:1] for name, value in inputs_of(case.task).items()}
    model = witness.hf_model(case).double()
    model.config.pad_token_id = None
    found = our_outputs(witness.reference(blind), one)["logits"]
    assert np.allclose(found, hf_outputs(case, one, model)["logits"], rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_outside_the_vocabulary_are_rejected(family: str, directory: Path) -> None:
    model = witness.reference(understood(Case(family), directory))
    for wrong in (97, -1):
        inputs = inputs_of("text-generation")
        inputs["input_ids"][0, 3] = wrong
        with pytest.raises(IndexError):
            our_outputs(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_past_the_context(family: str, directory: Path) -> None:
    """Learned positions fail; rotary ones continue, and only their distances matter."""
    model = witness.reference(understood(Case(family), directory))
    mask = np.ones((1, 6), np.int64)
    near = {**witness.batch(mask=mask), "position_ids": np.arange(6)[None]}
    far = {**near, "position_ids": np.arange(6)[None] + 1000}
    if model.config.rotary is None:
        with pytest.raises(IndexError):
            our_outputs(model, {**near, "position_ids": np.arange(6)[None] + 35})
        return
    logits = [our_outputs(model, inputs)["logits"] for inputs in (near, far)]
    assert np.allclose(*logits, rtol=0, atol=1e-9)


def test_tables_cover_every_task() -> None:
    assert set(INPUTS) == set(OUTPUTS) == set(TASKS)
    assert set(TASKS) > CACHED_TASKS
    assert {case.task for case in CASES} == set(TASKS)
    assert {case.family for case in VARIANTS} == {bug.case.family for bug in BUGS} == set(FAMILIES)


SOUND: dict[str, Any] = {
    "family": "gpt2",
    "vocab_size": 9,
    "n_ctx": 8,
    "n_embd": 12,
    "n_layer": 1,
    "n_head": 3,
    "n_inner": 5,
    "attn_scale": (0.5,),
    "attn_window": (None,),
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("n_embd", True),
        ("n_head", 5),
        ("n_layer", 2),
        ("n_layer", 10_001),
        ("norm_eps", -1e-5),
        ("norm_eps", 1e31),
        ("norm_eps", float("nan")),
        ("activation", "gelu"),
        ("task", "translation"),
        ("rotary", Rotary(5)),
        ("rotary", Rotary(-1)),
        ("rotary", Rotary(3, interleaved=True)),
        ("rotary", Rotary(0, interleaved=True)),
        ("rotary", Rotary(4, base=0.0)),
        ("rotary", Rotary(4, scaling=RopeScaling("stretched", 2.0))),
        ("rotary", Rotary(4, scaling=RopeScaling("linear", -2.0))),
        ("rotary", Rotary(4, scaling=RopeScaling("llama3", 2.0, 8, low_freq_factor=2.0, high_freq_factor=2.0))),
    ],
)
def test_impossible_configurations_are_rejected(key: str, value: object) -> None:
    GPTConfig(**SOUND)
    with pytest.raises(ConfigError) as error:
        GPTConfig(**{**SOUND, key: value})
    assert error.value.key.startswith(key)


def test_labelled_task_needs_labels() -> None:
    GPTConfig(**SOUND, task="text-classification", n_labels=1)
    with pytest.raises(ConfigError, match="n_labels"):
        GPTConfig(**SOUND, task="token-classification")
