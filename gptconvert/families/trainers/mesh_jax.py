"""GPT-J as saved by mesh-transformer-jax: sharded arrays of a Haiku program.

Source: kingoflolz/mesh-transformer-jax. Linear weights are [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.errors import UsageError
from gptconvert.families.family import ConfigInput, Layout, ReadConfig
from gptconvert.families.heads import lm_head_bias, own_lm_head
from gptconvert.families.keys import table
from gptconvert.families.trainers.sizes import GPT2_END
from gptconvert.model.config_kinds import WHOLE, choice
from gptconvert.model.config_table import Key, Values
from gptconvert.model.schemes import Drop, Order, Row, Scheme
from gptconvert.model.shards import COLUMNS, ROWS, SUM
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import Transpose
from reference_model.config import Rotary

#: ``linear`` is q, ``linear_1`` v and ``linear_2`` k, the order in which the program creates them. The shard rules
#: follow from the program's collectives: matrices split by output columns or input rows are concatenated; biases
#: added on every shard before the sum over shards are summed; norms are taken from the first shard, because the
#: other shards' copies were never trained.
MESH_JAX = Scheme(
    name="mesh-jax",
    anchor="embedding_shard/~/linear/w",
    prefixes=("causal_transformer_shard/~/",),
    write_prefix="causal_transformer_shard/~/",
    rows=(
        # The module embeds a token as its row plus the biases; other programs store the sum.
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
    # JAX flattens the module tree in key order. Adam's state is two copies of every tensor and two counters.
    order=Order("name", last=("step",), optimizer=(2, 2)),
)
#: The trainer's configuration of the released model; the archive of its weights does not contain it.
RELEASED: Mapping[str, object] = {
    "layers": 28,
    "d_model": 4096,
    "n_heads": 16,
    "n_vocab": 50400,
    "pe_rotary_dims": 64,
    "seq": 2048,
}
#: Options of data, schedule and performance.
HARMLESS = frozenset(
    """name comment bucket model_dir train_set val_set eval_harness_tasks val_batches val_every ckpt_every keep_every
    tpu_size cores_per_replica per_replica_batch gradient_accumulation_steps warmup_steps anneal_steps total_steps lr
    end_lr weight_decay early_cast optimizer sampler seed wandb_project""".split()
)


def _end_of_text(values: Values) -> int | None:
    """``<|endoftext|>`` of GPT-2's tokenizer, if the vocabulary is large enough."""
    return GPT2_END if values["vocab_size"] > GPT2_END else None


def _whole_head(values: Values) -> int:
    return int(values["n_embd"] // values["n_head"]) if values["n_head"] > 0 else 0


PARAMS = table(
    Key("n_vocab", "vocab_size", WHOLE),
    Key("seq", "n_ctx", WHOLE),
    Key("d_model", "n_embd", WHOLE),
    Key("layers", "n_layer", WHOLE),
    Key("n_heads", "n_head", WHOLE),
    Key("pe", None, choice({"rotary": None}), "rotary"),
    Key("pe_rotary_dims", "rotary_dim", WHOLE, _whole_head),
    Key("norm", None, choice({"layernorm": None}), "layernorm"),
    harmless=HARMLESS,
    derived={
        "rotary": lambda v: Rotary(v["rotary_dim"], interleaved=True),
        "tied_head": lambda v: False,
        "bos_token_id": _end_of_text,
        "eos_token_id": _end_of_text,
    },
)


def read(given: ConfigInput) -> ReadConfig:
    """Read the training configuration (JSON); without it, use that of the released model."""
    raw, notes = (given.raw, []) if given.raw else _released(given.tensors)
    return given.read(PARAMS.read(raw, given.path), notes)


def _released(tensors: Mapping[str, LazyTensor]) -> tuple[Mapping[str, object], list[str]]:
    """The released model's configuration, if the shapes match.

    Raises:
        UsageError: the shapes differ; they do not determine the number of heads and the rotary width.
    """
    prefix = MESH_JAX.write_prefix
    table = tensors.get(prefix + MESH_JAX.anchor)
    layers = sum(name.endswith("/~/linear_3/w") for name in tensors)
    found = (layers, *(table.shape if table is not None else ()))
    if found != (RELEASED["layers"], RELEASED["n_vocab"], RELEASED["d_model"]):
        raise UsageError(
            "no configuration next to the shards, and the sizes are not those of GPT-J 6B",
            expected="28 layers, an embedding of 50400 × 4096",
            found=f"{found[0]} layers, an embedding of {' × '.join(map(str, found[1:]))}",
            hint="pass the JSON configuration of the training run: --hparams FILE",
        )
    note = "no configuration next to the shards: sizes match GPT-J 6B; 16 heads and 64 rotary features assumed"
    return RELEASED, [note]


LAYOUT = Layout(MESH_JAX, read)
