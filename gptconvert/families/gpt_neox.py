"""GPT-NeoX and Pythia: rotary positions on half-split pairs, attention and MLP side by side or one after the other.

Sources: Black et al. 2022, "GPT-NeoX-20B"; EleutherAI/gpt-neox; Hugging Face ``GPTNeoXConfig``. Linear weights are
[out, in]; the rows of ``query_key_value`` are [H, 3, head]: each head's q, k, v together. Trained checkpoints used
the tanh GELU; what ``hidden_act`` says is what every published logit was computed with, and what counts here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gptconvert.errors import InputError
from gptconvert.families.family import HF_ACTIVATION_NAME, HF_ACTIVATIONS, ConfigKeys, Family, per_layer, usual_scale
from gptconvert.families.heads import HEAD_DROPS, HEAD_ROWS, head_config, head_fields, own_lm_head, tied_lm_head
from gptconvert.families.trainers.neox import NEOX, neox_config
from gptconvert.model.options import Options
from gptconvert.model.schemes import Drop, Row, Scheme, Tied
from gptconvert.model.tensors import LazyTensor
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


HF = Scheme(
    name="hf",
    anchor="embed_in.weight",
    prefixes=("gpt_neox.", "", "module.gpt_neox.", "module."),
    body="gpt_neox.",
    write_prefix="gpt_neox.",
    rows=(
        Row("wte.weight", "embed_in.weight", "V D"),
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
        # transformers 5 calls it lm_head in memory and embed_out in files, its own older ones and new ones alike.
        Row("lm_head.weight", "embed_out.weight", "V D", when=own_lm_head, head=True, aliases=("lm_head.weight",)),
        *HEAD_ROWS,
    ),
    drops=(
        Drop(r"layers\.\d+\.attention\.bias", "causal mask buffer"),
        Drop(r"layers\.\d+\.attention\.masked_bias", "mask constant"),
        Drop(r"(layers\.\d+\.attention\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)", "table of rotary angles"),
        *HEAD_DROPS,
    ),
    tied=(
        Tied("embed_out.weight", "wte.weight", "V D", when=tied_lm_head),
        Tied("lm_head.weight", "wte.weight", "V D", when=tied_lm_head),
    ),
)
#: Keys that hold the rotary numbers, by generation of transformers: (base, share of each head).
ROPE_NAMES = (("rotary_emb_base", "rotary_pct"), ("rope_theta", "partial_rotary_factor"))


def _rotary(keys: ConfigKeys, head_dim: int) -> Rotary:
    """Rotary positions, from ``rope_parameters`` or either older pair of keys. Where several are given, they agree.

    Raises:
        InputError: two keys contradict each other.
        UnsupportedError: another kind of rotary positions than the plain one.
    """
    keys.seen.update(("rope_parameters", *(name for pair in ROPE_NAMES for name in pair)))
    nested = keys.raw.get("rope_parameters")
    if nested is not None and not isinstance(nested, Mapping):
        raise InputError(
            "wrong value", path=keys.path, item="rope_parameters", expected="an object", found=repr(nested)[:80]
        )
    flat = {name: keys.raw[name] for pair in ROPE_NAMES for name in pair if name in keys.raw}
    inner = ConfigKeys({**flat, **{f"rope_parameters.{k}": v for k, v in (nested or {}).items()}}, keys.path)
    for key in ("rope_parameters.rope_type", "rope_parameters.type"):
        inner.choice(key, "default", {"default": None})
    (base, share), (theta, factor) = ROPE_NAMES
    pct = inner.number(share, 0.25, factor, f"rope_parameters.{factor}")
    frequency = inner.number(base, 10000.0, theta, f"rope_parameters.{theta}")
    inner.finish()
    return Rotary(dim=int(head_dim * pct), base=frequency)


def _hf_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    keys = ConfigKeys(raw, path)
    width, heads = keys.integer("hidden_size", 6144), keys.integer("num_attention_heads", 64)
    layers = keys.integer("num_hidden_layers", 44)
    bias = keys.boolean("attention_bias", True)
    head, notes = head_fields(HEADS, keys, tensors, request, tied=keys.boolean("tie_word_embeddings", False))
    config = keys.build(
        family="gpt_neox",
        vocab_size=keys.integer("vocab_size", 50432),
        n_ctx=keys.integer("max_position_embeddings", 2048),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=keys.integer("intermediate_size", 24576),
        activation=keys.choice("hidden_act", "gelu", HF_ACTIVATIONS),
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        attn_scale=per_layer(usual_scale(width, heads), layers),
        attn_window=per_layer(None, layers),
        residual="parallel" if keys.boolean("use_parallel_residual", True) else "serial",
        rotary=_rotary(keys, width // heads if heads > 0 else 0),
        qkv_bias=bias,
        attn_out_bias=bias,
        bos_token_id=keys.optional_integer("bos_token_id", 0),
        eos_token_id=keys.optional_integer("eos_token_id", 2),
        **head,
    )
    return config, keys.finish(harmless=HARMLESS), notes


DROPOUTS = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "classifier_dropout": 0.1}
HARMLESS = (*DROPOUTS, "attention_probs_dropout_prob", "hidden_dropout_prob", "num_steps", "custom_pipelines")


def _write_config(config: GPTConfig, carried: Mapping[str, object]) -> dict[str, object]:
    rotary = config.rotary or Rotary(0)
    share = rotary.dim / config.head_dim
    if int(config.head_dim * share) < rotary.dim:  # as read: the product is cut, not rounded
        share = math.nextafter(share, 1)
    return {
        **DROPOUTS,
        "initializer_range": 0.02,
        "use_cache": True,
        "is_decoder": False,
        **carried,
        **head_config(HEADS, config, carried),
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.n_ctx,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "intermediate_size": config.n_inner,
        "hidden_act": HF_ACTIVATION_NAME[config.activation],
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.residual == "parallel",
        "attention_bias": config.qkv_bias,
        "rope_parameters": {"partial_rotary_factor": share, "rope_theta": rotary.base, "rope_type": "default"},
        "rotary_pct": share,  # llama.cpp and transformers before 5 read these two
        "rotary_emb_base": rotary.base,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


FAMILY = Family(
    name="gpt_neox",
    title="GPT-NeoX, Pythia",
    model_types=("gpt_neox",),
    schemes=(HF, NEOX),
    read_config={"hf": _hf_config, "neox": neox_config(HEADS)},
    write_config=_write_config,
    heads=HEADS,
)
