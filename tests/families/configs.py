"""Random configurations of every family, for property tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from gptconvert.families.family import Family
from gptconvert.families.heads import FIXED_LABELS
from gptconvert.families.registry import FAMILIES, family_named
from reference_model.config import ACTIVATIONS, LABELLED_TASKS, GPTConfig, Rotary

TOKENS = st.none() | st.integers(0, 98)
Draw = Callable[[st.SearchStrategy[Any]], Any]


def _gpt1(draw: Draw, sizes: Mapping[str, int]) -> dict[str, object]:
    return {"n_inner": 4 * sizes["n_embd"], "activation": draw(st.sampled_from(["gelu_tanh", "relu", "silu"]))}


def _gpt2(draw: Draw, sizes: Mapping[str, int]) -> dict[str, object]:
    scale = draw(st.sampled_from([1.0, _usual(sizes)]))
    by_layer = draw(st.booleans())
    return {"attn_scale": tuple(scale / (i + 1) if by_layer else scale for i in range(sizes["n_layer"]))}


def _gpt_neo(draw: Draw, sizes: Mapping[str, int]) -> dict[str, object]:
    layers = sizes["n_layer"]
    local, window = draw(st.lists(st.booleans(), min_size=layers, max_size=layers)), draw(st.integers(1, 300))
    return {"attn_scale": (1.0,) * layers, "attn_window": tuple(window if here else None for here in local)}


def _gptj(draw: Draw, sizes: Mapping[str, int]) -> dict[str, object]:
    return {"rotary": Rotary(_rotated(draw, sizes), interleaved=True)}


def _codegen(draw: Draw, sizes: Mapping[str, int]) -> dict[str, object]:
    return {**_gptj(draw, sizes), "n_embd": 4 * sizes["n_embd"], "n_head": 4 * sizes["n_head"]}


def _gpt_neox(draw: Draw, sizes: Mapping[str, int]) -> dict[str, object]:
    bias, width = draw(st.booleans()), sizes["n_embd"] // sizes["n_head"]
    return {
        "rotary": Rotary(draw(st.integers(0, width - width % 2)), base=draw(st.floats(1.0, 1e8))),
        "residual": draw(st.sampled_from(["serial", "parallel"])),
        "qkv_bias": bias,
        "attn_out_bias": bias,
    }


#: Fields that vary within a family, besides sizes, activation, tokens, head and task.
VARIED: Mapping[str, Callable[[Draw, Mapping[str, int]], dict[str, object]]] = {
    "gpt1": _gpt1,
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
    "codegen": _codegen,
}


def _usual(sizes: Mapping[str, int]) -> float:
    return float((sizes["n_embd"] // sizes["n_head"]) ** -0.5)


def _rotated(draw: Draw, sizes: Mapping[str, int]) -> int:
    return 2 * int(draw(st.integers(1, sizes["n_embd"] // sizes["n_head"] // 2)))


@st.composite
def configs(draw: Draw, name: str, tasks: bool = True) -> GPTConfig:
    """A small configuration of the family ``name``; ``tasks``: draw from all tasks of the family."""
    family: Family = family_named(name)
    heads, width = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    sizes = {"n_embd": heads * width, "n_head": heads, "n_layer": draw(st.integers(1, 6))}
    task = draw(st.sampled_from(sorted(family.heads))) if tasks else "text-generation"
    labels = draw(st.integers(1, 7)) if task in LABELLED_TASKS else FIXED_LABELS.get(task, 0)
    usual: dict[str, Any] = {
        "n_inner": draw(st.integers(1, 60) | st.just(4 * sizes["n_embd"])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "attn_scale": (_usual(sizes),) * sizes["n_layer"],
        "attn_window": (None,) * sizes["n_layer"],
    }
    return GPTConfig(
        **{
            "family": name,
            **sizes,
            **usual,
            "vocab_size": draw(st.integers(1, 99)),
            "n_ctx": draw(st.integers(1, 99)),
            "norm_eps": draw(st.floats(1e-9, 0.9)),
            "tied_head": draw(st.booleans()),
            "task": task,
            "n_labels": labels,
            "pad_token_id": draw(TOKENS),
            **family.fixed,
            **VARIED[name](draw, sizes),
        }
    )


def any_config(tasks: bool = True) -> st.SearchStrategy[GPTConfig]:
    """A configuration of any family."""
    return st.sampled_from([family.name for family in FAMILIES]).flatmap(lambda name: configs(name, tasks))
