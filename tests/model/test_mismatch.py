"""Tensors that do not match the configuration: the hint names the cause, and following it works."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError
from gptconvert.families.registry import understand
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from tests.helpers import computed_tensors, openai_hparams, openai_layout, source_of, tiny_gpt2

Model = tuple[dict[str, Any], dict[str, Any]]


def resized(raw: dict[str, Any], arrays: dict[str, Any]) -> Model:
    """The vocabulary was extended, and config.json is that of the base."""
    return {**raw, "vocab_size": raw["vocab_size"] - 4}, arrays


def longer(raw: dict[str, Any], arrays: dict[str, Any]) -> Model:
    return {**raw, "n_positions": raw["n_positions"] + 3, "n_ctx": raw["n_positions"] + 3}, arrays


def head_only_in_the_config(raw: dict[str, Any], arrays: dict[str, Any]) -> Model:
    return {**raw, "tie_word_embeddings": False}, arrays


def shallower(raw: dict[str, Any], arrays: dict[str, Any]) -> Model:
    return {**raw, "n_layer": 1}, arrays


def custom_head(raw: dict[str, Any], arrays: dict[str, Any]) -> Model:
    return raw, {**arrays, "fc1.weight": np.ones((3, 5), np.float32), "fc1.bias": np.ones(3, np.float32)}


def many_unknown(raw: dict[str, Any], arrays: dict[str, Any]) -> Model:
    return raw, {**arrays, **{f"mapper.part{i}.{i}.weight": np.ones(3, np.float32) for i in range(9)}}


CASES: Mapping[str, tuple[Callable[..., Model], str]] = {
    "vocabulary": (resized, "--set vocab_size=97"),
    "positions": (longer, "--set n_positions="),
    "head": (head_only_in_the_config, "--set tie_word_embeddings=true"),
    "layers": (shallower, "--set n_layer=2"),
    "custom head": (custom_head, "--ignore-tensor fc1.weight --ignore-tensor fc1.bias"),
    "many": (many_unknown, "--ignore-tensor 'mapper.*'"),
}


def failure(raw: Mapping[str, Any], arrays: Mapping[str, Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        understand(source_of(raw, computed_tensors(arrays)), Options())
    return caught.value


def followed(hint: str, raw: Mapping[str, Any], arrays: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with the first options of a hint."""
    first = hint.partition("; to leave")[0]
    options: dict[str, Any] = {
        field: tuple(re.findall(rf"{flag} '?([^' ]+)", first))
        for flag, field in (("--set", "set_key"), ("--ignore-tensor", "ignore_tensor"))
    }
    return understand(source_of(raw, computed_tensors(arrays)), Options(**options))


@pytest.mark.parametrize("name", CASES)
def test_the_hint_resolves_the_mismatch(name: str) -> None:
    change, words = CASES[name]
    raw, arrays = change(*tiny_gpt2())
    hint = failure(raw, arrays).hint or ""
    assert words in hint
    assert "different models" not in hint
    assert followed(hint, raw, arrays).weights


def test_layers_that_the_configuration_lacks_can_be_left_out() -> None:
    raw, arrays = shallower(*tiny_gpt2())
    pattern = re.search(r"; to leave them out: --ignore-tensor '(.+?)'", failure(raw, arrays).hint or "")
    assert pattern is not None
    options = Options(ignore_tensor=(pattern[1],))
    assert understand(source_of(raw, computed_tensors(arrays)), options).config.n_layer == 1


def test_the_key_of_another_format() -> None:
    raw, arrays = tiny_gpt2(n_inner=None)
    hparams = {**openai_hparams(raw), "n_vocab": raw["vocab_size"] + 3}  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        understand(source_of(hparams, computed_tensors(openai_layout(arrays)), scheme="openai-tf"), Options())
    assert "--set n_vocab=" in (caught.value.hint or "")


CAUSES: Mapping[str, tuple[Mapping[str, str], str]] = {
    "LoRA": ({"weight": "base_layer.weight", "lora": "lora_A.default.weight"}, "merge_and_unload"),
    "pruning": ({"weight": "weight_orig", "mask": "weight_mask"}, "prune.remove"),
    "weight_norm": ({"weight": "weight_v", "norm": "weight_g"}, "remove_weight_norm"),
    "parametrisation": ({"weight": "parametrizations.weight.original0"}, "remove_parametrizations"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_weights_stored_in_parts_by_a_training_program(name: str) -> None:
    names, words = CAUSES[name]
    raw, arrays = tiny_gpt2()
    weight = "transformer.h.1.mlp.c_fc.weight"
    array = arrays.pop(weight)
    arrays |= {weight.removesuffix("weight") + stored: array for stored in names.values()}
    assert words in (failure(raw, arrays).hint or "")


def test_transposed_weights() -> None:
    """minGPT's state dict has transformers' names; its square matrices alone would not show the difference."""
    raw, arrays = tiny_gpt2()
    turned = {n: a.T if a.ndim == 2 and ".h." in n else a for n, a in arrays.items()}
    assert "transposed" in (failure(raw, turned).hint or "")


def test_zero_stage_3_saved_without_gathering() -> None:
    raw, arrays = tiny_gpt2()
    error = failure(raw, {name: np.zeros(0, np.float32) for name in arrays})
    assert "ZeRO stage 3" in (error.hint or "")
    assert "zero_to_fp32.py" in (error.hint or "")
    assert "h.{0-1}.ln_1.weight: expected [24], found [0]" in str(error)


def test_embedding_and_head_of_different_sizes() -> None:
    """No vocabulary size fits both, so none is proposed."""
    raw, arrays = tiny_gpt2()
    arrays = {**arrays, "lm_head.weight": np.ones((99, 24), np.float32)}
    assert "different models" in (failure({**raw, "tie_word_embeddings": False}, arrays).hint or "")
