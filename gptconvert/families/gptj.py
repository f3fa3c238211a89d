"""GPT-J: rotary positions on neighbouring pairs, attention and MLP side by side behind one norm, a head of its own.

Sources: kingoflolz/mesh-transformer-jax; Hugging Face ``GPTJConfig``. Linear weights are [out, in]; q, k, v and the
output projection have no bias; the head has one. The vocabulary of 50400 is GPT-2's, padded.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.errors import UsageError
from gptconvert.families.family import HF_ACTIVATION_NAME, HF_ACTIVATIONS, ConfigKeys, Family, per_layer, usual_scale
from gptconvert.families.heads import (
    HEAD_DROPS,
    HEAD_ROWS,
    SUMMARY_KEYS,
    choose_task,
    head_config,
    head_fields,
    lm_head_bias,
    own_lm_head,
    tied_lm_head,
)
from gptconvert.model.options import Options
from gptconvert.model.schemes import Drop, Order, Row, Scheme, Tied
from gptconvert.model.shards import COLUMNS, ROWS, SUM
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import Transpose
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
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
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


#: The trainer's own parameters (mesh-transformer-jax, Haiku), whose matrices are [in, out]. ``linear`` is q,
#: ``linear_1`` v, ``linear_2`` k: the order in which the program makes them. How parts become
#: tensors follows from the program's collectives: what is split over its output columns or input rows is laid side by
#: side; biases added on every shard before the sum over shards are summed; norms are read from the first shard, and
#: the copies of the others were never trained.
MESH_JAX = Scheme(
    name="mesh-jax",
    anchor="embedding_shard/~/linear/w",
    prefixes=("causal_transformer_shard/~/",),
    write_prefix="causal_transformer_shard/~/",
    rows=(
        # A row of the table and the biases are what the module gives for a token: no other program keeps them apart.
        Row("wte.weight", "embedding_shard/~/linear/w", "V D", shards=ROWS, added="embedding_shard/~/linear/b"),
        Row("h.{i}.ln_1.weight", "layer_{i}/~/replicated_layer_norm/scale", "D"),
        Row("h.{i}.ln_1.bias", "layer_{i}/~/replicated_layer_norm/offset", "D"),
        Row(
            "h.{i}.attn.c_attn.weight",
            ("layer_{i}/~/linear/w", "layer_{i}/~/linear_2/w", "layer_{i}/~/linear_1/w"),
            "D D",
            (Transpose(),),
            shards=COLUMNS,
        ),
        Row("h.{i}.attn.c_proj.weight", "layer_{i}/~/linear_3/w", "D D", (Transpose(),), shards=ROWS),
        Row("h.{i}.mlp.c_fc.weight", "layer_{i}/~/linear_4/w", "D F", (Transpose(),), shards=COLUMNS),
        Row("h.{i}.mlp.c_fc.bias", "layer_{i}/~/linear_4/b", "F", shards=ROWS),
        Row("h.{i}.mlp.c_proj.weight", "layer_{i}/~/linear_5/w", "F D", (Transpose(),), shards=ROWS),
        Row("h.{i}.mlp.c_proj.bias", "layer_{i}/~/linear_5/b", "D", shards=SUM),
        Row("ln_f.weight", "projection_shard/~/replicated_layer_norm/scale", "D"),
        Row("ln_f.bias", "projection_shard/~/replicated_layer_norm/offset", "D"),
        Row("lm_head.weight", "projection_shard/~/linear/w", "D V", (Transpose(),), when=own_lm_head, shards=COLUMNS),
        Row("lm_head.bias", "projection_shard/~/linear/b", "V", when=lm_head_bias, shards=ROWS),
    ),
    drops=(
        Drop(r"step", "training counter"),
        Drop(r"projection_shard/~/linear/[wb]", "language-model head", when=lambda c: not c.has_lm_head),
    ),
    # JAX flattens the tree of modules with its keys sorted. Adam keeps two copies of everything, and two counters.
    order=Order("name", last=("step",), optimizer=(2, 2)),
)
#: What the trainer's configuration of the released model says; the archive of its weights has none.
RELEASED: Mapping[str, object] = {
    "layers": 28,
    "d_model": 4096,
    "n_heads": 16,
    "n_vocab": 50400,
    "pe_rotary_dims": 64,
    "seq": 2048,
}
MESH_HARMLESS = frozenset(
    """name comment bucket model_dir train_set val_set eval_harness_tasks val_batches val_every ckpt_every keep_every
    tpu_size cores_per_replica per_replica_batch gradient_accumulation_steps warmup_steps anneal_steps total_steps lr
    end_lr weight_decay early_cast optimizer sampler seed wandb_project""".split()
)


def _mesh_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    raw, notes = (raw, []) if raw else _released(tensors)
    keys = ConfigKeys(raw, path)
    width, heads, layers = keys.integer("d_model"), keys.integer("n_heads"), keys.integer("layers")
    vocabulary = keys.integer("n_vocab")
    for key, only in (("pe", "rotary"), ("norm", "layernorm")):
        keys.choice(key, only, {only: None})
    end = 50256 if vocabulary > 50256 else None  # <|endoftext|> of GPT-2's tokenizer
    config = keys.build(
        family="gptj",
        vocab_size=vocabulary,
        n_ctx=keys.integer("seq"),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=4 * width,
        attn_scale=per_layer(usual_scale(width, heads), layers),
        attn_window=per_layer(None, layers),
        residual="parallel_one_norm",
        rotary=Rotary(keys.integer("pe_rotary_dims", width // heads if heads > 0 else 0), interleaved=True),
        qkv_bias=False,
        attn_out_bias=False,
        head_bias=True,
        tied_head=False,
        task=choose_task(HEADS, {}, path, tensors, request, tied=True),
        bos_token_id=end,
        eos_token_id=end,
    )
    keys.finish(harmless=MESH_HARMLESS)
    return config, {}, notes


def _released(tensors: Mapping[str, LazyTensor]) -> tuple[Mapping[str, object], list[str]]:
    """The released model's configuration, if the shapes are its shapes.

    Raises:
        UsageError: they are another model's, whose heads and rotary positions are in no shape.
    """
    prefix = MESH_JAX.write_prefix
    table = tensors.get(prefix + MESH_JAX.anchor)
    layers = sum(name.endswith("/~/linear_3/w") for name in tensors)
    found = (layers, *(table.shape if table is not None else ()))
    if found != (RELEASED["layers"], RELEASED["n_vocab"], RELEASED["d_model"]):
        raise UsageError(
            "no configuration beside the shards, and these are not the sizes of GPT-J 6B",
            expected="28 layers, an embedding of 50400 × 4096",
            found=f"{found[0]} layers, an embedding of {' × '.join(map(str, found[1:]))}",
            hint="pass the JSON file that the model was trained with: --hparams FILE",
        )
    note = (
        "no configuration beside the shards: the sizes are those of GPT-J 6B, so are 16 heads and 64 rotary features"
    )
    return RELEASED, [note]


FAMILY = Family(
    name="gptj",
    title="GPT-J",
    model_types=("gptj",),
    schemes=(HF, MESH_JAX),
    read_config={"hf": _hf_config, "mesh-jax": _mesh_config},
    write_config=_write_config,
    heads=HEADS,
)
