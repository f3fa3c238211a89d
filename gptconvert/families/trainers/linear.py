"""Shapes and options shared by trainers that build GPT-2 from ``torch.nn.Linear``, [out, in]."""

from __future__ import annotations

from collections.abc import Mapping

#: Canonical tensor → its shape, the same in nanoGPT, llm.c and Megatron-LM.
SHAPES: Mapping[str, str] = {
    "wte.weight": "V D",
    "wpe.weight": "C D",
    "h.{i}.ln_1.weight": "D",
    "h.{i}.ln_1.bias": "D",
    "h.{i}.attn.c_attn.weight": "3D D",
    "h.{i}.attn.c_attn.bias": "3D",
    "h.{i}.attn.c_proj.weight": "D D",
    "h.{i}.attn.c_proj.bias": "D",
    "h.{i}.ln_2.weight": "D",
    "h.{i}.ln_2.bias": "D",
    "h.{i}.mlp.c_fc.weight": "F D",
    "h.{i}.mlp.c_fc.bias": "F",
    "h.{i}.mlp.c_proj.weight": "D F",
    "h.{i}.mlp.c_proj.bias": "D",
    "ln_f.weight": "D",
    "ln_f.bias": "D",
}
#: ``--activation`` → formula.
GELUS: Mapping[str, str] = {"tanh": "gelu_tanh", "erf": "gelu_erf"}
