"""GPT-J: rotary positions on adjacent pairs, attention and MLP in parallel after one shared norm, an untied head.

Sources: kingoflolz/mesh-transformer-jax; Hugging Face ``GPTJConfig``. Linear weights are [out, in]; q, k, v and the
output projection have no bias; the head has a bias. The vocabulary of 50400 is GPT-2's, padded.
"""

from __future__ import annotations

from gptconvert.errors import UnsupportedError
from gptconvert.families import keys
from gptconvert.families.family import Family
from gptconvert.families.heads import embedding, hf_scheme, lm_head_bias
from gptconvert.families.precedence import (
    COMMON_NAMES,
    GPTJ_UNREAD,
    common_names_win,
    in_turn,
    without_default_scaling,
)
from gptconvert.families.rows import FINAL_NORM
from gptconvert.families.trainers import mesh_jax
from gptconvert.model.config_kinds import OPTIONAL_WHOLE, WHOLE
from gptconvert.model.config_table import Key, Values
from gptconvert.model.schemes import Drop, Row
from reference_model.config import Rotary

HEADS = {
    "text-generation": "GPTJForCausalLM",
    "feature-extraction": "GPTJModel",
    "text-classification": "GPTJForSequenceClassification",
    "question-answering": "GPTJForQuestionAnswering",
}
QKV = tuple(f"h.{{i}}.attn.{part}_proj.weight" for part in "qkv")

#: All tensors except q, k, v and the heads.
ROWS = (
    *embedding("wte.weight"),
    Row("h.{i}.ln_1.weight", "h.{i}.ln_1.weight", "D"),
    Row("h.{i}.ln_1.bias", "h.{i}.ln_1.bias", "D"),
    Row("h.{i}.attn.c_proj.weight", "h.{i}.attn.out_proj.weight", "D D"),
    Row("h.{i}.mlp.c_fc.weight", "h.{i}.mlp.fc_in.weight", "F D"),
    Row("h.{i}.mlp.c_fc.bias", "h.{i}.mlp.fc_in.bias", "F"),
    Row("h.{i}.mlp.c_proj.weight", "h.{i}.mlp.fc_out.weight", "D F"),
    Row("h.{i}.mlp.c_proj.bias", "h.{i}.mlp.fc_out.bias", "D"),
    *FINAL_NORM,
    Row("lm_head.bias", "lm_head.bias", "V", when=lm_head_bias, head=True),
)
HF = hf_scheme(
    *ROWS,
    Row("h.{i}.attn.c_attn.weight", QKV, "D D"),
    drops=(Drop(r"h\.\d+\.attn\.embed_positions", "table of rotary angles"),),
)


def _rotary(values: Values) -> Rotary:
    """Null rotates the whole head, which transformers can run only if there is a single head."""
    dim, heads = values["rotary_dim"], values["n_head"]
    if dim is None and heads != 1:
        raise UnsupportedError(
            "rotary_dim null works with a single head only, in transformers too",
            item="rotary_dim",
            expected=f"the number of rotated features per head, at most {values['n_embd'] // max(heads, 1)}",
            found=f"null, with {heads} heads",
            hint="set rotary_dim in config.json to the value that the model was trained with",
        )
    return Rotary(values["n_embd"] if dim is None else dim, interleaved=True)


CONFIG = keys.table(
    *keys.vocabulary(50400, tied=False, bos=50256, eos=50256),
    *keys.sizes(4096, 28, 16),
    Key("n_positions", "n_ctx", WHOLE, 2048, aliases=("max_position_embeddings",)),
    keys.inner("n_inner"),
    keys.NORM_EPS,
    Key("activation_function", "activation", keys.ACTIVATION, "gelu_new"),
    Key("rotary_dim", "rotary_dim", OPTIONAL_WHOLE, 64, of=lambda c: c.rotary.dim if c.rotary else None),
    harmless=keys.SUMMARY_KEYS,
    # Present in the released files, but read by no code; a GPT-J with "false" does not exist.
    unused={"scale_attn_weights": True, "rotary": True},
    writes={**keys.dropouts(0.0), **keys.ALWAYS},
    derived={"rotary": _rotary},
)
FIXED = {"residual": "parallel_one_norm", "qkv_bias": False, "attn_out_bias": False, "head_bias": True}

#: Also CodeGen's.
PRECEDENCE = in_turn(common_names_win(COMMON_NAMES), without_default_scaling)

FAMILY = Family(
    "gptj",
    "GPT-J",
    ("gptj",),
    HEADS,
    HF,
    CONFIG,
    trainers=(mesh_jax.LAYOUT,),
    precedence=PRECEDENCE,
    unread=GPTJ_UNREAD,
    fixed=FIXED,
)
