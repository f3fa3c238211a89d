"""GPT-2 as llm.c saves it.

Source: karpathy/llm.c ``train_gpt2.py`` and ``train_gpt2.c`` (header, order of the stacked tensors, tanh-GELU).
"""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.families.family import ConfigInput, Layout, ReadConfig
from gptconvert.families.keys import table
from gptconvert.families.trainers.linear import SHAPES
from gptconvert.families.trainers.sizes import gpt2_end
from gptconvert.model.config_kinds import WHOLE
from gptconvert.model.config_table import Key
from gptconvert.model.schemes import Order, Row, Scheme

_LLMC_NAMES: Mapping[str, str] = {
    "wte.weight": "wte",
    "wpe.weight": "wpe",
    "h.{i}.ln_1.weight": "h.{i}.ln1w",
    "h.{i}.ln_1.bias": "h.{i}.ln1b",
    "h.{i}.attn.c_attn.weight": "h.{i}.qkvw",
    "h.{i}.attn.c_attn.bias": "h.{i}.qkvb",
    "h.{i}.attn.c_proj.weight": "h.{i}.attprojw",
    "h.{i}.attn.c_proj.bias": "h.{i}.attprojb",
    "h.{i}.ln_2.weight": "h.{i}.ln2w",
    "h.{i}.ln_2.bias": "h.{i}.ln2b",
    "h.{i}.mlp.c_fc.weight": "h.{i}.fcw",
    "h.{i}.mlp.c_fc.bias": "h.{i}.fcb",
    "h.{i}.mlp.c_proj.weight": "h.{i}.fcprojw",
    "h.{i}.mlp.c_proj.bias": "h.{i}.fcprojb",
    "ln_f.weight": "lnfw",
    "ln_f.bias": "lnfb",
}
#: The file has no names: tensors are stored in this order, each stacked over the layers. ``P``: padded vocabulary.
LLMC = Scheme(
    name="llmc",
    anchor="wte",
    rows=tuple(Row(canonical, _LLMC_NAMES[canonical], shape) for canonical, shape in SHAPES.items()),
    order=Order("row", padded={"wte": "P"}),
)


HEADER = table(
    Key("vocab_size", "vocab_size", WHOLE),
    Key("max_seq_len", "n_ctx", WHOLE),
    Key("channels", "n_embd", WHOLE),
    Key("num_layers", "n_layer", WHOLE),
    Key("num_heads", "n_head", WHOLE),
    harmless=("version", "padded_vocab_size"),
    derived={"bos_token_id": gpt2_end, "eos_token_id": gpt2_end},
)


def read(given: ConfigInput) -> ReadConfig:
    """Read the configuration from the file's header."""
    return given.read(HEADER.read(given.raw, given.path))


LAYOUT = Layout(LLMC, read)
