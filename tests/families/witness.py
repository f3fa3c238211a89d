"""Tiny models of every family, built, saved and run by transformers: an independent witness.

transformers computes parts of three families in float32 regardless of the weights' type; :func:`in_float64` makes it
use float64 throughout, so that the reference model can be compared with it to the last digits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gptconvert.families.family import Family
from gptconvert.families.registry import FAMILIES, family_named
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from tests.helpers import Arrays, checkpoint_of, torch_weights

#: Sizes under config.json's keys: no two axes of a weight are equal, the number of heads is odd, n_inner is not 4 D.
_GPT = {"vocab_size": 97, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}
_NEO = {
    "vocab_size": 97,
    "max_position_embeddings": 40,
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 3,
    "intermediate_size": 56,
    "attention_types": [[["global", "local", "local"], 1]],
    "window_size": 5,
}
_NEOX = {
    "vocab_size": 97,
    "max_position_embeddings": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 56,
    "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
}
TINY: Mapping[str, Mapping[str, object]] = {
    "gpt1": _GPT,
    "gpt2": {**_GPT, "n_inner": 56},
    "gpt_neo": _NEO,
    "gptj": {**_GPT, "n_inner": 56, "rotary_dim": 4},
    "gpt_neox": _NEOX,
    "codegen": {**_GPT, "n_head": 4, "n_inner": 56, "rotary_dim": 4},
}
#: The padding token's id, and the number of labels.
PAD, LABELS = 95, 5


@dataclass(frozen=True)
class Case:
    """A family, one of its tasks, and configuration keys that override :data:`TINY`."""

    family: str
    task: str = "text-generation"
    keys: Mapping[str, object] = field(default_factory=dict, hash=False)
    name: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.family, self.task, self.name) if part)


def rope(theta: float, share: float, kind: str = "default", **scaling: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": theta, "partial_rotary_factor": share, "rope_type": kind, **scaling}}


#: Every family with each of its heads.
BY_TASK = tuple(Case(family.name, task) for family in FAMILIES for task in family.heads)
#: Configuration variants per family.
VARIANTS = tuple(
    Case(family, keys=keys, name=name)
    for family, name, keys in (
        ("gpt1", "relu", {"afn": "relu"}),
        ("gpt1", "silu", {"afn": "silu"}),
        ("gpt2", "untied", {"tie_word_embeddings": False}),
        ("gpt2", "unscaled", {"scale_attn_weights": False}),
        ("gpt2", "scaled-by-layer", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", "upcast", {"reorder_and_upcast_attn": True}),
        ("gpt2", "erf", {"activation_function": "gelu", "n_inner": None}),
        ("gpt_neo", "all-local", {"attention_types": [[["local"], 3]], "window_size": 2}),
        ("gpt_neo", "mixed", {"attention_types": [[["local"], 1], [["global", "local"], 1]]}),
        ("gpt_neo", "untied", {"tie_word_embeddings": False, "intermediate_size": None}),
        ("gptj", "whole-head", {"rotary_dim": 8}),
        ("gptj", "tied", {"tie_word_embeddings": True, "n_inner": None}),
        ("codegen", "eight-heads", {"n_embd": 40, "n_head": 8, "rotary_dim": 2}),
        ("codegen", "tied", {"tie_word_embeddings": True}),
        ("gpt_neox", "serial", {"use_parallel_residual": False}),
        ("gpt_neox", "tied", {"tie_word_embeddings": True}),
        ("gpt_neox", "no-bias", {"attention_bias": False}),
        ("gpt_neox", "tanh", {"hidden_act": "gelu_fast"}),
        ("gpt2", "quick-gelu", {"activation_function": "quick_gelu"}),
        ("gpt_neo", "mish", {"activation_function": "mish"}),
        ("gpt_neox", "linear", {"hidden_act": "linear"}),
        ("gpt_neox", "eps", {"layer_norm_eps": 1e-2}),
        ("gpt_neox", "24-of-96", {"hidden_size": 192, "num_attention_heads": 2, **rope(10000.0, 0.25)}),
        ("gpt_neox", "20-of-80", {"hidden_size": 160, "num_attention_heads": 2, **rope(10000.0, 0.25)}),
        ("gpt_neox", "whole-head", rope(1000.0, 1.0)),
        ("gpt_neox", "odd", rope(1000.0, 0.375)),
        ("gpt_neox", "no-positions", rope(1000.0, 0.0)),
        ("gpt_neox", "linear-scaling", rope(1000.0, 0.5, "linear", factor=4.0)),
        ("gpt_neox", "yarn", rope(40.0, 1.0, "yarn", factor=4.0, original_max_position_embeddings=10)),
    )
)
CASES = (*BY_TASK, *VARIANTS)


def module(family: Family) -> Any:
    """The module in which transformers defines a family's models."""
    import transformers

    return sys.modules[getattr(transformers, family.heads["text-generation"]).__module__]


@contextmanager
def in_float64() -> Iterator[None]:
    """Make transformers' modules use float64 instead of float32. Does not nest."""
    import torch

    class Wide:
        float32 = float = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    from transformers import modeling_rope_utils

    modules = [modeling_rope_utils, *(module(family) for family in FAMILIES)]
    to_float, default = torch.Tensor.float, torch.get_default_dtype()
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    for changed in modules:
        changed.torch = Wide()
    try:
        with torch.no_grad():
            yield
    finally:
        for changed in modules:
            changed.torch = torch
        torch.set_default_dtype(default)
        torch.Tensor.float = to_float  # type: ignore[method-assign]


def hf_config(case: Case) -> Any:
    """The transformers configuration of a case."""
    import transformers

    family = family_named(case.family)
    kind = getattr(transformers, family.heads[case.task]).config_class
    labels = {"num_labels": LABELS} if case.task in ("text-classification", "token-classification") else {}
    keys: dict[str, Any] = {**TINY[case.family], **labels, **case.keys}
    return kind(**keys, pad_token_id=PAD, bos_token_id=96, eos_token_id=96, attn_implementation="eager")


def hf_model(case: Case, seed: int = 0) -> Any:
    """The transformers model of a case, in torch's default dtype, with random weights exact in float32."""
    return _with_weights(family_named(case.family).heads[case.task], hf_config(case), seed)


def hf_model_of(family: str, raw: Mapping[str, object]) -> Any:
    """The transformers language model of a config.json, with random weights."""
    import transformers

    name = family_named(family).heads["text-generation"]
    config = getattr(transformers, name).config_class.from_dict(deepcopy(raw), attn_implementation="eager")
    return _with_weights(name, config, 0)


def _with_weights(name: str, config: Any, seed: int) -> Any:
    import torch
    import transformers

    torch.set_num_threads(1)  # for models this small, threads only wait for each other
    transformers.utils.logging.disable_progress_bar()

    model = getattr(transformers, name)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator, dtype=torch.float32) * 0.2
        is_norm = weight.ndim == 1 and name.endswith("weight")
        weight.data = (values + 1 if is_norm else values).to(weight.dtype)
    return model


@cache
def witness(case: Case, seed: int = 0) -> Any:
    """The transformers model of a case, in float64 throughout."""
    with in_float64():
        return hf_model(case, seed)


@cache
def saved(case: Case, directory: Path) -> tuple[dict[str, object], Arrays]:
    """config.json and the tensors of a case, as ``save_pretrained`` writes them."""
    from safetensors.numpy import load_file

    path = directory / str(case)
    hf_model(case).save_pretrained(path)
    raw: dict[str, object] = json.loads((path / "config.json").read_text())
    return raw, load_file(path / "model.safetensors")


def checkpoint(case: Case, directory: Path, request: Options | None = None) -> Checkpoint:
    """The checkpoint that this project reads from a case's saved model."""
    raw, arrays = saved(case, directory)
    where = directory / f"{case}.read"
    where.mkdir(exist_ok=True)
    return checkpoint_of(raw, arrays, where, request=request)


def reference(understood: Checkpoint, dtype: Any = None) -> Any:
    """The reference model of a checkpoint, in ``dtype`` or float64."""
    from reference_model.model import GPT

    return GPT.from_weights(understood.config, torch_weights(understood, dtype))


#: Masks of the test batch, one case per row: no padding, left padding, right padding, holes. [4, 17]
MASK = np.array(
    [
        [1] * 17,
        [0] * 4 + [1] * 13,
        [1] * 12 + [0] * 5,
        [1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1],
    ],
    np.int64,
)


def batch(seed: int = 0, mask: Any = MASK) -> dict[str, Any]:
    """Token ids (padding where the mask is 0), the mask, and positions that count real tokens; [4, 17] each."""
    random = np.random.default_rng(seed)
    ids = np.where(mask == 1, random.integers(0, PAD, mask.shape), PAD)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clip(0)}


def choices(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch reshaped to two questions of two choices each, with the index of each choice's last real token."""
    mask = inputs["attention_mask"]
    shaped = {name: value.reshape(2, 2, -1) for name, value in inputs.items()}
    last = (np.arange(mask.shape[1]) * mask).argmax(1).reshape(2, 2)
    return {**shaped, "mc_token_ids": last}


def inputs_of(task: str, seed: int = 0) -> dict[str, Any]:
    """Inputs for a task, by name, as people pass them to transformers: ``position_ids`` only to a language model."""
    inputs = batch(seed)
    if task != "text-generation":
        del inputs["position_ids"]
    return choices(inputs) if task == "multiple-choice" else inputs


def tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as torch tensors."""
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}


def hf_outputs(case: Case, inputs: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
    """transformers' outputs by name, as float64 arrays, with ``present.{i}.key`` and ``.value`` if it caches them."""
    import torch

    named = tensors(inputs)
    for name in ("attention_mask", "position_ids"):
        if name in named:
            named[name] = named[name].flatten(0, -2)
    model = model or witness(case)  # build the model before entering in_float64, which does not nest
    caches = case.family != "gpt1" and case.task in ("text-generation", "feature-extraction")
    with in_float64():
        found = model(**named, **({"use_cache": True} if caches else {}))
    outputs = {name: v.numpy() for name, v in found.items() if isinstance(v, torch.Tensor)}
    if caches:
        for i, layer in enumerate(found.past_key_values.layers):
            outputs |= {f"present.{i}.key": layer.keys.numpy(), f"present.{i}.value": layer.values.numpy()}
    return outputs


def our_outputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The reference model's outputs under the same names."""
    import torch

    with torch.no_grad():
        found, presents = model.outputs(**tensors(inputs))
    outputs = {name: value.numpy() for name, value in found.items()}
    for i, (key, value) in enumerate(presents):
        outputs |= {f"present.{i}.key": key.numpy(), f"present.{i}.value": value.numpy()}
    return outputs


def gap(found: Mapping[str, Any], expected: Mapping[str, Any], mask: Any) -> float:
    """The largest difference at real tokens over all ``expected`` outputs, relative to the output's largest value.

    Outputs of padded queries are undefined, and implementations differ there.
    """
    worst = 0.0
    for name, value in expected.items():
        assert found[name].shape == value.shape, (name, found[name].shape, value.shape)
        real = real_tokens(name, value, mask)
        difference = np.abs(found[name] - value)[real].max() / np.abs(value[real]).max()
        worst = max(worst, np.inf if np.isnan(difference) else difference)
    return float(worst)


def real_tokens(name: str, value: Any, mask: Any) -> Any:
    """Index of the elements of an output that belong to real tokens."""
    if name.startswith("present."):
        return np.broadcast_to(mask.reshape(len(value), 1, -1, 1) == 1, value.shape)
    if value.shape[: mask.ndim] == mask.shape:
        return mask == 1
    return ...
