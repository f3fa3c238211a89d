"""One planted bug per rule in which the families differ. Every implementation of the rule must expose its bug.

A bug turns a correctly understood checkpoint into a wrong one. The tests run the result through the reference model
and through every graph, and compare with transformers running the correct model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import Box, Computed, LazyTensor
from reference_model.config import GPTConfig
from tests.families.witness import Case


@dataclass(frozen=True)
class Bug:
    """A case and the change that misinterprets it."""

    name: str
    case: Case
    plant: Callable[[Checkpoint], Checkpoint]

    def __str__(self) -> str:
        return f"{self.case}-{self.name}"


def _config(change: Callable[[GPTConfig], dict[str, Any]]) -> Callable[[Checkpoint], Checkpoint]:
    def plant(checkpoint: Checkpoint) -> Checkpoint:
        config = dataclasses.replace(checkpoint.config, **change(checkpoint.config))
        return dataclasses.replace(checkpoint, config=config)

    return plant


def _windows(change: Callable[[int], int | None]) -> Callable[[Checkpoint], Checkpoint]:
    return _config(lambda c: {"attn_window": tuple(None if w is None else change(w) for w in c.attn_window)})


def _rotary(**changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    return _config(lambda c: {"rotary": dataclasses.replace(c.rotary, **changes)})


def _weight(name: str, change: Callable[[Any], Any]) -> Callable[[Checkpoint], Checkpoint]:
    """Change the weight ``name`` in every layer that has it."""

    def plant(checkpoint: Checkpoint) -> Checkpoint:
        wrong = {n: _lazy(change(w.read())) if n.endswith(name) else w for n, w in checkpoint.weights.items()}
        assert any(n.endswith(name) for n in wrong), name
        return dataclasses.replace(checkpoint, weights=wrong)

    return plant


def _lazy(array: Any) -> LazyTensor:
    array = np.ascontiguousarray(array)

    def read(box: Box) -> Any:
        return array[box]

    return Computed(read, array.dtype, array.shape)


def blocks(order: Sequence[int]) -> Callable[[Any], Any]:
    """Reorder q, k and v."""
    return lambda fused: np.concatenate([np.split(fused, 3)[i] for i in order])


def by_head(fused: Any) -> Any:
    """Interpret three blocks q|k|v as one triple per head."""
    return fused.reshape(3, 3, -1, *fused.shape[1:]).swapaxes(0, 1).reshape(fused.shape)


def grouped(fused: Any) -> Any:
    """Treat three blocks q|k|v as four groups of triples."""
    return fused.reshape(4, 3, -1, *fused.shape[1:]).swapaxes(0, 1).reshape(fused.shape)


C_ATTN, C_PROJ = "attn.c_attn.weight", "attn.c_proj.weight"
BUGS = tuple(
    Bug(name, case if isinstance(case, Case) else Case(case), plant)
    for name, case, plant in (
        ("norm-first", "gpt1", _config(lambda c: {"norm_position": "pre"})),
        ("erf", "gpt1", _config(lambda c: {"activation": "gelu_erf"})),
        ("unscaled", "gpt1", _config(lambda c: {"attn_scale": (1.0,) * c.n_layer})),
        ("square-transposed", "gpt1", _weight(C_PROJ, np.transpose)),
        ("norms-swapped", "gpt1", _weight("ln_2.weight", lambda w: w[::-1])),
        ("erf", "gpt2", _config(lambda c: {"activation": "gelu_erf"})),
        ("eps", "gpt2", _config(lambda c: {"norm_eps": 1e-6})),
        (
            "scale-not-by-layer",
            Case("gpt2", keys={"scale_attn_by_inverse_layer_idx": True}, name="scaled-by-layer"),
            _config(lambda c: {"attn_scale": c.attn_scale[:1] * c.n_layer}),
        ),
        ("scaled", "gpt_neo", _config(lambda c: {"attn_scale": (c.head_dim**-0.5,) * c.n_layer})),
        ("window-one-more", "gpt_neo", _windows(lambda w: w + 1)),
        ("window-one-less", "gpt_neo", _windows(lambda w: w - 1)),
        ("no-window", "gpt_neo", _windows(lambda w: None)),
        ("layers-swapped", "gpt_neo", _config(lambda c: {"attn_window": c.attn_window[::-1]})),
        ("q-k-swapped", "gpt_neo", _weight(C_ATTN, blocks((1, 0, 2)))),
        ("k-v-swapped", "gpt_neo", _weight(C_ATTN, blocks((0, 2, 1)))),
        ("output-bias-dropped", "gpt_neo", _weight("attn.c_proj.bias", np.zeros_like)),
        ("half-split", "gptj", _rotary(interleaved=False)),
        ("whole-head-rotated", "gptj", _rotary(dim=8)),
        ("k-v-swapped", "gptj", _weight(C_ATTN, blocks((0, 2, 1)))),
        ("head-bias-dropped", "gptj", _weight("lm_head.bias", np.zeros_like)),
        ("k-v-swapped", "codegen", _weight(C_ATTN, blocks((0, 2, 1)))),
        ("groups-kept", "codegen", _weight(C_ATTN, grouped)),
        ("half-split", "codegen", _rotary(interleaved=False)),
        ("tied", "gptj", _config(lambda c: {"tied_head": True})),
        ("interleaved", "gpt_neox", _rotary(interleaved=True)),
        ("base", "gpt_neox", _rotary(base=10000.0)),
        ("whole-head-rotated", "gpt_neox", _rotary(dim=8)),
        ("serial", "gpt_neox", _config(lambda c: {"residual": "serial"})),
        (
            "parallel",
            Case("gpt_neox", keys={"use_parallel_residual": False}, name="serial"),
            _config(lambda c: {"residual": "parallel"}),
        ),
        ("tanh", "gpt_neox", _config(lambda c: {"activation": "gelu_tanh"})),
        ("not-deinterleaved", "gpt_neox", _weight(C_ATTN, by_head)),
        ("bias-not-deinterleaved", "gpt_neox", _weight("attn.c_attn.bias", by_head)),
        ("no-padding-token", Case("gpt2", "text-classification"), _config(lambda c: {"pad_token_id": None})),
        ("another-padding", Case("gpt_neox", "text-classification"), _config(lambda c: {"pad_token_id": 3})),
        ("start-end-swapped", Case("gptj", "question-answering"), _weight("qa_outputs.weight", lambda w: w[::-1])),
        (
            "labels-shifted",
            Case("gpt_neo", "token-classification"),
            _weight("classifier.bias", lambda w: np.roll(w, 1)),
        ),
        ("choice-bias-dropped", Case("gpt1", "multiple-choice"), _weight("mc_head.bias", np.zeros_like)),
    )
)
