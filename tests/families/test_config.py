"""Configurations: what each family reads, infers, rejects and writes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import GptConvertError, InputError, UnsupportedError, UsageError
from gptconvert.families.registry import FAMILIES, family_named
from gptconvert.model.options import Options
from gptconvert.model.tensors import LazyTensor
from reference_model.config import GPTConfig, Rotary
from tests.families import witness
from tests.helpers import computed_tensors

NAMES = tuple(family.name for family in FAMILIES)
TYPES = {family.name: family.model_types[0] for family in FAMILIES}


def tensors(**shapes: tuple[int, ...]) -> dict[str, LazyTensor]:
    """Tensors of which only the shapes matter; ``__`` in a name stands for a dot."""
    arrays = {name.replace("__", "."): np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return dict(computed_tensors(arrays))


def read(
    family: str, request: Options | None = None, found: dict[str, LazyTensor] | None = None, **keys: object
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    """The configuration of a tiny model, updated with ``keys``; a key set to ``...`` is removed."""
    raw = {"model_type": TYPES[family], **witness.TINY[family], **keys}
    raw = {key: value for key, value in raw.items() if value is not ...}
    return family_named(family).read_config("hf", raw, "config.json", found or {}, request or Options())


def config(family: str, **keys: object) -> GPTConfig:
    return read(family, **keys)[0]


def written(family: str, made: GPTConfig) -> dict[str, object]:
    return family_named(family).write_config(made, {})


# --- every family --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMES)
def test_unknown_keys_are_rejected_by_name(family: str) -> None:
    with pytest.raises(UnsupportedError, match="logit_softcap = 30") as error:
        read(family, logit_softcap=30, mystery="x")
    assert "mystery" in str(error.value)
    assert error.value.path == "config.json"


@pytest.mark.parametrize("family", NAMES)
def test_harmless_keys_are_carried_over(family: str) -> None:
    harmless = {"use_cache": False, "torch_dtype": "float16", "id2label": {"0": "no", "1": "yes"}}
    _, carried, _ = read(family, **harmless)
    assert harmless.items() <= carried.items()


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("key", ["add_cross_attention", "is_encoder_decoder", "quantization_config"])
def test_keys_of_switched_off_features_are_accepted(family: str, key: str) -> None:
    read(family, **{key: False})
    with pytest.raises(UnsupportedError, match=key):
        read(family, **{key: {"on": 1}})


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("value", ["97", 97.0, True, -1, 0, 1 << 40, [97]], ids=repr)
def test_invalid_sizes_are_rejected_with_their_key(family: str, value: object) -> None:
    with pytest.raises(InputError) as error:
        read(family, vocab_size=value)
    assert error.value.item == "vocab_size"


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("value", [0, -3, 7, (1 << 30) + 1])
@pytest.mark.parametrize("size", ["heads", "width", "layers"])
def test_extreme_sizes_raise_a_named_error(family: str, size: str, value: int) -> None:
    """Zero, negative and huge sizes never fail inside a computation that uses them."""
    names = {"heads": ("n_head", "num_heads", "num_attention_heads"), "width": ("n_embd", "hidden_size")}
    names["layers"] = ("n_layer", "num_layers", "num_hidden_layers")
    key = next(name for name in names[size] if name in witness.TINY[family])
    if (size, value) == ("width", 7 * 3) or (size, value, family == "gpt_neo") == ("layers", 7, False):
        return
    with pytest.raises(GptConvertError):
        read(family, **{key: value})


@pytest.mark.parametrize("family", NAMES)
def test_missing_sizes_have_transformers_defaults(family: str) -> None:
    """An empty config.json reads as in transformers' configuration class."""
    import transformers

    kind = getattr(transformers, family_named(family).heads["text-generation"]).config_class()
    made, carried, _ = family_named(family).read_config("hf", {"model_type": TYPES[family]}, None, {}, Options())
    assert made.vocab_size == kind.vocab_size
    assert made.n_ctx == kind.max_position_embeddings
    assert (made.n_embd, made.n_layer, made.n_head) == (
        kind.hidden_size,
        kind.num_hidden_layers,
        kind.num_attention_heads,
    )
    assert (carried["bos_token_id"], carried["eos_token_id"]) == (kind.bos_token_id, kind.eos_token_id)
    assert made.tied_head == kind.tie_word_embeddings


@pytest.mark.parametrize("family", NAMES)
def test_an_invalid_number_is_rejected_with_its_key(family: str) -> None:
    key = "layer_norm_eps" if family == "gpt_neox" else "layer_norm_epsilon"
    for wrong in ("1e-5", math.nan, math.inf, None, True):
        with pytest.raises(InputError) as error:
            read(family, **{key: wrong})
        assert error.value.item == key


@pytest.mark.parametrize(
    ("family", "key", "names"),
    [
        ("gpt2", "activation_function", ("gelu_approx", "softsign")),
        ("gpt_neo", "activation_function", ("Mish",)),
        ("gptj", "activation_function", ("prelu",)),
        ("gpt_neox", "hidden_act", ("xielu",)),
        ("gpt1", "afn", ("gelu_new", "tanh", "mish")),
    ],
)
def test_activations_by_formula(family: str, key: str, names: tuple[str, ...]) -> None:
    """gelu_new is the tanh formula and gelu the erf formula; GPT-1's gelu is the tanh formula."""
    for name in names:
        with pytest.raises(UnsupportedError, match=name):
            read(family, **{key: name})
    assert config(family, **{key: "gelu"}).activation == ("gelu_tanh" if family == "gpt1" else "gelu_erf")
    if family != "gpt1":
        for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"):
            made, carried, _ = read(family, **{key: name})
            assert made.activation == "gelu_tanh"
            assert family_named(family).write_config(made, carried)[key] == name
            changed = dataclasses.replace(made, activation="relu")
            assert family_named(family).write_config(changed, carried)[key] == "relu"


# --- GPT-1 ---------------------------------------------------------------------------------------------------------


def test_gpt1_may_have_more_positions_than_the_training_length() -> None:
    """n_positions 513 beside n_ctx 512 occurs in derived models: the table has 513 rows."""
    assert config("gpt1", n_positions=513, n_ctx=512).n_ctx == 513
    assert config("gpt1", n_positions=..., n_ctx=64).n_ctx == 64
    assert config("gpt1", n_positions=...).n_ctx == 512


def test_gpt1_fixed_fields() -> None:
    made = config("gpt1")
    assert (made.norm_position, made.final_norm, made.tied_head, made.n_inner) == ("post", False, True, 96)
    assert written("gpt1", made)["afn"] == "gelu"


# --- GPT-Neo -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "layers", "expected"),
    [
        ([[["global", "local"], 2]], 4, (None, 5, None, 5)),
        ([[["local"], 3]], 3, (5, 5, 5)),
        ([[["global"], 1], [["local", "global"], 1]], 3, (None, 5, None)),
        ([[["global", "global", "local"], 1]], 3, (None, None, 5)),
    ],
)
def test_neo_attention_patterns(types: object, layers: int, expected: tuple[int | None, ...]) -> None:
    from transformers import GPTNeoConfig

    made = config("gpt_neo", attention_types=types, num_layers=layers)
    assert made.attn_window == expected
    assert made.attn_scale == (1.0,) * layers
    out = written("gpt_neo", made)
    expected = GPTNeoConfig(attention_types=types, num_layers=layers).attention_layers
    assert out["attention_layers"] == expected
    assert GPTNeoConfig.expand_attention_types_params(out["attention_types"]) == expected


@pytest.mark.parametrize(
    "types",
    [
        [[["global", "local"], 2]],
        [[["global", "sparse", "local"], 1]],
        [[["global"], 2.0]],
        [[["global"], -1]],
        [[["global", "local"], 1 << 40]],
        [["global", 3]],
        [[["global"]]],
        ["global"],
        "global",
        [],
        {},
        None,
        7,
    ],
    ids=repr,
)
def test_neo_invalid_patterns_are_rejected(types: object) -> None:
    """The model has three layers: any other length, kind or form is rejected, as is None, the released 24 layers."""
    with pytest.raises(InputError) as error:
        read("gpt_neo", attention_types=types)
    assert error.value.item == "attention_types" or types is None


def test_neo_layers_may_be_listed() -> None:
    kinds = ["local", "local", "global"]
    assert config("gpt_neo", attention_types=..., attention_layers=kinds).attn_window == (5, 5, None)
    assert config("gpt_neo", attention_layers=kinds).attn_window == (5, 5, None)
    assert config("gpt_neo", attention_layers=[*kinds, "local"]).attn_window == (5, 5, None)
    for wrong in (kinds[:2], "global", [["global"], ["local"], []]):
        with pytest.raises(InputError):
            read("gpt_neo", attention_types=..., attention_layers=wrong)


@pytest.mark.parametrize("window", [0, -5, 2.5, "256"])
def test_neo_invalid_windows_of_local_layers_are_rejected(window: object) -> None:
    with pytest.raises(InputError) as error:
        read("gpt_neo", window_size=window)
    assert error.value.item == "window_size"


# --- GPT-J ---------------------------------------------------------------------------------------------------------


def test_gptj_rotary_dim() -> None:
    assert config("gptj").rotary == Rotary(4, interleaved=True)
    for wrong in (0, 3, 10, -2):
        with pytest.raises(InputError):
            read("gptj", rotary_dim=wrong)


def test_gptj_rotary_dim_null_rotates_the_whole_head() -> None:
    """transformers 4 runs such a model with a single head only; 5 needs the number, which is written."""
    made = config("gptj", rotary_dim=None, n_head=1)
    assert made.rotary == Rotary(made.n_embd, interleaved=True)
    assert written("gptj", made)["rotary_dim"] == made.n_embd
    with pytest.raises(UnsupportedError, match="single head") as error:
        read("gptj", rotary_dim=None)
    assert error.value.item == "rotary_dim"
    with pytest.raises(InputError, match="must not be null"):
        read("codegen", rotary_dim=None)


def test_gptj_keys_without_effect() -> None:
    """The released config.json has both keys; no code reads them."""
    config("gptj", rotary=True, scale_attn_weights=True)
    for key in ("rotary", "scale_attn_weights"):
        with pytest.raises(UnsupportedError, match=key):
            read("gptj", **{key: False})


# --- CodeGen -------------------------------------------------------------------------------------------------------


def test_codegen_heads_come_in_four_groups() -> None:
    with pytest.raises(InputError, match="multiple of 4") as error:
        read("codegen", n_head=3)
    assert error.value.item == "n_head"


def test_codegen_reads_n_positions_and_not_n_ctx() -> None:
    assert config("codegen", n_positions=40, n_ctx=2048).n_ctx == 40


# --- GPT-NeoX ------------------------------------------------------------------------------------------------------


def rope(**inner: object) -> dict[str, object]:
    return {"rope_parameters": inner}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_parameters": ...}, Rotary(2, 10000.0)),
        ({"rope_parameters": None}, Rotary(2, 10000.0)),
        ({"rope_parameters": ..., "rotary_pct": 0.5, "rotary_emb_base": 500}, Rotary(4, 500.0)),
        ({"rope_parameters": ..., "partial_rotary_factor": 1.0, "rope_theta": 9.0}, Rotary(2, 10000.0)),
        (rope(rope_theta=1e6, partial_rotary_factor=0.99, rope_type="default"), Rotary(7, 1e6)),
        (rope(rope_theta=1e6, partial_rotary_factor=0.75, type="default"), Rotary(6, 1e6)),
        ({**rope(partial_rotary_factor=0.5), "rotary_pct": 0.5, "rotary_emb_base": 77}, Rotary(4, 77.0)),
        ({"rope_parameters": ..., "rope_scaling": None}, Rotary(2, 10000.0)),
    ],
    ids=repr,
)
def test_neox_rotary_keys_of_all_versions(keys: dict[str, object], expected: Rotary) -> None:
    assert config("gpt_neox", **keys).rotary == expected


def test_neox_rotary_parameters_win() -> None:
    """tests/families/test_precedence.py compares this with transformers."""
    for keys in ({"rotary_pct": 0.25}, {"rotary_emb_base": 10000}, {"rope_theta": 5.0}):
        made, _, notes = read("gpt_neox", **keys)
        assert made.rotary == Rotary(4, 1000.0)
        assert any(f"{next(iter(keys))} = " in note for note in notes)
    with pytest.raises(InputError):
        read("gpt_neox", rope_parameters=[1])


def test_neox_rotary_shares_round_trip() -> None:
    """The share is written as a fraction and truncated on reading; rounding must not change the width."""
    for head, dim in ((n, dim) for n in range(2, 200) for dim in range(n + 1 - n % 2)):
        made = GPTConfig(
            family="gpt_neox",
            vocab_size=9,
            n_ctx=8,
            n_embd=head,
            n_layer=1,
            n_head=1,
            n_inner=5,
            attn_scale=(1.0,),
            attn_window=(None,),
            rotary=Rotary(dim, 321.0),
        )
        out = written("gpt_neox", made)
        inner: Any = out["rope_parameters"]
        assert int(head * inner["partial_rotary_factor"]) == dim
        assert inner["rope_theta"] == out["rotary_emb_base"] == 321.0


def test_neox_residuals_and_biases() -> None:
    assert config("gpt_neox").residual == "parallel"
    assert config("gpt_neox", use_parallel_residual=False).residual == "serial"
    bare = config("gpt_neox", attention_bias=False)
    assert (bare.qkv_bias, bare.attn_out_bias) == (False, False)
    with pytest.raises(InputError) as error:
        read("gpt_neox", use_parallel_residual="yes")
    assert error.value.item == "use_parallel_residual"


# --- OpenAI's arrays -----------------------------------------------------------------------------------------------


def arrays(width: int = 64, **extra: tuple[int, ...]) -> dict[str, LazyTensor]:
    shapes = {
        "positions_embed": (8, width),
        "tokens_embed": (9, width),
        "h0/ln_1/g": (width,),
        "h11/ln_1/g": (width,),
    }
    return tensors(**{**shapes, **extra})


def gpt1_sizes(found: dict[str, LazyTensor], request: Options | None = None, **raw: object) -> Any:
    return family_named("gpt1").read_config("openai-gpt1", raw, None, found, request or Options())


def test_gpt1_sizes_come_from_the_shapes() -> None:
    made, _, notes = gpt1_sizes(arrays(128))
    assert (made.vocab_size, made.n_ctx, made.n_embd, made.n_layer, made.n_head) == (9, 8, 128, 12, 2)
    assert any("n_head = 2" in note for note in notes)
    made, _, notes = gpt1_sizes(arrays(128), Options(n_head=4))
    assert made.n_head == 4
    assert any("n_head = 4 (--n-head)" in note for note in notes)
    assert gpt1_sizes(arrays(24), n_head=3)[0].n_head == 3


def test_gpt1_requires_n_head_if_64_does_not_divide_the_width() -> None:
    with pytest.raises(UsageError, match="number of heads") as error:
        gpt1_sizes(arrays(24))
    assert "--n-head" in (error.value.hint or "")
    for wrong in (0, -1, 5):
        with pytest.raises(UsageError, match="--n-head"):
            gpt1_sizes(arrays(24), Options(n_head=wrong))


def test_gpt1_without_its_embedding_tables() -> None:
    with pytest.raises(InputError, match="tables"):
        gpt1_sizes({})
    with pytest.raises(InputError, match="tables"):
        gpt1_sizes(arrays(tokens_embed=(3,)))
    with pytest.raises(UnsupportedError, match="n_special"):
        gpt1_sizes(arrays(), n_special_rows=3)


def test_gpt1_arrays_have_no_classification_head() -> None:
    assert gpt1_sizes(arrays(), Options(task="feature-extraction"))[0].task == "feature-extraction"
    with pytest.raises(UnsupportedError, match="no head for text-classification"):
        gpt1_sizes(arrays(), Options(task="text-classification"))


def test_families_import_no_heavy_package(tmp_path: Path) -> None:
    """``inspect`` must start fast."""
    import subprocess
    import sys

    heavy = "torch, tensorflow, onnx, onnxruntime, transformers"
    code = f"import sys, gptconvert.families; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
