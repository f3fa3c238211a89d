"""GPT-Neo: GPT-2 without the scaling of scores, every other layer seeing only the keys nearby.

Sources: EleutherAI/gpt-neo (scores are not divided by √d: the factor went into q's initial values); Hugging Face
``GPTNeoConfig``. Its linear layers are ``torch.nn.Linear``, [out, in], in the MLP too, whose names are those of
GPT-2's Conv1D. q, k and v lie apart and have no bias; the output projection has one.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families.family import HF_ACTIVATION_NAME, HF_ACTIVATIONS, ConfigKeys, Family, per_layer
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
from gptconvert.model.schemes import Drop, Row, Scheme, Tied, find_prefix
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import Transpose
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
            item="attention_types" if types is not None else "attention_layers",
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


def _positive(keys: ConfigKeys, key: str, default: int) -> int:
    value = keys.integer(key, default)
    if value < 1:
        raise InputError("wrong value", path=keys.path, item=key, expected="at least 1", found=value)
    return value


def _hf_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    keys = ConfigKeys(raw, path)
    layers, width = keys.integer("num_layers", 24, "num_hidden_layers"), keys.integer("hidden_size", 2048)
    window = _positive(keys, "window_size", 256)
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


#: The trainer's own variables (Mesh-TensorFlow), whose matrices are [in, out].
MESH_TF = Scheme(
    name="mesh-tf",
    anchor="wte",
    prefixes=None,
    write_prefix="gpt2/",
    rows=(
        Row("wte.weight", "wte", "V D"),
        Row("wpe.weight", "wpe", "C D"),
        Row("h.{i}.ln_1.weight", "h{i}/norm_1/g", "D"),
        Row("h.{i}.ln_1.bias", "h{i}/norm_1/b", "D"),
        Row("h.{i}.attn.c_attn.weight", ("h{i}/attn/q", "h{i}/attn/k", "h{i}/attn/v"), "D D", (Transpose(),)),
        Row("h.{i}.attn.c_proj.weight", "h{i}/attn/o", "D D", (Transpose(),)),
        Row("h.{i}.attn.c_proj.bias", "h{i}/attn/compute_output_bias/o_b", "D"),
        Row("h.{i}.ln_2.weight", "h{i}/norm_2/g", "D"),
        Row("h.{i}.ln_2.bias", "h{i}/norm_2/b", "D"),
        Row("h.{i}.mlp.c_fc.weight", "h{i}/mlp/conv1d_main/c_fc/kernel", "D F", (Transpose(),)),
        Row("h.{i}.mlp.c_fc.bias", "h{i}/mlp/conv1d_main/c_fc/bias", "F"),
        Row("h.{i}.mlp.c_proj.weight", "h{i}/mlp/conv1d_main/c_proj/kernel", "F D", (Transpose(),)),
        Row("h.{i}.mlp.c_proj.bias", "h{i}/mlp/conv1d_main/c_proj/bias", "D"),
        Row("ln_f.weight", "ln_f/g", "D"),
        Row("ln_f.bias", "ln_f/b", "D"),
    ),
    drops=(
        Drop(r".+/adam_[mv]", "optimizer slot"),
        Drop(r".+_slot_(?:m|v|vr|vc)", "optimizer slot"),
        Drop(r"(?:.*/)?(?:global_step|beta\d_power)", "training counter"),
    ),
)
#: The trainer's ``activation_fn``; ``activation_function``, which its configurations have too, is read by nothing.
MESH_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "tanh": "tanh", "silu": "silu"}
MESH_HARMLESS = frozenset(
    """name model mode model_path dataset_ids datasets dataset_configs no_dataset data_seed padding_id n_words
    train_batch_size eval_batch_size predict_batch_size train_steps eval_steps predict_steps predict_max_steps steps
    iterations steps_per_checkpoint max_checkpoints eval_tasks lr lr_decay lr_decay_end warmup_steps beta1 beta2
    epsilon ada_epsilon1 ada_epsilon2 opt_name optimizer weight_decay gradient_clipping embed_dropout attn_dropout
    res_dropout scale_by_depth scale_by_in mesh_shape layout auto_layout auto_layout_and_mesh_shape recompute_grad
    num_microbatches tokens_per_mb_per_replica precision use_tpu activation_function z_loss moe_params
    stop_at_token remove_partial_sequences sampling_use_entmax slow_sampling entmax_loss_function
    export_dir train predict eval text_only log_grads""".split()
)
#: Options of the trainer that make another model → the value that means "not used".
MESH_UNUSED: Mapping[str, object] = {
    "moe_layers": None,
    "mlp_glu": False,
    "rotary_emb": None,
    "axial_pos_emb": None,
    "rezero": False,
    "scalenorm": False,
    "macaron": False,
    "share_parameters": False,
    "no_weight_tie": False,
    "num_mem_kv": 0,
    "lightweight_conv_attention": 0,
    "mlm_training": False,
    "causal": True,
    "local": False,
}


def _mesh_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    if "model_type" in raw:  # transformers' own conversion wanted its own config.json beside the checkpoint
        return _hf_config(raw, path, tensors, request)
    keys = ConfigKeys(raw, path)
    layers, width = keys.integer("n_layer"), keys.integer("n_embd")
    _require_released_attention(keys, layers)
    window = _positive(keys, "local_attention_radius", 256)
    vocabulary, notes = _with_padding(keys.integer("n_vocab"), tensors)
    end = keys.optional_integer("eos_id", 50256)
    config = keys.build(
        family="gpt_neo",
        vocab_size=vocabulary,
        n_ctx=keys.integer("n_ctx", None, "n_positions"),
        n_embd=width,
        n_layer=layers,
        n_head=keys.integer("n_head"),
        n_inner=4 * width,
        activation=keys.choice("activation_fn", "gelu", MESH_ACTIVATIONS),
        attn_scale=per_layer(1.0, layers),
        attn_window=tuple(None if kind == "global" else window for kind in _attention_layers(keys, layers)),
        qkv_bias=False,
        task=choose_task(HEADS, {}, path, tensors, request, tied=True),
        bos_token_id=end,
        eos_token_id=end,
    )
    keys.finish(harmless=MESH_HARMLESS, unused=MESH_UNUSED)
    return config, {}, notes


def _require_released_attention(keys: ConfigKeys, layers: int) -> None:
    """Refuse by name the kinds of attention that only the trainer has.

    Raises:
        InputError: no kinds are given.
        UnsupportedError: there are others than global and local.
    """
    if "attention_types" not in keys.raw:
        raise InputError("required key is missing", path=keys.path, item="attention_types")
    kinds = _expanded(keys.raw["attention_types"], layers) or []
    strange = sorted({str(kind) for kind in kinds} - {"global", "local"})
    if strange:
        raise UnsupportedError(
            f"attention of kind {', '.join(strange)} is not implemented",
            path=keys.path,
            item="attention_types",
            expected="global and local",
        )


def _with_padding(vocabulary: int, tensors: Mapping[str, LazyTensor]) -> tuple[int, list[str]]:
    """The number of rows that the embedding has, which may be more than the vocabulary's, and a note then."""
    table = tensors.get(f"{find_prefix(MESH_TF, tensors)}wte")
    rows = table.shape[0] if table is not None and table.shape else 0
    if rows <= vocabulary:
        return vocabulary, []
    return rows, [f"the embedding has {rows} rows for a vocabulary of {vocabulary}: kept (--trim-vocab {vocabulary})"]


FAMILY = Family(
    name="gpt_neo",
    title="GPT-Neo",
    model_types=("gpt_neo",),
    schemes=(HF, MESH_TF),
    read_config={"hf": _hf_config, "mesh-tf": _mesh_config},
    write_config=_write_config,
    heads=HEADS,
)
