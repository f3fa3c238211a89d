"""Rotary widths and scaling: equal to transformers in float64, or refused where transformers fails too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gptconvert.errors import GptConvertError, InputError, UnsupportedError
from gptconvert.families.registry import family_named
from gptconvert.model.options import Options
from reference_model.config import Rotary
from reference_model.rotary import SCALINGS, RopeScaling
from tests.families import witness
from tests.families.witness import Case, gap, hf_outputs, inputs_of, our_outputs, rope

FIRST = "original_max_position_embeddings"
#: Heads have 8 features, the context has 40 tokens, the batch has positions up to 16.
SCALED: dict[str, dict[str, object]] = {
    "odd": rope(1000.0, 0.4),
    "seven-of-eight": rope(1000.0, 0.99),
    "one": rope(1000.0, 0.13),
    "none": rope(1000.0, 0.0),
    "linear": rope(1000.0, 0.5, "linear", factor=4.0),
    "linear-1": rope(1000.0, 0.5, "linear", factor=1),
    "linear-odd": rope(1000.0, 0.4, "linear", factor=2.5),
    "dynamic": rope(1000.0, 0.5, "dynamic", factor=3.0),
    "yarn": rope(40.0, 1.0, "yarn", factor=4.0, **{FIRST: 10}),
    "yarn-mscale": rope(
        9.0,
        1.0,
        "yarn",
        factor=4.0,
        beta_fast=3,
        beta_slow=0.5,
        mscale=0.7,
        mscale_all_dim=1.2,
        truncate=False,
        **{FIRST: 10},
    ),
    "yarn-attention-factor": rope(40.0, 1.0, "yarn", factor=None, attention_factor=1.5, **{FIRST: 20}),
    "yarn-whole-context": rope(40.0, 1.0, "yarn", factor=2.0),
    "llama3": rope(1000.0, 1.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **{FIRST: 30}),
}


def checkpoint(case: Case, directory: Path) -> Any:
    return witness.checkpoint(case, directory, Options(task=case.task))


def read(family: str = "gpt_neox", **keys: object) -> Any:
    raw = {"model_type": family, **witness.TINY[family], **keys}
    return family_named(family).read_config("hf", raw, "config.json", {}, Options())


@pytest.mark.parametrize("name", SCALED)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    case = Case("gpt_neox", keys=SCALED[name], name=name)
    found, inputs = checkpoint(case, tmp_path), inputs_of(case.task)
    outputs = our_outputs(witness.reference(found), inputs)
    assert gap(outputs, hf_outputs(case, inputs), inputs["attention_mask"]) < 1e-12


def test_every_kind_matters() -> None:
    """No case above equals another by accident, except those that must."""
    read_rotary = {name: read(**keys).config.rotary for name, keys in SCALED.items()}
    values = {name: (r.width, r.frequencies, r.magnitude) for name, r in read_rotary.items()}
    assert {r.scaling.kind for r in read_rotary.values() if r.scaling} == {*SCALINGS}
    assert values["dynamic"] == values["linear-1"]
    assert len({*values.values()}) == len(values) - 1


@pytest.mark.parametrize("name", SCALED)
def test_config_json_round_trip(name: str) -> None:
    """transformers 5 reads rope_parameters, older versions rope_scaling; either alone gives the same model."""
    config = read(**SCALED[name]).config
    out: Any = json.loads(json.dumps(family_named("gpt_neox").write_config(config, {})))
    assert read(**out).config == config
    assert None not in out["rope_parameters"].values()
    assert ("rope_scaling" in out) == (config.rotary.scaling is not None)
    if config.rotary.scaling is not None:
        assert out["rope_scaling"].items() <= out["rope_parameters"].items()
        older = {**out, "rope_parameters": None}
        assert read(**older).config == config
        older["rope_scaling"]["type"] = older["rope_scaling"].pop("rope_type")
        assert read(**older).config == config


def test_notes() -> None:
    assert "context of 40 tokens" in read(**SCALED["dynamic"]).notes[0]
    assert "no positions" in read(**SCALED["none"]).notes[0]
    [note] = read(**rope(1e4, 0.5, "linear", factor=2.0, beta_fast=3)).notes
    assert note == "rope_parameters.beta_fast = 3.0 has no effect: the rope type is linear"
    assert not any(read(**SCALED[name]).notes for name in ("odd", "linear", "yarn", "yarn-mscale", "llama3"))


#: Keys, part of the message, and whether transformers fails too.
REFUSED: list[tuple[str, dict[str, object], type[GptConvertError], str, bool]] = [
    ("gptj", {"rotary_dim": 3}, InputError, "must be even", True),
    ("gptj", {"rotary_dim": 0}, InputError, "must be even, from 2 to 8", True),
    ("gptj", {"rotary_dim": 10}, InputError, "must be even, from 2 to 8", True),
    ("codegen", {"rotary_dim": 3}, InputError, "must be even", True),
    ("gpt_neox", rope(1e4, 1.3), InputError, "must be from 0 to 8", True),
    ("gpt_neox", {"hidden_size": 15, **rope(1e4, 1.0)}, InputError, "must be from 0 to 5", True),
    ("gpt_neox", rope(0.0, 0.5), InputError, "above 0", False),
    ("gpt_neox", rope(1e4, 0.25, "dynamic", factor=2.0), InputError, "divides by dim - 2", True),
    ("gpt_neox", rope(1e4, 0.7, "yarn", factor=2.0), InputError, "yarn needs an even number", True),
    ("gpt_neox", rope(1e4, 0.5, "linear"), InputError, "rope_parameters.factor: required key is missing", True),
    ("gpt_neox", rope(1e4, 0.5, "linear", factor=0.0), InputError, "linear needs a number above 0", False),
    ("gpt_neox", rope(1e4, 0.5, "linear", factor="2"), InputError, "rope_parameters.factor", True),
    ("gpt_neox", rope(1e4, 0.5, "llama3", factor=2.0), InputError, "low_freq_factor: required", True),
    (
        "gpt_neox",
        rope(1e4, 0.5, "longrope", factor=2.0, short_factor=[1, 1], long_factor=[2, 2], **{FIRST: 20}),
        UnsupportedError,
        "depend on each sequence",
        False,
    ),
    ("gpt_neox", rope(1e4, 0.5, "proportional"), UnsupportedError, "Gemma", False),
    ("gpt_neox", rope(1e4, 0.5, "spiral"), UnsupportedError, "'spiral' is not implemented", True),
]


@pytest.mark.parametrize(("family", "keys", "kind", "words", "fails"), REFUSED, ids=str)
def test_refused(family: str, keys: dict[str, object], kind: type[GptConvertError], words: str, fails: bool) -> None:
    with pytest.raises(kind, match=words) as error:
        read(family, **keys)
    assert error.value.path == "config.json"
    if fails:
        case = Case(family, keys=keys, name=words)
        with pytest.raises((RuntimeError, ArithmeticError, KeyError, TypeError, ValueError, IndexError)):
            witness.hf_model(case)(**witness.tensors(witness.batch()))


def test_linear_scaling_slows_every_pair_down() -> None:
    plain, scaled = Rotary(6, 100.0), Rotary(6, 100.0, scaling=RopeScaling("linear", 4.0))
    assert [4 * f for f in scaled.frequencies] == pytest.approx(plain.frequencies)
    assert plain.frequencies == pytest.approx((1, 100 ** (-1 / 3), 100 ** (-2 / 3)))


def test_yarn_magnitude() -> None:
    assert Rotary(8, scaling=RopeScaling("yarn", 4.0, 10)).magnitude == pytest.approx(0.1 * math.log(4) + 1)
    assert Rotary(8, scaling=RopeScaling("yarn", 0.5, 10)).magnitude == 1


@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(64, 5e-324),
        Rotary(4, scaling=RopeScaling("yarn", 2.0, 2048, beta_fast=1e-310)),
    ],
)
def test_frequencies_that_overflow_are_a_problem(rotary: Rotary) -> None:
    problem = rotary.problem(64)
    assert problem is not None
    assert "overflow" in problem[2]
