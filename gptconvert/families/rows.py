"""Rows shared by the name tables of several families."""

from __future__ import annotations

from gptconvert.model.schemes import Row
from gptconvert.model.transforms import DropLeadingAxis, Transpose

CONV1D = (Transpose(),)
#: OpenAI's linear layers: convolutions of width 1, [1, in, out].
CONV_TF = (DropLeadingAxis(), *CONV1D)
#: A block of GPT-1 or GPT-2 in Hugging Face's files, whose Conv1D weights are [in, out].
CONV1D_BLOCK = (
    Row("h.{i}.ln_1.weight", "h.{i}.ln_1.weight", "D"),
    Row("h.{i}.ln_1.bias", "h.{i}.ln_1.bias", "D"),
    Row("h.{i}.attn.c_attn.weight", "h.{i}.attn.c_attn.weight", "D 3D", CONV1D),
    Row("h.{i}.attn.c_attn.bias", "h.{i}.attn.c_attn.bias", "3D"),
    Row("h.{i}.attn.c_proj.weight", "h.{i}.attn.c_proj.weight", "D D", CONV1D),
    Row("h.{i}.attn.c_proj.bias", "h.{i}.attn.c_proj.bias", "D"),
    Row("h.{i}.ln_2.weight", "h.{i}.ln_2.weight", "D"),
    Row("h.{i}.ln_2.bias", "h.{i}.ln_2.bias", "D"),
    Row("h.{i}.mlp.c_fc.weight", "h.{i}.mlp.c_fc.weight", "D F", CONV1D),
    Row("h.{i}.mlp.c_fc.bias", "h.{i}.mlp.c_fc.bias", "F"),
    Row("h.{i}.mlp.c_proj.weight", "h.{i}.mlp.c_proj.weight", "F D", CONV1D),
    Row("h.{i}.mlp.c_proj.bias", "h.{i}.mlp.c_proj.bias", "D"),
)
#: The norm after the last block.
FINAL_NORM = (Row("ln_f.weight", "ln_f.weight", "D"), Row("ln_f.bias", "ln_f.bias", "D"))
