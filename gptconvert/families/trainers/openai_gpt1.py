"""GPT-1 as released by OpenAI: NumPy arrays without names or configuration.

Source: openai/finetune-transformer-lm ``train.py``. Linear layers are convolutions of width 1, [1, in, out].
"""

from __future__ import annotations

from gptconvert.errors import InputError
from gptconvert.families.family import ConfigInput, Layout, ReadConfig
from gptconvert.families.keys import table
from gptconvert.families.rows import CONV_TF
from gptconvert.families.trainers.sizes import heads_of_width, table_sizes
from gptconvert.model.config_kinds import WHOLE, choice
from gptconvert.model.config_table import Key
from gptconvert.model.schemes import Order, Row, Scheme

#: Names for the released arrays, which have none, in the order in which the original program created its variables
#: (position table first; within a layer attention, ln_1, MLP, ln_2).
OPENAI_GPT1 = Scheme(
    name="openai-gpt1",
    anchor="tokens_embed",
    rows=(
        Row("wpe.weight", "positions_embed", "C D"),
        Row("wte.weight", "tokens_embed", "V D"),
        Row("h.{i}.attn.c_attn.weight", "h{i}/attn/c_attn/w", "1 D 3D", CONV_TF),
        Row("h.{i}.attn.c_attn.bias", "h{i}/attn/c_attn/b", "3D"),
        Row("h.{i}.attn.c_proj.weight", "h{i}/attn/c_proj/w", "1 D D", CONV_TF),
        Row("h.{i}.attn.c_proj.bias", "h{i}/attn/c_proj/b", "D"),
        Row("h.{i}.ln_1.weight", "h{i}/ln_1/g", "D"),
        Row("h.{i}.ln_1.bias", "h{i}/ln_1/b", "D"),
        Row("h.{i}.mlp.c_fc.weight", "h{i}/mlp/c_fc/w", "1 D F", CONV_TF),
        Row("h.{i}.mlp.c_fc.bias", "h{i}/mlp/c_fc/b", "F"),
        Row("h.{i}.mlp.c_proj.weight", "h{i}/mlp/c_proj/w", "1 F D", CONV_TF),
        Row("h.{i}.mlp.c_proj.bias", "h{i}/mlp/c_proj/b", "D"),
        Row("h.{i}.ln_2.weight", "h{i}/ln_2/g", "D"),
        Row("h.{i}.ln_2.bias", "h{i}/ln_2/b", "D"),
    ),
    order=Order("layer"),
)
#: GPT-1's activation. Unlike in other families, gelu means the tanh formula.
AFN = Key("afn", "activation", choice({"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}), "gelu")
HPARAMS = table(
    Key("n_vocab", "vocab_size", WHOLE),
    Key("n_ctx", "n_ctx", WHOLE),
    Key("n_embd", "n_embd", WHOLE),
    Key("n_layer", "n_layer", WHOLE),
    Key("n_head", "n_head", WHOLE, None),
    AFN,
)


def read(given: ConfigInput) -> ReadConfig:
    """Read ``--hparams``; sizes that it omits come from the shapes."""
    sizes = table_sizes(OPENAI_GPT1, given.tensors)
    if sizes is None:
        raise InputError(
            "the token and position tables, which give the sizes, are missing or malformed", path=given.path
        )
    reading, notes = HPARAMS.read(given.raw, given.path, defaults=sizes.fields), []
    heads = reading.values["n_head"]
    if heads is None or given.options.n_head is not None:
        missing = "GPT-1's files contain no configuration"
        heads, how = heads_of_width(sizes.fields["n_embd"], given.options, missing)
        notes.append(f"{missing}: sizes taken from the shapes, n_head = {heads} ({how})")
    return given.read(reading, notes, n_head=heads)


LAYOUT = Layout(OPENAI_GPT1, read)
