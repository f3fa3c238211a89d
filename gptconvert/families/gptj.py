"""GPT-J: rotary positions on neighbouring pairs, attention and MLP side by side behind one norm, a head of its own.

Sources: kingoflolz/mesh-transformer-jax; Hugging Face ``GPTJConfig``. Linear weights are [out, in]; q, k, v and the
output projection have no bias; the head has one. The vocabulary of 50400 is GPT-2's, padded.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.families.base import (
    HF_ACTIVATION_NAME,
    HF_ACTIVATIONS,
    ConfigKeys,
    Family,
    Request,
    per_layer,
    usual_scale,
)
from gptconvert.families.heads import (
    HEAD_DROPS,
    HEAD_ROWS,
    SUMMARY_KEYS,
    head_config,
    head_fields,
    lm_head_bias,
    own_lm_head,
    tied_lm_head,
)
from gptconvert.mapping import Drop, Row, Scheme, Tied
from gptconvert.tensors import LazyTensor
from reference_model.config import GPTConfig, Rotary

HEADS = {
    "text-generation": "GPTJForCausalLM",
    "feature-extraction": "GPTJModel",
    "text-classification": "GPTJForSequenceClassification",
    "question-answering": "GPTJForQuestionAnswering",
}
QKV = tuple(f"h.{{i}}.attn.{part}_proj.weight" for part in "qkv")

HF = Scheme(
    name="hf",
    anchor="wte.weight",
    prefixes=("transformer.", "", "module.transformer.", "module."),
    body="transformer.",
    write_prefix="transformer.",
    rows=(
        Row("wte.weight", "wte.weight", "V D"),
        Row("h.{i}.ln_1.weight", "h.{i}.ln_1.weight", "D"),
        Row("h.{i}.ln_1.bias", "h.{i}.ln_1.bias", "D"),
        Row("h.{i}.attn.c_attn.weight", QKV, "D D"),
        Row("h.{i}.attn.c_proj.weight", "h.{i}.attn.out_proj.weight", "D D"),
        Row("h.{i}.mlp.c_fc.weight", "h.{i}.mlp.fc_in.weight", "F D"),
        Row("h.{i}.mlp.c_fc.bias", "h.{i}.mlp.fc_in.bias", "F"),
        Row("h.{i}.mlp.c_proj.weight", "h.{i}.mlp.fc_out.weight", "D F"),
        Row("h.{i}.mlp.c_proj.bias", "h.{i}.mlp.fc_out.bias", "D"),
        Row("ln_f.weight", "ln_f.weight", "D"),
        Row("ln_f.bias", "ln_f.bias", "D"),
        Row("lm_head.weight", "lm_head.weight", "V D", when=own_lm_head, head=True),
        Row("lm_head.bias", "lm_head.bias", "V", when=lm_head_bias, head=True),
        *HEAD_ROWS,
    ),
    drops=(
        Drop(r"h\.\d+\.attn\.bias", "causal mask buffer"),
        Drop(r"h\.\d+\.attn\.masked_bias", "mask constant"),
        Drop(r"h\.\d+\.attn\.embed_positions", "table of rotary angles"),
        *HEAD_DROPS,
    ),
    tied=(Tied("lm_head.weight", "wte.weight", "V D", when=tied_lm_head),),
)


def _hf_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Request
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    keys = ConfigKeys(raw, path)
    width, heads = keys.integer("n_embd", 4096, "hidden_size"), keys.integer("n_head", 16, "num_attention_heads")
    layers = keys.integer("n_layer", 28, "num_hidden_layers")
    head, notes = head_fields(HEADS, keys, tensors, request, tied=keys.boolean("tie_word_embeddings", False))
    config = keys.build(
        family="gptj",
        vocab_size=keys.integer("vocab_size", 50400),
        n_ctx=keys.integer("n_positions", 2048, "n_ctx", "max_position_embeddings"),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=keys.optional_integer("n_inner") or 4 * width,
        activation=keys.choice("activation_function", "gelu_new", HF_ACTIVATIONS),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        attn_scale=per_layer(usual_scale(width, heads), layers),
        attn_window=per_layer(None, layers),
        residual="parallel_one_norm",
        rotary=Rotary(keys.integer("rotary_dim", 64), interleaved=True),
        qkv_bias=False,
        attn_out_bias=False,
        head_bias=True,
        bos_token_id=keys.optional_integer("bos_token_id", 50256),
        eos_token_id=keys.optional_integer("eos_token_id", 50256),
        **head,
    )
    # The released files say that scores are scaled and positions rotary; nothing reads it, but "false" is no GPT-J.
    unused = {"scale_attn_weights": True, "rotary": True}
    return config, keys.finish(harmless=SUMMARY_KEYS, unused=unused), notes


def _write_config(config: GPTConfig, carried: Mapping[str, object]) -> dict[str, object]:
    defaults = {
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    return {
        **defaults,
        **carried,
        **head_config(HEADS, config, carried),
        "model_type": "gptj",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None if config.n_inner == 4 * config.n_embd else config.n_inner,
        "rotary_dim": config.rotary.dim if config.rotary else None,
        "activation_function": HF_ACTIVATION_NAME[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


FAMILY = Family(
    name="gptj",
    title="GPT-J",
    model_types=("gptj",),
    schemes=(HF,),
    read_config={"hf": _hf_config},
    write_config=_write_config,
    heads=HEADS,
)
