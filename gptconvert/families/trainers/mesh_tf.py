"""GPT-Neo as saved by its trainer: a Mesh-TensorFlow checkpoint.

Source: EleutherAI/gpt-neo (variables, options and their effects). Linear weights are [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptconvert.errors import UnsupportedError
from gptconvert.families.family import ConfigInput, Layout, ReadConfig, read_config_json
from gptconvert.families.keys import table
from gptconvert.families.pattern import expanded, unscaled, windows
from gptconvert.model.config_kinds import ANY, TOKEN, WHOLE, choice
from gptconvert.model.config_table import Key, Values
from gptconvert.model.resolution import find_prefix
from gptconvert.model.schemes import Drop, Row, Scheme
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import Transpose

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
#: Values of ``activation_fn``; the trainer does not read ``activation_function``, though its configurations have it.
ACTIVATIONS = {
    "gelu": "gelu_tanh",
    "relu": "relu",
    "lrelu001": "leaky_relu",
    "silu": "silu",
    "mish": "mish",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "id": "linear",
}
#: Options of data, schedule and performance.
HARMLESS = frozenset(
    """name model mode model_path dataset_ids datasets dataset_configs no_dataset data_seed padding_id n_words
    train_batch_size eval_batch_size predict_batch_size train_steps eval_steps predict_steps predict_max_steps steps
    iterations steps_per_checkpoint max_checkpoints eval_tasks lr lr_decay lr_decay_end warmup_steps beta1 beta2
    epsilon ada_epsilon1 ada_epsilon2 opt_name optimizer weight_decay gradient_clipping embed_dropout attn_dropout
    res_dropout scale_by_depth scale_by_in mesh_shape layout auto_layout auto_layout_and_mesh_shape recompute_grad
    num_microbatches tokens_per_mb_per_replica precision use_tpu activation_function z_loss moe_params
    stop_at_token remove_partial_sequences sampling_use_entmax slow_sampling entmax_loss_function
    export_dir train predict eval text_only log_grads encoder_path max_steps data_path input predict_path beta1_adam
    scale layer_offset fixed_attn_block_size""".split()
)
#: Trainer options that change the architecture → the value that switches them off.
UNUSED: Mapping[str, object] = {
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


def _released_windows(values: Values) -> tuple[int | None, ...]:
    """As :func:`windows`, but reject the trainer's other attention kinds by name.

    Raises:
        UnsupportedError: a kind is neither global nor local.
    """
    kinds = expanded(values["attention_types"], values["n_layer"]) or []
    strange = sorted({str(kind) for kind in kinds} - {"global", "local"})
    if strange:
        raise UnsupportedError(
            f"attention of kind {', '.join(strange)} is not implemented",
            item="attention_types",
            expected="global and local",
        )
    return windows(values, "local_attention_radius")


PARAMS = table(
    Key("n_vocab", "vocab_size", WHOLE),
    Key("n_ctx", "n_ctx", WHOLE, aliases=("n_positions",)),
    Key("n_embd", "n_embd", WHOLE),
    Key("n_layer", "n_layer", WHOLE),
    Key("n_head", "n_head", WHOLE),
    Key("activation_fn", "activation", choice(ACTIVATIONS), "gelu"),
    Key("local_attention_radius", "window", WHOLE, 256),
    Key("attention_types", "attention_types", replace(ANY, nullable=False)),
    Key("attention_layers", "attention_layers", ANY, None),
    Key("eos_id", "end", TOKEN, 50256),
    harmless=HARMLESS,
    unused=UNUSED,
    derived={
        "attn_scale": unscaled,
        "attn_window": _released_windows,
        "bos_token_id": lambda v: v["end"],
        "eos_token_id": lambda v: v["end"],
    },
)


def read(given: ConfigInput) -> ReadConfig:
    """Read the trainer's parameters, or the config.json that transformers' conversion script expects."""
    if "model_type" in given.raw:
        return read_config_json(given)
    reading = PARAMS.read(given.raw, given.path)
    vocabulary, notes = _with_padding(reading.values["vocab_size"], given.tensors)
    return given.read(reading, notes, vocab_size=vocabulary)


def _with_padding(vocabulary: int, tensors: Mapping[str, LazyTensor]) -> tuple[int, list[str]]:
    """The number of rows of the embedding, and a note if they exceed the vocabulary."""
    embedding = tensors.get(f"{find_prefix(MESH_TF, tensors)}wte")
    rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
    if rows <= vocabulary:
        return vocabulary, []
    return rows, [
        f"the embedding has {rows} rows for a vocabulary of {vocabulary}: all are kept (--trim-vocab {vocabulary})"
    ]


LAYOUT = Layout(MESH_TF, read)
