"""GPT-NeoX as saved by its trainer: tensor names on one rank, and YAML keys.

Source: EleutherAI/gpt-neox ``megatron/neox_arguments/`` (keys and defaults), ``megatron/model/transformer.py``
and ``activations.py`` (their effects). Keys are spelled with ``_`` for ``-``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families.family import ConfigInput, Layout, ReadConfig
from gptconvert.families.heads import own_lm_head, tied_lm_head
from gptconvert.families.keys import table
from gptconvert.model.config_kinds import FLAG, NUMBER, OPTIONAL_WHOLE, TEXT, WHOLE, Kind, choice, flag
from gptconvert.model.config_table import Key, Values
from gptconvert.model.schemes import Condition, Drop, Row, Scheme, Tied, Variant
from gptconvert.model.shards import COLUMNS, EITHER, ROWS, SUM, Copies
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import DeinterleaveHeads
from reference_model.config import Rotary

BY_HEAD = (DeinterleaveHeads(),)
QKV, DENSE = "layers.{i}.attention.query_key_value", "layers.{i}.attention.dense"
UP, DOWN = "layers.{i}.mlp.dense_h_to_4h", "layers.{i}.mlp.dense_4h_to_h"
#: The same two in newer versions of the trainer.
NEW_UP, NEW_DOWN = "layers.{i}.mlp.linear1", "layers.{i}.mlp.linear2"

NORMS, BIASES = Copies("norms", averaged=True), Copies("biases")
#: Index of the first block among the program's layers; the embedding and a function without weights come first.
FIRST_BLOCK = 2
#: Modules after the blocks → name without a layer index. A tied head is called word_embeddings again.
AFTER_BLOCKS = {"norm": "norm", "final_linear": "final_linear", "word_embeddings": "final_linear"}


def names_on_one_rank(names: Collection[str], path: str) -> dict[str, str]:
    """``sequential.4.mlp.linear1.bias`` → ``layers.2.mlp.linear1.bias``: number the blocks from 0.

    Raises:
        InputError: the embedding or a block is missing.
    """
    found = {}
    for name in names:
        _, number, key = name.split(".", 2)
        module, _, rest = key.partition(".")
        if int(number) < FIRST_BLOCK:
            found[name] = key
        elif module in AFTER_BLOCKS:
            found[name] = f"{AFTER_BLOCKS[module]}.{rest}"
        else:
            found[name] = f"layers.{int(number) - FIRST_BLOCK}.{key}"
    blocks = {int(name.split(".")[1]) for name in found.values() if name.startswith("layers.")}
    missing = [FIRST_BLOCK + i for i in range(max(blocks, default=0) + 1) if i not in blocks]
    if "word_embeddings.weight" not in found.values():
        missing = [0, *missing]
    if missing:
        raise InputError(
            f"layers are missing: {', '.join(f'{number:02}' for number in missing[:20])}",
            path=path,
            expected="00 (the embedding), 02 and on (the blocks)",
            found=f"{len(blocks)} blocks",
            hint="copy all files of the step into one directory",
        )
    return found


def _output_bias(canonical: str, stored: str, *aliases: str, when: Condition = lambda c: True) -> tuple[Row, ...]:
    """Rows of a bias that every rank adds.

    With a parallel residual, ranks add it before the sum over ranks, so each stores a summand. Otherwise it is
    added after the sum, so each stores a copy.
    """
    row = Row(canonical, stored, "D", aliases=aliases)
    return (
        replace(row, when=lambda c: when(c) and c.residual == "parallel", shards=SUM),
        replace(row, when=lambda c: when(c) and c.residual != "parallel", shards=BIASES),
    )


NEOX = Scheme(
    name="neox",
    anchor="word_embeddings.weight",
    rows=(
        Row("wte.weight", "word_embeddings.weight", "V D", shards=ROWS),
        Row("h.{i}.ln_1.weight", "layers.{i}.input_layernorm.weight", "D", shards=NORMS),
        Row("h.{i}.ln_1.bias", "layers.{i}.input_layernorm.bias", "D", shards=NORMS),
        Row("h.{i}.ln_2.weight", "layers.{i}.post_attention_layernorm.weight", "D", shards=NORMS),
        Row("h.{i}.ln_2.bias", "layers.{i}.post_attention_layernorm.bias", "D", shards=NORMS),
        Row("h.{i}.attn.c_attn.weight", f"{QKV}.weight", "3D D", BY_HEAD, shards=ROWS),
        Row("h.{i}.attn.c_attn.bias", f"{QKV}.bias", "3D", BY_HEAD, when=lambda c: c.qkv_bias, shards=ROWS),
        Row("h.{i}.attn.c_proj.weight", f"{DENSE}.weight", "D D", shards=COLUMNS),
        *_output_bias("h.{i}.attn.c_proj.bias", f"{DENSE}.bias", when=lambda c: c.attn_out_bias),
        Row("h.{i}.mlp.c_fc.weight", f"{UP}.weight", "F D", aliases=(f"{NEW_UP}.weight",), shards=ROWS),
        Row("h.{i}.mlp.c_fc.bias", f"{UP}.bias", "F", aliases=(f"{NEW_UP}.bias",), shards=ROWS),
        Row("h.{i}.mlp.c_proj.weight", f"{DOWN}.weight", "D F", aliases=(f"{NEW_DOWN}.weight",), shards=COLUMNS),
        *_output_bias("h.{i}.mlp.c_proj.bias", f"{DOWN}.bias", f"{NEW_DOWN}.bias"),
        Row("ln_f.weight", "norm.weight", "D", shards=NORMS),
        Row("ln_f.bias", "norm.bias", "D", shards=NORMS),
        Row("lm_head.weight", "final_linear.weight", "V D", when=own_lm_head, shards=EITHER),
    ),
    drops=(
        Drop(r"layers\.\d+\.attention\.(bias|masked_bias)", "causal mask buffer"),
        Drop(r"layers\.\d+\.attention\.rotary_emb\.inv_freq", "table of rotary angles"),
        Drop(r"final_linear\.weight", "language-model head", when=lambda c: not c.has_lm_head),
    ),
    tied=(Tied("final_linear.weight", "wte.weight", "V D", when=tied_lm_head),),
    renamed=names_on_one_rank,
    variants=(
        Variant(
            r"(.*\.)?_extra_state|.*layer_norm_(weight|bias)|(.*\.)?mlp\.fc[12]_.*|(.*\.)?attention\.(qkv|proj)\..*",
            "TransformerEngine",
        ),
        Variant(r"position_embeddings\..*", "learned positions (pos-emb)"),
        Variant(r"(.*\.)?rpe\..*|.*relative_attention_bias.*", "relative positions (pos-emb: rpe)"),
        Variant(r".*norm\.(scale|g|d)", "a norm other than layernorm (norm)"),
        Variant(r"(.*\.)?mlp\.(w[123]|gate_proj|up_proj)\..*", "gated MLP (mlp-type)"),
        Variant(r".*(expert|moe|router).*", "mixture of experts (moe-num-experts)"),
        Variant(
            r"(.*\.)?attention\.(q|k|qk|query|key)_?(layer)?norm\..*",
            "norms of queries and keys (use-qk-layernorm)",
        ),
        Variant(r"(.*\.)?(mixer|att|ffn|gmlp)\..*", "layers other than attention (attention-config)"),
        Variant(r".*(lora|adapter|soft_embedding).*", "adapters or soft prompts"),
    ),
)

#: Values of ``activation``; with ``gelu``, ``bias_gelu_fusion`` selects the tanh formula instead.
ACTIVATIONS = {"gelu": "gelu_erf", "relu": "relu", "silu": "silu", "swish": "silu", "mish": "mish"}
#: Kind of tokenizer → id of ``<|endoftext|>`` in its usual vocabulary.
END_OF_TEXT = {"HFTokenizer": 0, "GPT2BPETokenizer": 50256, "HFGPT2Tokenizer": 50256}
#: Options that change the architecture → the value that switches them off.
UNUSED: Mapping[str, object] = {
    "gpt_j_tied": False,
    "use_bias_in_norms": True,
    "use_bias_in_mlp": True,
    "use_qk_layernorm": False,
    "use_mup": False,
    "mup_attn_temp": 1.0,
    "mup_output_temp": 1.0,
    "mup_embedding_mult": 1.0,
    "sliding_window_width": None,
    "sparsity_config": None,
    "sparse_attention": None,
    "num_unique_layers": None,
    "soft_prompt_tuning": None,
    "adapter": None,
    "adapter_config": None,
    "lora": None,
    "compression_training": None,
    "moe_num_experts": 1,
    "mlp_type": "regular",
    "model_arch": "gpt2",
    "opt_pos_emb_offset": 0,
    "te_columnparallel": False,
    "te_rowparallel": False,
    "te_layernorm_mlp": False,
    "te_mha": False,
    "te_fp8_format": None,
    "te_fp8_mha": False,
}
#: Groups of options that only training, logging, storage and data use.
GROUPS = (
    r"(?:wandb|comet|tensorboard|zero|train|valid|test|eval|checkpoint|log|lr|profile|memory_profiling|slurm|deepspeed"
    r"|save|load|no_load|no_save|distributed|dpo|kto|fim|autotuning|te_fp8_(?:amax|wgrad|margin))(?:_\w+)?"
)
#: All other options of a training run, which do not affect a forward pass.
HARMLESS = frozenset(
    """gas extra_sentinel_tokens
    pipe_parallel_size model_parallel_size pipe_partition_method world_size is_pipe_parallel sequence_parallel
    expert_interval precision intermediate_size feedforward_size expansion_factor mlp_multiple_of seq_length
    layernorm_fusion rmsnorm_fusion rms_norm_epsilon scalenorm_epsilon rpe_num_buckets rpe_max_distance
    param_sharing_style make_vocab_size_divisible_by padded_vocab_size use_flashattn_swiglu
    scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_dropout_fusion rope_fusion
    fp16_lm_cross_entropy init_method_std apply_query_key_layer_scaling use_cpu_initialization
    attention_softmax_in_fp32 rotary_save_freqs_buffer init_method output_layer_init_method gmlp_attn_dim
    mamba_selective_scan_fusion mamba_causal_conv_fusion mamba_inner_func_fusion mamba_selective_fp32_params
    mamba_use_bias_in_conv mamba_use_bias_in_linears output_layer_parallelism dim_att head_size ffn_dim
    optimizer_type use_bnb_optimizer zero_stage zero_reduce_scatter zero_contiguous_gradients zero_reduce_bucket_size
    zero_allgather_bucket_size lr lr_decay_style lr_decay_iters lr_decay_fraction min_lr warmup override_lr_scheduler
    use_checkpoint_lr_scheduler use_wandb wandb_group wandb_team wandb_project wandb_host wandb_init_all_ranks wandb
    git_hash log_dir tensorboard_writer tensorboard_dir tensorboard use_comet comet_workspace comet_project
    comet_experiment_name comet_tags comet_others comet_experiment log_interval log_grad_pct_zeros log_param_norm
    log_grad_norm log_optimizer_states log_gradient_noise_scale gradient_noise_scale_n_batches
    gradient_noise_scale_cpu_offload memory_profiling memory_profiling_path profile profile_step_start
    profile_step_stop distributed_backend local_rank rank lazy_mpu_init short_seq_prob eod_mask_loss adlr_autoresume
    adlr_autoresume_object adlr_autoresume_interval seed onnx_safe deepscale deepscale_config deepspeed_mpi
    deepspeed_slurm user_script iteration do_train do_valid do_test global_num_gpus tokenizer data_path use_shared_fs
    train_data_paths train_label_data_paths train_reward_data_paths test_data_paths test_label_data_paths
    test_reward_data_paths valid_data_paths valid_label_data_paths valid_reward_data_paths pos_train_data_paths
    neg_train_data_paths pos_train_label_data_paths neg_train_label_data_paths pos_valid_data_paths
    neg_valid_data_paths pos_valid_label_data_paths neg_valid_label_data_paths pos_test_data_paths
    neg_test_data_paths pos_test_label_data_paths neg_test_label_data_paths train_data_weights valid_data_weights
    test_data_weights weight_by_num_documents weighted_sampler_alpha data_impl pack_impl dataset_impl train_impl
    dpo_fp32 dpo_reference_free dpo_beta kto_fp32 kto_desirable_weight kto_undesirable_weight z_loss kto_beta
    allow_chopped mmap_warmup save s3_path s3_chunk_size config_files load checkpoint_validation_with_forward_pass
    checkpoint_scale checkpoint_factor save_interval extra_save_iters no_save_optim no_save_rng no_load_optim
    no_load_rng finetune batch_size train_iters train_epochs eval_iters keep_last_n_checkpoints eval_interval split
    vocab_file merge_file num_workers exit_interval attention_dropout hidden_dropout weight_decay
    checkpoint_activations checkpoint_num_layers deepspeed_activation_checkpointing contiguous_checkpointing
    checkpoint_in_cpu synchronize_each_layer profile_backward partition_activations clip_grad hysteresis
    dynamic_loss_scale loss_scale loss_scale_window min_scale char_level_ppl coord_check save_base_shapes
    base_shapes_file mup_init_scale mup_rp_embedding_mult mup_width_scale text_gen_type precompute_model_name
    temperature top_p top_k return_logits maximum_tokens prompt_end sample_input_file sample_output_file num_samples
    recompute eval_results_prefix eval_tasks moe_top_k use_tutel moe_loss_coeff moe_train_capacity_factor
    moe_eval_capacity_factor moe_min_capacity moe_token_dropping create_moe_param_group moe_use_residual
    moe_expert_parallel_size moe_type moe_glu moe_lbl_in_fp32 moe_jitter_eps enable_expert_tensor_parallelism
    deepspeed train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler
    fp32_allreduce prescale_gradients gradient_predivide_factor sparse_gradients fp16 bf16 amp gradient_clipping
    zero_optimization zero_allow_untested_optimizer curriculum_learning curriculum_seqlen steps_per_print
    wall_clock_breakdown dump_state flops_profiler communication_data_type autotuning activation_checkpointing
    data_efficiency csv_monitor elasticity comms_logger checkpoint data_types deepspeed_extra_args load_universal
    hostfile include exclude num_nodes num_gpus master_port master_addr launcher force_multi detect_nvlink_pairs
    autotuning_run no_ssh_check comment account is_preemptible""".split()
)


def _plain_attention(key: str, pattern: object) -> None:
    """Reject every attention kind but full causal attention.

    Raises:
        InputError: the pattern is malformed.
        UnsupportedError: it names another kind.
    """
    items = pattern if isinstance(pattern, list) else [pattern]
    kinds = [item[0] if isinstance(item, list) and item else None for item in items]
    if not all(isinstance(kind, list) for kind in kinds):
        raise InputError("wrong attention pattern", item=key, found=f"{pattern!r:.80}")
    strange = sorted({str(name) for kind in kinds for name in kind or ()} - {"global", "flash"})
    if strange:
        raise UnsupportedError(
            f"attention of kind {', '.join(strange)} is not implemented", item=key, expected="global or flash"
        )


def _rotary(values: Values) -> Rotary:
    width, heads = values["n_embd"], values["n_head"]
    dim = int(width // heads * values["share"]) if heads > 0 else 0
    if dim % 2:
        raise InputError("wrong value", item="rotary_pct", expected="an even number of features", found=str(dim))
    return Rotary(dim, values["base"])


def _activation(values: Values) -> str:
    """The activation formula; the fused kernel computes the tanh GELU."""
    return "gelu_tanh" if _is_fused(values) else str(values["activation"])


def _is_fused(values: Values) -> bool:
    return bool(values["fused_gelu"]) and values["activation"] == "gelu_erf"


def _end_of_text(values: Values) -> int | None:
    end = END_OF_TEXT.get(values["tokenizer"])
    return end if end is not None and end < values["vocab_size"] else None


OPTIONS = table(
    Key("max_position_embeddings", "n_ctx", WHOLE),
    Key("hidden_size", "n_embd", WHOLE),
    Key("num_layers", "n_layer", WHOLE),
    Key("num_attention_heads", "n_head", WHOLE),
    Key("num_kv_heads", "kv_heads", OPTIONAL_WHOLE, None),
    # One of Pythia's files spells it attention-configs.
    Key("attention_config", None, Kind(_plain_attention, nullable=True), None, aliases=("attention_configs",)),
    Key("pos_emb", None, choice({"rotary": None}), "learned"),
    Key("rotary_pct", "share", NUMBER, 1.0),
    Key("rotary_emb_base", "base", NUMBER, 10000.0),
    Key("norm", None, choice({"layernorm": None}), "layernorm"),
    Key("layernorm_epsilon", "norm_eps", NUMBER, 1e-5),
    Key("activation", "activation", choice(ACTIVATIONS), "gelu"),
    Key("bias_gelu_fusion", "fused_gelu", FLAG, False),
    Key("use_bias_in_attn_linear", "qkv_bias", FLAG, True),
    Key("gpt_j_residual", "residual", flag("parallel", "serial"), False),
    Key("no_weight_tying", "tied_head", flag(False, True), False),
    Key("tokenizer_type", "tokenizer", TEXT, "GPT2BPETokenizer"),
    harmless=HARMLESS,
    also=GROUPS,
    unused=UNUSED,
    derived={
        "activation": _activation,
        "rotary": _rotary,
        "attn_out_bias": lambda v: v["qkv_bias"],
        "bos_token_id": _end_of_text,
        "eos_token_id": _end_of_text,
    },
)


def read(given: ConfigInput) -> ReadConfig:
    """Read the trainer's options; the vocabulary size and the MLP width come from the shapes."""
    reading = OPTIONS.read(given.raw, given.path)
    groups = reading.values["kv_heads"]
    if groups not in (None, reading.values["n_head"]):
        raise UnsupportedError(
            "grouped-query attention is not implemented", path=given.path, item="num_kv_heads", found=groups
        )
    vocabulary = _rows(given.tensors, "word_embeddings.weight") or 0
    inner = _rows(given.tensors, *(f"{name}.weight".replace("{i}", "0") for name in (UP, NEW_UP))) or None
    fused = (
        "bias_gelu_fusion selects the tanh GELU, which is used here; Pythia's files on the hub select the erf GELU"
    )
    notes = [fused] if _is_fused(reading.values) else []
    return given.read(reading, notes, vocab_size=vocabulary, n_inner=inner)


def _rows(tensors: Mapping[str, LazyTensor], *names: str) -> int | None:
    """Number of rows of the first of these tensors that is present."""
    return next((tensors[name].shape[0] for name in names if name in tensors and tensors[name].shape), None)


LAYOUT = Layout(NEOX, read)
