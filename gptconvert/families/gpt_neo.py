"""GPT-Neo: GPT-2 without the scaling of scores, every other layer seeing only the keys nearby.

Sources: EleutherAI/gpt-neo (scores are not divided by √d: the factor went into q's initial values); Hugging Face
``GPTNeoConfig``. Its linear layers are ``torch.nn.Linear``, [out, in], in the MLP too, whose names are those of
GPT-2's Conv1D. q, k and v lie apart and have no bias; the output projection has one.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.errors import InputError
from gptconvert.families.base import HF_ACTIVATION_NAME, HF_ACTIVATIONS, ConfigKeys, Family, Request, per_layer
from gptconvert.families.heads import (
    HEAD_DROPS,
    HEAD_ROWS,
    SUMMARY_KEYS,
    head_config,
    head_fields,
    own_lm_head,
    tied_lm_head,
)
from gptconvert.mapping import Drop, Row, Scheme, Tied
from gptconvert.tensors import LazyTensor
from reference_model.config import GPTConfig

HEADS = {
    "text-generation": "GPTNeoForCausalLM",
    "feature-extraction": "GPTNeoModel",
    "text-classification": "GPTNeoForSequenceClassification",
    "token-classification": "GPTNeoForTokenClassification",
    "question-answering": "GPTNeoForQuestionAnswering",
}
QKV = tuple(f"h.{{i}}.attn.attention.{part}_proj.weight" for part in "qkv")

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
        Row("h.{i}.attn.c_attn.weight", QKV, "D D"),
        Row("h.{i}.attn.c_proj.weight", "h.{i}.attn.attention.out_proj.weight", "D D"),
        Row("h.{i}.attn.c_proj.bias", "h.{i}.attn.attention.out_proj.bias", "D"),
        Row("h.{i}.ln_2.weight", "h.{i}.ln_2.weight", "D"),
        Row("h.{i}.ln_2.bias", "h.{i}.ln_2.bias", "D"),
        Row("h.{i}.mlp.c_fc.weight", "h.{i}.mlp.c_fc.weight", "F D"),
        Row("h.{i}.mlp.c_fc.bias", "h.{i}.mlp.c_fc.bias", "F"),
        Row("h.{i}.mlp.c_proj.weight", "h.{i}.mlp.c_proj.weight", "D F"),
        Row("h.{i}.mlp.c_proj.bias", "h.{i}.mlp.c_proj.bias", "D"),
        Row("ln_f.weight", "ln_f.weight", "D"),
        Row("ln_f.bias", "ln_f.bias", "D"),
        Row("lm_head.weight", "lm_head.weight", "V D", when=own_lm_head, head=True),
        *HEAD_ROWS,
    ),
    drops=(
        Drop(r"h\.\d+\.attn\.attention\.bias", "attention mask buffer"),
        Drop(r"h\.\d+\.attn\.attention\.masked_bias", "mask constant"),
        *HEAD_DROPS,
    ),
    tied=(Tied("lm_head.weight", "wte.weight", "V D", when=tied_lm_head),),
)


def _attention_layers(keys: ConfigKeys, layers: int) -> list[str]:
    """``global`` or ``local`` for every layer, from ``attention_types``, ``attention_layers`` or the default.

    Raises:
        InputError: either is malformed, they contradict each other, or their length is not the number of layers.
    """
    keys.seen.update(("attention_types", "attention_layers"))
    types, listed = keys.raw.get("attention_types"), keys.raw.get("attention_layers")
    if types is None and listed is None:
        types = [[["global", "local"], 12]]
    kinds = _expanded(types, layers) if types is not None else listed
    if listed is not None and listed != kinds:
        raise InputError("attention_types and attention_layers contradict each other", path=keys.path)
    if not isinstance(kinds, list) or not all(kind in ("global", "local") for kind in kinds) or len(kinds) != layers:
        raise InputError(
            "wrong attention pattern",
            path=keys.path,
            tensor="attention_types" if types is not None else "attention_layers",
            expected=f"{layers} layers of 'global' or 'local'",
            found=repr(types if types is not None else listed)[:80],
        )
    return kinds


def _expanded(types: object, layers: int) -> list[str] | None:
    """[[["global", "local"], 2]] → ["global", "local", "global", "local"]; None if it is nothing of the kind."""
    kinds: list[str] = []
    for item in types if isinstance(types, list) else [None]:
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], list):
            return None
        pattern, times = item
        if not isinstance(times, int) or len(pattern) * times > layers:
            return None
        kinds += pattern * times
    return kinds


def _window(keys: ConfigKeys) -> int:
    window = keys.integer("window_size", 256)
    if window < 1:
        raise InputError("wrong value", path=keys.path, tensor="window_size", expected="at least 1", found=window)
    return window


def _hf_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Request
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    keys = ConfigKeys(raw, path)
    layers, width = keys.integer("num_layers", 24, "num_hidden_layers"), keys.integer("hidden_size", 2048)
    window = _window(keys)
    windows = tuple(None if kind == "global" else window for kind in _attention_layers(keys, layers))
    head, notes = head_fields(HEADS, keys, tensors, request, tied=keys.boolean("tie_word_embeddings", True))
    config = keys.build(
        family="gpt_neo",
        vocab_size=keys.integer("vocab_size", 50257),
        n_ctx=keys.integer("max_position_embeddings", 2048),
        n_embd=width,
        n_layer=layers,
        n_head=keys.integer("num_heads", 16, "num_attention_heads"),
        n_inner=keys.optional_integer("intermediate_size") or 4 * width,
        activation=keys.choice("activation_function", "gelu_new", HF_ACTIVATIONS),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        attn_scale=per_layer(1.0, layers),
        attn_window=windows,
        qkv_bias=False,
        bos_token_id=keys.optional_integer("bos_token_id", 50256),
        eos_token_id=keys.optional_integer("eos_token_id", 50256),
        **head,
    )
    return config, keys.finish(harmless=(*DROPOUTS, *SUMMARY_KEYS)), notes


DROPOUTS = {"attention_dropout": 0.0, "embed_dropout": 0.0, "resid_dropout": 0.0, "classifier_dropout": 0.1}


def _write_config(config: GPTConfig, carried: Mapping[str, object]) -> dict[str, object]:
    kinds = ["global" if window is None else "local" for window in config.attn_window]
    window = next((window for window in config.attn_window if window is not None), 256)
    return {
        **DROPOUTS,
        "initializer_range": 0.02,
        "use_cache": True,
        **carried,
        **head_config(HEADS, config, carried),
        "model_type": "gpt_neo",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.n_ctx,
        "hidden_size": config.n_embd,
        "num_layers": config.n_layer,
        "num_heads": config.n_head,
        "intermediate_size": None if config.n_inner == 4 * config.n_embd else config.n_inner,
        "attention_types": [[_period(kinds), len(kinds) // len(_period(kinds))]],
        "attention_layers": kinds,
        "window_size": window,
        "activation_function": HF_ACTIVATION_NAME[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def _period(kinds: list[str]) -> list[str]:
    """The shortest pattern that repeats to give all of them."""
    lengths = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next(kinds[:n] for n in lengths if kinds[:n] * (len(kinds) // n) == kinds)


FAMILY = Family(
    name="gpt_neo",
    title="GPT-Neo",
    model_types=("gpt_neo",),
    schemes=(HF,),
    read_config={"hf": _hf_config},
    write_config=_write_config,
    heads=HEADS,
)
