"""GPT-J as its trainer saves it: shards of a Haiku program's arrays.

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
#: How a model was trained, on what, and how fast.
HARMLESS = frozenset(
    """name comment bucket model_dir train_set val_set eval_harness_tasks val_batches val_every ckpt_every keep_every
    tpu_size cores_per_replica per_replica_batch gradient_accumulation_steps warmup_steps anneal_steps total_steps lr
    end_lr weight_decay early_cast optimizer sampler seed wandb_project""".split()
)


def _end_of_text(values: Values) -> int | None:
    """``<|endoftext|>`` of GPT-2's tokenizer, where the vocabulary has that many entries."""
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
    """From the JSON file that the model was trained with; without it, the released model's."""
    raw, notes = (given.raw, []) if given.raw else _released(given.tensors)
    return ReadConfig(given.config(PARAMS.read(raw, given.path)), {}, notes)


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


LAYOUT = Layout(MESH_JAX, read)
