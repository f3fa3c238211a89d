"""GPT-NeoX and Pythia: rotary positions on half-split pairs, attention and MLP in parallel or in series.

Sources: Black et al. 2022, "GPT-NeoX-20B"; EleutherAI/gpt-neox; Hugging Face ``GPTNeoXConfig``. Linear weights are
[out, in]; the rows of ``query_key_value`` are [H, 3, head]: each head's q, k, v together. Training used
the tanh GELU, but published logits were computed with the formula in ``hidden_act``, so that one is used here.
"""

from __future__ import annotations

import math

from gptconvert.families import keys, rope
from gptconvert.families.family import Family
from gptconvert.families.heads import embedding, hf_scheme, own_lm_head
from gptconvert.families.precedence import NEOX_UNREAD, neox_rope
from gptconvert.families.trainers import gguf, neox
from gptconvert.model.config_kinds import FLAG, NUMBER, WHOLE, flag
from gptconvert.model.config_table import Key, Values
from gptconvert.model.schemes import Drop, Row
from gptconvert.model.transforms import DeinterleaveHeads
from reference_model.config import GPTConfig, Rotary

BY_HEAD = (DeinterleaveHeads(),)
HEADS = {
    "text-generation": "GPTNeoXForCausalLM",
    "feature-extraction": "GPTNeoXModel",
    "text-classification": "GPTNeoXForSequenceClassification",
    "token-classification": "GPTNeoXForTokenClassification",
    "question-answering": "GPTNeoXForQuestionAnswering",
}


def _qkv_bias(config: GPTConfig) -> bool:
    return config.qkv_bias


def _attn_out_bias(config: GPTConfig) -> bool:
    return config.attn_out_bias


#: transformers 5 names it lm_head in memory and, like older versions, embed_out in files.
LM_HEAD = Row("lm_head.weight", "embed_out.weight", "V D", when=own_lm_head, head=True, aliases=("lm_head.weight",))
HF = hf_scheme(
    *embedding("embed_in.weight", LM_HEAD),
    Row("h.{i}.ln_1.weight", "layers.{i}.input_layernorm.weight", "D"),
    Row("h.{i}.ln_1.bias", "layers.{i}.input_layernorm.bias", "D"),
    Row("h.{i}.ln_2.weight", "layers.{i}.post_attention_layernorm.weight", "D"),
    Row("h.{i}.ln_2.bias", "layers.{i}.post_attention_layernorm.bias", "D"),
    Row("h.{i}.attn.c_attn.weight", "layers.{i}.attention.query_key_value.weight", "3D D", BY_HEAD),
    Row("h.{i}.attn.c_attn.bias", "layers.{i}.attention.query_key_value.bias", "3D", BY_HEAD, when=_qkv_bias),
    Row("h.{i}.attn.c_proj.weight", "layers.{i}.attention.dense.weight", "D D"),
    Row("h.{i}.attn.c_proj.bias", "layers.{i}.attention.dense.bias", "D", when=_attn_out_bias),
    Row("h.{i}.mlp.c_fc.weight", "layers.{i}.mlp.dense_h_to_4h.weight", "F D"),
    Row("h.{i}.mlp.c_fc.bias", "layers.{i}.mlp.dense_h_to_4h.bias", "F"),
    Row("h.{i}.mlp.c_proj.weight", "layers.{i}.mlp.dense_4h_to_h.weight", "D F"),
    Row("h.{i}.mlp.c_proj.bias", "layers.{i}.mlp.dense_4h_to_h.bias", "D"),
    Row("ln_f.weight", "final_layer_norm.weight", "D"),
    Row("ln_f.bias", "final_layer_norm.bias", "D"),
    anchor="embed_in.weight",
    fallback="final_layer_norm.weight",
    body="gpt_neox.",
    attention=r"layers\.\d+\.attention",
    drops=(
        Drop(r"(layers\.\d+\.attention\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)", "table of rotary angles"),
    ),
    lm_head=LM_HEAD,
)


def _rotary(values: Values) -> Rotary:
    width, heads = values["n_embd"], values["n_head"]
    dim = int((width // heads if heads > 0 else 0) * values["share"])
    return Rotary(dim, values["base"], scaling=rope.scaling(values))


def _share(config: GPTConfig) -> float:
    """The rotated share of each head; its product with the head width truncates to exactly ``rotary.dim``."""
    dim = config.rotary.dim if config.rotary else 0
    share = dim / config.head_dim
    return math.nextafter(share, 1) if int(config.head_dim * share) < dim else share


DROPOUTS = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "classifier_dropout": 0.1}
CONFIG = keys.table(
    *keys.vocabulary(50432, tied=False, bos=0, eos=2),
    Key("max_position_embeddings", "n_ctx", WHOLE, 2048),
    Key("hidden_size", "n_embd", WHOLE, 6144),
    Key("num_hidden_layers", "n_layer", WHOLE, 44),
    Key("num_attention_heads", "n_head", WHOLE, 64),
    Key("intermediate_size", "n_inner", WHOLE, 24576),
    Key("layer_norm_eps", "norm_eps", NUMBER, 1e-5),
    Key("hidden_act", "activation", keys.ACTIVATION, "gelu"),
    Key("use_parallel_residual", "residual", flag("parallel", "serial"), True),
    Key("attention_bias", "qkv_bias", FLAG, True),
    # llama.cpp and transformers before 5 read rotary_pct and rotary_emb_base.
    Key(
        "rope_parameters.partial_rotary_factor",
        "share",
        NUMBER,
        0.25,
        repeats=("rotary_pct",),
        of=_share,
    ),
    Key(
        "rope_parameters.rope_theta",
        "base",
        NUMBER,
        10000.0,
        repeats=("rotary_emb_base",),
        of=lambda c: c.rotary.base if c.rotary else 10000.0,
    ),
    *rope.KEYS,
    harmless=(*DROPOUTS, "attention_probs_dropout_prob", "hidden_dropout_prob", "num_steps", "custom_pipelines"),
    unused={"rotary": True},
    writes={**DROPOUTS, **keys.ALWAYS, "is_decoder": False},
    derived={"rotary": _rotary, "attn_out_bias": lambda v: v["qkv_bias"]},
)

FAMILY = Family(
    "gpt_neox",
    "GPT-NeoX, Pythia",
    ("gpt_neox",),
    HEADS,
    HF,
    CONFIG,
    trainers=(neox.LAYOUT, gguf.NEOX),
    precedence=neox_rope,
    unread=NEOX_UNREAD,
)
