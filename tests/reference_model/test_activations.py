"""Activations equal transformers' own functions, as numbers and inside models."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptconvert.errors import UnsupportedError
from gptconvert.families.keys import ACTIVATION as NAMES
from gptconvert.model.options import Options
from reference_model.config import ACTIVATIONS
from tests.families import witness
from tests.families.witness import Case, gap, hf_outputs, inputs_of, our_outputs

#: Names whose modules have trained parameters.
TRAINED = ("prelu", "xielu")


def known() -> tuple[str, ...]:
    """All activations that transformers knows."""
    from transformers.activations import ACT2CLS

    return tuple(ACT2CLS)


@pytest.mark.parametrize("name", known())
def test_every_name_of_transformers(name: str) -> None:
    """Equal to the last digits in float64, in the tails and at zero too, or refused with the reason."""
    import torch
    from transformers.activations import ACT2FN

    from reference_model.model import ACTIVATION

    if name in TRAINED:
        with pytest.raises(UnsupportedError, match="trained parameters"):
            NAMES.read("activation_function", name)
        return
    x = torch.cat((torch.linspace(-30, 30, 60001, dtype=torch.float64), torch.tensor([-1e4, -1e-9, 0.0, 1e-9, 1e4])))
    found, expected = ACTIVATION[NAMES.read("activation_function", name)](x), ACT2FN[name](x)
    assert ((found - expected).abs() <= 1e-12 * expected.abs().clamp(min=1)).all()


def test_every_formula_has_a_name() -> None:
    from reference_model.model import ACTIVATION

    assert set(ACTIVATION) == set(ACTIVATIONS) == {NAMES.read("", name) for name in known() if name not in TRAINED}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "gelu_10"),
        ("gpt2", "laplace"),
        ("gpt_neo", "quick_gelu"),
        ("gpt_neo", "leaky_relu"),
        ("gptj", "relu2"),
        ("gptj", "sigmoid"),
        ("gpt_neox", "hardswish"),
        ("gpt_neox", "linear"),
        ("codegen", "mish"),
    ],
)
def test_models_equal_transformers(family: str, name: str, tmp_path: Path) -> None:
    key = "hidden_act" if family == "gpt_neox" else "activation_function"
    case = Case(family, keys={key: name}, name=name)
    checkpoint = witness.checkpoint(case, tmp_path, Options(task=case.task))
    assert checkpoint.carried[key] == name
    inputs = inputs_of(case.task)
    found = our_outputs(witness.reference(checkpoint), inputs)
    assert gap(found, hf_outputs(case, inputs), inputs["attention_mask"]) < 1e-12
