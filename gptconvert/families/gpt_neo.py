"""GPT-Neo: GPT-2 without score scaling; every other layer attends only to nearby keys.

Sources: EleutherAI/gpt-neo (scores are not divided by √d: the factor went into q's initial values); Hugging Face
``GPTNeoConfig``. Its linear layers are ``torch.nn.Linear``, [out, in], in the MLP too, despite GPT-2's
Conv1D names there. q, k and v are separate tensors without biases; the output projection has a bias.
"""

from __future__ import annotations

from gptconvert.families import keys
from gptconvert.families.family import Family
from gptconvert.families.heads import embedding, hf_scheme
from gptconvert.families.pattern import attention_layers, attention_types, unscaled, window, windows
from gptconvert.families.precedence import (
    NEO_NAMES,
    NEO_UNREAD,
    common_names_win,
    in_turn,
    listed_layers_win,
    without_default_scaling,
)
from gptconvert.families.rows import FINAL_NORM
from gptconvert.families.trainers import mesh_tf
from gptconvert.model.config_kinds import ANY, WHOLE
from gptconvert.model.config_table import Key
from gptconvert.model.schemes import Drop, Row

HEADS = {
    "text-generation": "GPTNeoForCausalLM",
    "feature-extraction": "GPTNeoModel",
    "text-classification": "GPTNeoForSequenceClassification",
    "token-classification": "GPTNeoForTokenClassification",
    "question-answering": "GPTNeoForQuestionAnswering",
}
QKV = tuple(f"h.{{i}}.attn.attention.{part}_proj.weight" for part in "qkv")

HF = hf_scheme(
    *embedding("wte.weight"),
    Row("wpe.weight", "wpe.weight", "C D"),
    Row("h.{i}.ln_1.weight", "h.{i}.ln_1.weight", "D"),
    Row("h.{i}.ln_1.bias", "h.{i}.ln_1.bias", "D"),
    Row("h.{i}.attn.c_attn.weight", QKV, "D D"),
    Row("h.{i}.attn.c_proj.weight", "h.{i}.attn.attention.out_proj.weight", "D D"),
    Row("h.{i}.attn.c_proj.bias", "h.{i}.attn.attention.out_proj.bias", "D"),
    Row("h.{i}.ln_2.weight", "h.{i}.ln_2.weight", "D"),
    Row("h.{i}.ln_2.bias", "h.{i}.ln_2.bias", "D"),
    Row("h.{i}.mlp.c_fc.weight", "h.{i}.mlp.c_fc.weight", "F D"),
    Row("h.{i}.mlp.c_fc.bias", "h.{i}.mlp.c_fc.bias", "F"),
    Row("h.{i}.mlp.c_proj.weight", "h.{i}.mlp.c_proj.weight", "D F"),
    Row("h.{i}.mlp.c_proj.bias", "h.{i}.mlp.c_proj.bias", "D"),
    *FINAL_NORM,
    attention=r"h\.\d+\.attn\.attention",
    drops=(Drop(r"h\.\d+\.attn\.attention\.bias", "attention mask buffer"),),
)
DROPOUTS = {"attention_dropout": 0.0, "embed_dropout": 0.0, "resid_dropout": 0.0, "classifier_dropout": 0.1}
CONFIG = keys.table(
    *keys.vocabulary(50257, tied=True, bos=50256, eos=50256),
    Key("max_position_embeddings", "n_ctx", WHOLE, 2048),
    Key("hidden_size", "n_embd", WHOLE, 2048),
    Key("num_layers", "n_layer", WHOLE, 24, aliases=("num_hidden_layers",)),
    Key("num_heads", "n_head", WHOLE, 16, aliases=("num_attention_heads",)),
    keys.inner("intermediate_size"),
    keys.NORM_EPS,
    Key("activation_function", "activation", keys.ACTIVATION, "gelu_new"),
    Key("window_size", "window", WHOLE, 256, of=window),
    Key("attention_types", "attention_types", ANY, None, of=attention_types),
    Key("attention_layers", "attention_layers", ANY, None, of=attention_layers),
    harmless=(*DROPOUTS, *keys.SUMMARY_KEYS),
    writes={**DROPOUTS, **keys.ALWAYS},
    derived={"attn_scale": unscaled, "attn_window": windows},
)

FAMILY = Family(
    "gpt_neo",
    "GPT-Neo",
    ("gpt_neo",),
    HEADS,
    HF,
    CONFIG,
    trainers=(mesh_tf.LAYOUT,),
    precedence=in_turn(common_names_win(NEO_NAMES), listed_layers_win, without_default_scaling),
    unread=NEO_UNREAD,
    fixed={"qkv_bias": False},
)
