"""GPT-1, the first GPT: norms after the residual sums, and none after the last block.

Sources: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training";
openai/finetune-transformer-lm ``train.py`` (tanh-GELU, eps 1e-5, order of the released arrays); Hugging Face
``OpenAIGPTConfig``. Conv1D weights are [in, out] in both worlds; canonical linear weights are [out, in].

``afn: "gelu"`` of config.json means the tanh formula here, not, as elsewhere, the one with erf.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gptconvert.errors import InputError
from gptconvert.families.family import ConfigKeys, Family, heads_of_width, per_layer, usual_scale
from gptconvert.families.heads import (
    HEAD_DROPS,
    HEAD_ROWS,
    SUMMARY_KEYS,
    choose_task,
    head_config,
    head_fields,
    own_lm_head,
    tied_lm_head,
)
from gptconvert.model.options import Options
from gptconvert.model.schemes import Drop, Order, Row, Scheme, Tied
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import DropLeadingAxis, Transpose
from reference_model.config import GPTConfig

CONV1D = (Transpose(),)
CONV_TF = (DropLeadingAxis(), Transpose())
HEADS = {
    "text-generation": "OpenAIGPTLMHeadModel",
    "feature-extraction": "OpenAIGPTModel",
    "text-classification": "OpenAIGPTForSequenceClassification",
    "multiple-choice": "OpenAIGPTDoubleHeadsModel",
}
ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
ACTIVATION_NAME = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}


def _embedding_is_head(config: GPTConfig) -> bool:
    """transformers saves the shared matrix of a double-heads GPT-1, and of it alone, under the head's name."""
    return config.tied_head and config.task == "multiple-choice"


def _embedding_is_itself(config: GPTConfig) -> bool:
    return config.tied_head and config.task != "multiple-choice"


HF = Scheme(
    name="hf",
    anchor="positions_embed.weight",
    prefixes=("transformer.", "", "module.transformer.", "module."),
    body="transformer.",
    write_prefix="transformer.",
    rows=(
        Row("wte.weight", "tokens_embed.weight", "V D", when=lambda c: not c.tied_head),
        Row("wte.weight", "tokens_embed.weight", "V D", when=_embedding_is_itself, aliases=("lm_head.weight",)),
        Row("wpe.weight", "positions_embed.weight", "C D"),
        Row("h.{i}.attn.c_attn.weight", "h.{i}.attn.c_attn.weight", "D 3D", CONV1D),
        Row("h.{i}.attn.c_attn.bias", "h.{i}.attn.c_attn.bias", "3D"),
        Row("h.{i}.attn.c_proj.weight", "h.{i}.attn.c_proj.weight", "D D", CONV1D),
        Row("h.{i}.attn.c_proj.bias", "h.{i}.attn.c_proj.bias", "D"),
        Row("h.{i}.ln_1.weight", "h.{i}.ln_1.weight", "D"),
        Row("h.{i}.ln_1.bias", "h.{i}.ln_1.bias", "D"),
        Row("h.{i}.mlp.c_fc.weight", "h.{i}.mlp.c_fc.weight", "D F", CONV1D),
        Row("h.{i}.mlp.c_fc.bias", "h.{i}.mlp.c_fc.bias", "F"),
        Row("h.{i}.mlp.c_proj.weight", "h.{i}.mlp.c_proj.weight", "F D", CONV1D),
        Row("h.{i}.mlp.c_proj.bias", "h.{i}.mlp.c_proj.bias", "D"),
        Row("h.{i}.ln_2.weight", "h.{i}.ln_2.weight", "D"),
        Row("h.{i}.ln_2.bias", "h.{i}.ln_2.bias", "D"),
        Row("lm_head.weight", "lm_head.weight", "V D", when=own_lm_head, head=True),
        Row(
            "wte.weight",
            "lm_head.weight",
            "V D",
            when=_embedding_is_head,
            head=True,
            aliases=("tokens_embed.weight",),
        ),
        *HEAD_ROWS,
    ),
    drops=(
        Drop(r"h\.\d+\.attn\.bias", "causal mask buffer"),
        Drop(r"position_ids", "position buffer"),
        *HEAD_DROPS,
    ),
    tied=(
        Tied("lm_head.weight", "wte.weight", "V D", when=lambda c: tied_lm_head(c) and _embedding_is_itself(c)),
        Tied("tokens_embed.weight", "wte.weight", "V D", when=_embedding_is_head, head=False),
    ),
)

#: The released arrays, which bear no names: these are given to them, in this order, in which the original program
#: created its variables (position table first; within a layer attention, ln_1, MLP, ln_2).
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


def _config(keys: ConfigKeys, sizes: Mapping[str, int], activation: str, **fields: object) -> GPTConfig:
    """What every GPT-1 is, from ``vocab_size``, ``n_ctx``, ``n_embd``, ``n_layer`` and ``n_head``."""
    width, layers = sizes["n_embd"], sizes["n_layer"]
    return keys.build(
        family="gpt1",
        **sizes,
        n_inner=4 * width,
        activation=activation,
        norm_position="post",
        final_norm=False,
        attn_scale=per_layer(usual_scale(width, sizes["n_head"]), layers),
        attn_window=per_layer(None, layers),
        **fields,
    )


def _hf_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    keys = ConfigKeys(raw, path)
    # n_ctx says how long the training texts were: with n_positions 513 beside it, the table has 513 rows.
    length = keys.optional_integer("n_ctx") or 512
    sizes = {
        "vocab_size": keys.integer("vocab_size", 40478),
        "n_ctx": keys.integer("n_positions", length, "max_position_embeddings"),
        "n_embd": keys.integer("n_embd", 768, "hidden_size"),
        "n_layer": keys.integer("n_layer", 12, "num_hidden_layers"),
        "n_head": keys.integer("n_head", 12, "num_attention_heads"),
    }
    head, notes = head_fields(HEADS, keys, tensors, request, tied=keys.boolean("tie_word_embeddings", True))
    config = _config(
        keys,
        sizes,
        keys.choice("afn", "gelu", ACTIVATIONS),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        bos_token_id=keys.optional_integer("bos_token_id"),
        eos_token_id=keys.optional_integer("eos_token_id"),
        **head,
    )
    return config, keys.finish(harmless=SUMMARY_KEYS), notes


def _openai_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    tables = [tensors[name].shape for name in ("tokens_embed", "positions_embed") if name in tensors]
    if [len(shape) for shape in tables] != [2, 2]:
        raise InputError("no token and position tables to take the sizes from", path=path)
    (vocabulary, width), (context, _) = tables
    found = {int(m[1]) for name in tensors if (m := re.match(r"h([0-9]{1,5})/", name))}
    keys, notes = ConfigKeys(raw, path), []
    if "n_head" in raw and request.n_head is None:
        heads = keys.integer("n_head")
    else:
        keys.optional_integer("n_head")
        heads, how = heads_of_width(width, request, "GPT-1's files hold no configuration")
        notes.append(f"GPT-1's files hold no configuration: sizes taken from the shapes, n_head = {heads} ({how})")
    sizes = {
        "vocab_size": keys.integer("n_vocab", vocabulary),
        "n_ctx": keys.integer("n_ctx", context),
        "n_embd": keys.integer("n_embd", width),
        "n_layer": keys.integer("n_layer", max(found, default=-1) + 1),
        "n_head": heads,
    }
    task = choose_task(HEADS, {}, path, tensors, request, tied=True)
    config = _config(keys, sizes, keys.choice("afn", "gelu", ACTIVATIONS), task=task)
    keys.finish()
    return config, {}, notes


def _write_config(config: GPTConfig, carried: Mapping[str, object]) -> dict[str, object]:
    defaults = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02, **SUMMARY_KEYS}
    return {
        **defaults,
        **carried,
        **head_config(HEADS, config, carried),
        "model_type": "openai-gpt",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "afn": ACTIVATION_NAME[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


FAMILY = Family(
    name="gpt1",
    title="GPT-1",
    model_types=("openai-gpt",),
    schemes=(HF, OPENAI_GPT1),
    read_config={"hf": _hf_config, "openai-gpt1": _openai_config},
    write_config=_write_config,
    heads=HEADS,
    tokenizer="word-end",
)
