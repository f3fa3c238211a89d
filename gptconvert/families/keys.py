"""Configuration keys that several families share, as parts of their tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from gptconvert.model.config_kinds import FLAG, NUMBER, SIZE, TOKEN, TOKENS, WHOLE, choice
from gptconvert.model.config_table import ConfigTable, Key, Values
from gptconvert.model.generation import GENERATION_DEFAULTS
from reference_model.config import GPTConfig

#: Keys of any model type that do not affect a forward pass: bookkeeping, training, tokenizer, generation, and choices
#: among equal implementations.
HARMLESS = frozenset(
    """architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path task_specific_params
    id2label label2id num_labels problem_type output_attentions output_hidden_states return_dict use_return_dict
    output_past use_cache gradient_checkpointing initializer_range torchscript finetuning_task language
    tokenizer_class prefix license _commit_hash _num_labels transformers.js_config use_bfloat16 n_special
    predict_special_tokens embd_pdrop resid_pdrop attn_pdrop
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    sep_token_id
    author created_date date description comment tags datasets version url homepage citation model_name base_model
    model_id name line_by_line seed unsloth_fixed unsloth_version generator_version xla_device trust_remote_code
    is_decoder is_composition keys_to_ignore_at_inference model_parallel loss_type fp16 bf16
    learning_rate lr batch_size train_batch_size eval_batch_size per_device_train_batch_size num_train_epochs epochs
    n_epochs weight_decay warmup_steps max_steps train_steps eval_steps gradient_accumulation_steps optimizer
    scheduler lr_scheduler neftune_noise_alpha gradient_checkpointing_kwargs
    unk_token_id cls_token_id mask_token_id additional_special_tokens tokenizer_name tokenizer_type tokenizer_file
    model_max_length padding_side truncation_side add_bos_token add_eos_token add_prefix_space special_tokens_map
    max_seq_length max_sequence_length seq_length
    constraints
    forced_decoder_ids low_memory
    num_assistant_tokens assistant_early_exit watermarking_config token_healing cache_implementation cache_config
    use_mems
    badwordsids newlinemode antemplate welcome formatoptns nobreakmodel sampler_order rep_pen
    rep_pen_slope rep_pen_range temp tfs typical top_a adventure chatmode dynamicscan compat
    apply_query_key_layer_scaling use_flash_attention use_flash_attn use_sdpa fused_attention
    reorder_and_upcast_attn""".split()
) | frozenset(GENERATION_DEFAULTS)
#: Further harmless keys: transformers' private attributes, and dropout, which is off at inference.
PATTERN = r"_[a-z]\w*|(?:\w+_)?(?:dropout|pdrop|layerdrop)(?:_(?:p|prob|rate))?"
#: Features not implemented for any family → the value that switches them off.
UNUSED: Mapping[str, object] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "quantization_config": None,
    "rope_scaling": None,
    "auto_map": None,
    "scale_attn_by_inverse_layer_idx": False,
    "normalize_attention_scores": True,
    **dict.fromkeys("rotary use_rotary rope use_rope alibi use_alibi rms_norm qk_norm".split(), False),
    "adapters": None,
}
#: How a double-heads model scores each choice. Only these values are implemented.
SUMMARY_KEYS: Mapping[str, object] = {
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
    "summary_first_dropout": 0.1,
}
#: Keys that transformers writes for every model.
ALWAYS: Mapping[str, object] = {"initializer_range": 0.02, "use_cache": True}
#: Hugging Face's activations (``transformers.activations.ACT2FN``), by formula. Names that differ only in rounding
#: share a formula: gelu_fast rounds √(2/π) to ten digits, which changes no result by more than 1e-12.
ACTIVATION = choice(
    {
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu": "gelu_erf",
        "gelu_python": "gelu_erf",
        "gelu_10": "gelu_erf_10",
        "quick_gelu": "gelu_sigmoid",
        "relu": "relu",
        "relu2": "relu_squared",
        "relu6": "relu6",
        "leaky_relu": "leaky_relu",
        "silu": "silu",
        "swish": "silu",
        "hardswish": "hardswish",
        "mish": "mish",
        "tanh": "tanh",
        "sigmoid": "sigmoid",
        "laplace": "laplace",
        "sqrtsoftplus": "sqrt_softplus",
        "linear": "linear",
    },
    refused=dict.fromkeys(("prelu", "xielu"), "it has trained parameters in every layer"),
)


def table(
    *keys: Key,
    harmless: Collection[str] = (),
    also: str = "",
    unused: Mapping[str, object] | None = None,
    writes: Mapping[str, object] | None = None,
    derived: Mapping[str, Callable[[Values], object]] | None = None,
) -> ConfigTable:
    """A table of these keys, plus the harmless and unused keys common to all families.

    Args:
        keys: keys that affect the model.
        harmless: further harmless keys.
        also: regular expression of further harmless keys.
        unused: further keys of features that must be off.
        writes: see :class:`ConfigTable`.
        derived: see :class:`ConfigTable`.
    """
    handled = {name for key in keys for name in key.names}
    off = {key: value for key, value in {**UNUSED, **(unused or {})}.items() if key not in handled}
    carried = (HARMLESS | {*harmless}) - handled - off.keys()
    pattern = f"{PATTERN}|{also}" if also else PATTERN
    return ConfigTable(keys, carried, pattern, off, writes or {}, derived or {})


def vocabulary(size: int, *, tied: bool, bos: int | None, eos: int | None) -> tuple[Key, ...]:
    """config.json's vocabulary keys, with the defaults of one model type."""
    return (
        Key("vocab_size", "vocab_size", WHOLE, size),
        Key("tie_word_embeddings", "tied_head", FLAG, tied),
        Key("bos_token_id", "bos_token_id", TOKEN, bos),
        Key("eos_token_id", "eos_token_id", TOKENS, eos),
        Key("pad_token_id", "pad_token_id", TOKEN, None),
    )


def sizes(width: int, layers: int, heads: int) -> tuple[Key, ...]:
    """config.json's width, depth and head-count keys under GPT-2's names, with the defaults of one model type."""
    return (
        Key("n_embd", "n_embd", WHOLE, width, aliases=("hidden_size",)),
        Key("n_layer", "n_layer", WHOLE, layers, aliases=("num_hidden_layers",)),
        Key("n_head", "n_head", WHOLE, heads, aliases=("num_attention_heads",)),
    )


def inner(name: str) -> Key:
    """The inner width of the MLP; null means 4 D."""
    return Key(name, "n_inner", SIZE, None, of=_inner_width)


def _inner_width(config: GPTConfig) -> int | None:
    return None if config.n_inner == 4 * config.n_embd else config.n_inner


#: The epsilon that norms add to the variance, under GPT-2's name.
NORM_EPS = Key("layer_norm_epsilon", "norm_eps", NUMBER, 1e-5)


def dropouts(rate: float) -> dict[str, object]:
    """Dropout rates under GPT-2's names, which are always written."""
    return dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), rate)
