"""Configuration tables: how a key is read, rejected, carried over and written."""

from __future__ import annotations

from typing import Any

import pytest

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.config_kinds import (
    ANY,
    FLAG,
    NUMBER,
    OPTIONAL_WHOLE,
    POSITIVE,
    SIZE,
    TEXT,
    TOKEN,
    TOKENS,
    WHOLE,
    Kind,
    choice,
    flag,
)
from gptconvert.model.config_table import ConfigTable, Key
from reference_model.config import GPTConfig

SIZES = {"vocab": 9, "ctx": 7, "width": 6, "depth": 2, "heads": 3}
TABLE = ConfigTable(
    keys=(
        Key("vocab", "vocab_size", WHOLE),
        Key("ctx", "n_ctx", WHOLE, 5, aliases=("positions",)),
        Key("width", "n_embd", WHOLE, aliases=("hidden",), repeats=("d_model",)),
        Key("depth", "n_layer", WHOLE),
        Key("heads", "n_head", WHOLE, lambda v: v["n_embd"] // 2),
        Key("inner", "n_inner", SIZE, None, of=lambda c: None if c.n_inner == 4 * c.n_embd else c.n_inner),
        Key("act", "activation", choice({"gelu": "gelu_erf", "gelu_py": "gelu_erf", "relu": "relu"}), "gelu"),
        Key("norm.eps", "norm_eps", NUMBER, 1e-5, aliases=("eps",)),
        Key("norm.kind", None, choice({"layer": None}), "layer", of=lambda c: None),
        Key("untied", "tied_head", flag(False, True), False),
        Key("twice", "twice", FLAG, False),
    ),
    harmless={"seed", "rate"},
    unused={"moe": False, "lora": None},
    writes={"rate": 0.1, "moe": False},
    derived={"attn_scale": lambda v: (2.0 if v["twice"] else 1.0,) * v["n_layer"]},
)


def config(**keys: object) -> GPTConfig:
    return TABLE.read({**SIZES, **keys}, "file").config(family="gpt2")


def rejected(kind: type[InputError | UnsupportedError], **keys: object) -> Any:
    raw = {key: value for key, value in {**SIZES, **keys}.items() if value is not ...}
    with pytest.raises(kind) as error:
        TABLE.read(raw, "file").config(family="gpt2")
    assert type(error.value) is kind
    assert error.value.path == "file"
    return error.value


def test_defaults_aliases_and_derived_fields() -> None:
    made = config()
    assert (made.n_ctx, made.n_inner, made.activation, made.attn_scale) == (7, 24, "gelu_erf", (1.0, 1.0))
    assert TABLE.read({**SIZES, "heads": 1}, None).config(family="gpt2", n_head=2).n_head == 2
    short = {key: value for key, value in SIZES.items() if key not in ("ctx", "heads", "width")}
    made = TABLE.read({**short, "hidden": 6}, None).config(family="gpt2")
    assert (made.n_embd, made.n_ctx, made.n_head) == (6, 5, 3)
    made = TABLE.read({**short, "hidden": 6}, None, defaults={"n_ctx": 8}).config(family="gpt2")
    assert made.n_ctx == 8
    assert config(twice=True).attn_scale == (2.0, 2.0)


def test_keys_of_nested_objects() -> None:
    assert (
        config(norm={"eps": 0.5}).norm_eps == config(eps=0.5).norm_eps == config(norm={"eps": 0.5}, eps=0.5).norm_eps
    )
    assert config(norm=None) == config(norm={}) == config()
    assert "disagree: norm.eps = 0.5, eps = 0.25" in rejected(InputError, norm={"eps": 0.5}, eps=0.25).message
    assert rejected(InputError, norm=[]).item == "norm"
    assert "norm.power = 3" in rejected(UnsupportedError, norm={"power": 3}).message
    assert rejected(UnsupportedError, norm={"kind": "rms"}).item == "norm.kind"


def test_names_of_one_key_must_agree() -> None:
    assert config(positions=7).n_ctx == 7
    assert "ctx = 7, positions = 8" in rejected(InputError, positions=8).message
    assert "width = 6, d_model = 7" in rejected(InputError, d_model=7).message


def test_errors_use_the_key_name_in_the_file() -> None:
    assert rejected(InputError, width=..., hidden="6").item == "hidden"
    assert rejected(InputError, width=...).item == "width"
    assert rejected(InputError, width=None).message == "the value must not be null"
    assert rejected(InputError, heads=None).item == "heads"
    assert rejected(InputError, heads=4).item == "n_head"


def test_all_unknown_keys_are_listed() -> None:
    error = rejected(UnsupportedError, cap=30, moe=True, lora={"r": 8}, seed=1)
    assert error.message == "configuration keys not implemented: cap = 30, moe = True, lora = {'r': 8}"
    assert config(moe=False, lora=None) == config(moe=0, lora={}) == config()


def test_only_harmless_keys_are_carried_over() -> None:
    assert TABLE.read({**SIZES, "seed": 3, "moe": False}, None).carried == {"seed": 3}


def test_writing() -> None:
    made = config(inner=10, norm={"eps": 0.5}, untied=True, act="gelu_py")
    assert TABLE.write(made, {"seed": 3}) == {
        **SIZES,
        "d_model": 6,
        "inner": 10,
        "act": "gelu",
        "norm": {"eps": 0.5, "kind": "layer"},
        "untied": True,
        "seed": 3,
        "rate": 0.1,
        "moe": False,
    }
    assert TABLE.write(made, {"rate": 0.5})["rate"] == 0.5
    assert TABLE.write(config(), {})["inner"] is None


@pytest.mark.parametrize(
    ("kind", "accepted", "wrong"),
    [
        (WHOLE, {3: 3, 0: 0, -1: -1}, (True, 3.0, "3", [3])),
        (POSITIVE, {1: 1}, (0, -1, True, 2.5)),
        (OPTIONAL_WHOLE, {0: 0, 3: 3}, (True, [3])),
        (SIZE, {0: None, 3: 3}, (True, [3], "")),
        (TOKEN, {0: 0, 3: 3}, (True, [], ["3"], 1.0)),
        (NUMBER, {3: 3.0, 0.5: 0.5}, (True, "1e-5", float("nan"), float("inf"))),
        (FLAG, {True: True, False: False}, (1, "yes", 0)),
        (flag("parallel", "serial"), {True: "parallel", False: "serial"}, (1, "parallel")),
        (TEXT, {"a": "a"}, (1, ["a"])),
        (ANY, {"a": "a", 1: 1}, ()),
    ],
)
def test_kinds(kind: Kind, accepted: dict[Any, object], wrong: tuple[object, ...]) -> None:
    for value, expected in accepted.items():
        found = kind.read("key", value)
        assert (found, type(found)) == (expected, type(expected))
        assert kind.write(found) == (expected if kind is SIZE else value)
    for value in wrong:
        with pytest.raises(InputError) as error:
            kind.read("key", value)
        assert error.value.item == "key"


def test_the_first_of_several_tokens_is_used() -> None:
    assert TOKEN.read("key", [4, 5]) == 4


@pytest.mark.parametrize(
    ("value", "ids", "written"), [(4, (4,), 4), ([4, 5], (4, 5), [4, 5]), ([4], (4,), 4), ([], (), None)]
)
def test_end_tokens(value: object, ids: tuple[int, ...], written: object) -> None:
    assert TOKENS.read("key", value) == ids
    assert TOKENS.write(ids) == written
    assert TOKENS.write(None) is None
    for wrong in (True, "3", [3, None], [[3]], 1.5):
        with pytest.raises(InputError):
            TOKENS.read("key", wrong)


def test_the_first_word_of_a_choice_is_written() -> None:
    kind = choice({"a": 1, "b": 2, "c": 1})
    assert [kind.write(kind.read("key", word)) for word in "abc"] == ["a", "b", "a"]
    with pytest.raises(UnsupportedError, match="'d' is not implemented") as error:
        kind.read("key", "d")
    assert error.value.expected == "one of a, b, c"


def test_many_unknown_keys_are_listed_in_part_and_quoted_for_the_shell() -> None:
    error = rejected(UnsupportedError, **{"; ls": 1}, **{f"unknown_{i}": i for i in range(20_000)})
    assert "'; ls'" in str(error.hint)
    assert len(str(error)) < 4000
    assert "and 19951 more" in str(error)
