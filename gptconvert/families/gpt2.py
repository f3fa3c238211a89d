"""GPT-2 and DistilGPT-2.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; openai/gpt-2 ``src/model.py``
(variables, tanh-GELU, eps 1e-5); Hugging Face ``GPT2Config`` (config.json keys and the options added there).
Conv1D weights are [in, out] in both worlds; canonical linear weights are [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gptconvert.errors import InputError, UsageError
from gptconvert.families.family import (
    HF_ACTIVATION_NAME,
    HF_ACTIVATIONS,
    ConfigKeys,
    Family,
    heads_of_width,
    per_layer,
    usual_scale,
)
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
from gptconvert.families.trainers import gpt2 as gpt2_trainers
from gptconvert.model.options import Options
from gptconvert.model.schemes import Drop, Row, Scheme, Tied, find_prefix
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import DropLeadingAxis, Transpose
from reference_model.config import GPTConfig

CONV1D = (Transpose(),)
CONV_TF = (DropLeadingAxis(), Transpose())
HEADS = {
    "text-generation": "GPT2LMHeadModel",
    "feature-extraction": "GPT2Model",
    "text-classification": "GPT2ForSequenceClassification",
    "token-classification": "GPT2ForTokenClassification",
    "question-answering": "GPT2ForQuestionAnswering",
    "multiple-choice": "GPT2DoubleHeadsModel",
}


HF = Scheme(
    name="hf",
    anchor="wte.weight",
    prefixes=("transformer.", "", "module.transformer.", "module."),
    body="transformer.",
    write_prefix="transformer.",
    rows=(
        Row("wte.weight", "wte.weight", "V D"),
        Row("wpe.weight", "wpe.weight", "C D"),
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
        Row("ln_f.weight", "ln_f.weight", "D"),
        Row("ln_f.bias", "ln_f.bias", "D"),
        Row("lm_head.weight", "lm_head.weight", "V D", when=own_lm_head, head=True),
        *HEAD_ROWS,
    ),
    drops=(
        Drop(r"h\.\d+\.attn\.bias", "causal mask buffer"),
        Drop(r"h\.\d+\.attn\.masked_bias", "mask constant"),
        *HEAD_DROPS,
    ),
    tied=(Tied("lm_head.weight", "wte.weight", "V D", when=tied_lm_head),),
)

#: Last part of a slot variable's name: the optimizer's own, or that of a moment.
OPTIMIZER_SLOT = (
    r"(?i:\w*(?:adam|adafactor|momentum|rmsprop|adagrad|adadelta|ftrl|lamb|lars|novograd|yogi|lion)\w*"
    r"|(?:ExponentialMovingAverage|grad_accum\w*|accumulator|m|v|vr|vc)(?:_\d+)?)"
)

OPENAI_TF = Scheme(
    name="openai-tf",
    anchor="model/wte",
    prefixes=None,
    rows=(
        Row("wte.weight", "model/wte", "V D"),
        Row("wpe.weight", "model/wpe", "C D"),
        Row("h.{i}.ln_1.weight", "model/h{i}/ln_1/g", "D"),
        Row("h.{i}.ln_1.bias", "model/h{i}/ln_1/b", "D"),
        Row("h.{i}.attn.c_attn.weight", "model/h{i}/attn/c_attn/w", "1 D 3D", CONV_TF),
        Row("h.{i}.attn.c_attn.bias", "model/h{i}/attn/c_attn/b", "3D"),
        Row("h.{i}.attn.c_proj.weight", "model/h{i}/attn/c_proj/w", "1 D D", CONV_TF),
        Row("h.{i}.attn.c_proj.bias", "model/h{i}/attn/c_proj/b", "D"),
        Row("h.{i}.ln_2.weight", "model/h{i}/ln_2/g", "D"),
        Row("h.{i}.ln_2.bias", "model/h{i}/ln_2/b", "D"),
        Row("h.{i}.mlp.c_fc.weight", "model/h{i}/mlp/c_fc/w", "1 D F", CONV_TF),
        Row("h.{i}.mlp.c_fc.bias", "model/h{i}/mlp/c_fc/b", "F"),
        Row("h.{i}.mlp.c_proj.weight", "model/h{i}/mlp/c_proj/w", "1 F D", CONV_TF),
        Row("h.{i}.mlp.c_proj.bias", "model/h{i}/mlp/c_proj/b", "D"),
        Row("ln_f.weight", "model/ln_f/g", "D"),
        Row("ln_f.bias", "model/ln_f/b", "D"),
    ),
    drops=(
        # What an optimizer adds lies outside model/ or hangs, under its own name, below one of the variables above.
        # Anything else in there could be part of the model (an adapter, say) and is not dropped.
        Drop(
            r"(?:.*/)?model/(?:wte|wpe|ln_f/[gb]|h\d+/(?:ln_[12]/[gb]|attn/c_(?:attn|proj)/[wb]|mlp/c_(?:fc|proj)/[wb]))/"
            rf"{OPTIMIZER_SLOT}",
            "optimizer slot",
        ),
        Drop(r"(?:.*/)?(?:global_step|beta\d_power|step|learning_rate)", "training counter"),
        Drop(r"(?!(?:.*/)?model/).+", "not a model variable"),
    ),
)


def _hf_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    keys = ConfigKeys(raw, path)
    layers, width = (
        keys.integer("n_layer", 12, "num_hidden_layers"),
        keys.integer("n_embd", 768, "hidden_size"),
    )
    heads = keys.integer("n_head", 12, "num_attention_heads")
    context = keys.integer("n_positions", 1024, "n_ctx", "max_position_embeddings")
    scaled = keys.boolean("scale_attn_weights", True)
    by_layer = keys.boolean("scale_attn_by_inverse_layer_idx", False)
    keys.boolean("reorder_and_upcast_attn", False)  # the same mathematics, softmax kept in float32
    scale = usual_scale(width, heads) if scaled else 1.0
    head, notes = head_fields(HEADS, keys, tensors, request, tied=keys.boolean("tie_word_embeddings", True))
    config = keys.build(
        family="gpt2",
        vocab_size=keys.integer("vocab_size", 50257),
        n_ctx=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=keys.optional_integer("n_inner") or 4 * width,
        activation=keys.choice("activation_function", "gelu_new", HF_ACTIVATIONS),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        attn_scale=tuple(scale / (i + 1) if by_layer else scale for i in range(min(layers, 10_001))),
        attn_window=per_layer(None, layers),
        bos_token_id=keys.optional_integer("bos_token_id", 50256),
        eos_token_id=keys.optional_integer("eos_token_id", 50256),
        **head,
    )
    return config, keys.finish(harmless=SUMMARY_KEYS), notes


def _openai_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    notes: list[str] = []
    if not raw:
        raw, notes = _infer_hparams(tensors, request)
    elif request.n_head is not None and raw.get("n_head") != request.n_head:
        raise UsageError(
            "--n-head contradicts the checkpoint's own hparams.json",
            path=path,
            expected=raw.get("n_head"),
            found=request.n_head,
        )
    keys = ConfigKeys(raw, path)
    width, heads, layers = (
        keys.integer("n_embd", 768),
        keys.integer("n_head", 12),
        keys.integer("n_layer", 12),
    )
    vocabulary = keys.integer("n_vocab")
    config = keys.build(
        family="gpt2",
        vocab_size=vocabulary,
        n_ctx=keys.integer("n_ctx", 1024),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=4 * width,
        attn_scale=per_layer(usual_scale(width, heads), layers),
        attn_window=per_layer(None, layers),
        task=choose_task(HEADS, {}, path, tensors, request, tied=True),
        bos_token_id=vocabulary - 1,  # <|endoftext|> is the last entry of OpenAI's vocabularies
        eos_token_id=vocabulary - 1,
    )
    keys.finish(harmless=("res_dropout", "attn_dropout", "embed_dropout", "dtype"))
    return config, {}, notes


def _infer_hparams(tensors: Mapping[str, LazyTensor], request: Options) -> tuple[dict[str, object], list[str]]:
    """hparams.json from the shapes. The number of heads is in none of them."""
    prefix = find_prefix(OPENAI_TF, tensors)
    shapes = {name.removeprefix(prefix or ""): tensor.shape for name, tensor in tensors.items()}
    if prefix is None or len(shapes["model/wte"]) != 2 or len(shapes.get("model/wpe", ())) != 2:
        raise InputError(
            "no hparams.json, and no model/wte and model/wpe to take the sizes from",
            hint="this is not OpenAI's GPT-2 variable scheme; pass --hparams FILE if it is",
        )
    vocabulary, width = shapes["model/wte"]
    layers = {int(m[1]) for name in shapes if (m := re.match(r"model/h([0-9]{1,5})/", name))}
    heads, how = heads_of_width(width, request, "hparams.json is missing")
    note = f"hparams.json is missing: sizes taken from the shapes, n_head = {heads} ({how})"
    sizes = {"n_vocab": vocabulary, "n_ctx": shapes["model/wpe"][0], "n_embd": width}
    return {**sizes, "n_head": heads, "n_layer": max(layers, default=-1) + 1}, [note]


def _write_config(config: GPTConfig, carried: Mapping[str, object]) -> dict[str, object]:
    per_head = config.head_dim**-0.5
    base, last = config.attn_scale[0], config.attn_scale[-1]
    defaults = {
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
        "use_cache": True,
        **SUMMARY_KEYS,
    }
    return {
        **defaults,
        **carried,
        **head_config(HEADS, config, carried),
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,  # llama.cpp reads this one
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None if config.n_inner == 4 * config.n_embd else config.n_inner,
        "activation_function": HF_ACTIVATION_NAME[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": base == per_head,
        "scale_attn_by_inverse_layer_idx": base != last,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


FAMILY = Family(
    name="gpt2",
    title="GPT-2, DistilGPT-2",
    model_types=("gpt2",),
    schemes=(HF, OPENAI_TF, *gpt2_trainers.SCHEMES),
    read_config={"hf": _hf_config, "openai-tf": _openai_config, **gpt2_trainers.READ_CONFIG},
    write_config=_write_config,
    heads=HEADS,
)
