"""CodeGen: GPT-J's block under other names, with q, k and v in one tensor of four groups.

Sources: Nijkamp et al. 2022, "CodeGen"; salesforce/CodeGen; Hugging Face ``CodeGenConfig``. The rows of ``qkv_proj``
are [4, 3, D / 4]: one group per shard of the training run, each with its heads' q, then v, then k.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gptconvert.errors import InputError
from gptconvert.families import gptj, keys
from gptconvert.families.family import Family
from gptconvert.families.heads import hf_scheme
from gptconvert.families.precedence import GPTJ_UNREAD
from gptconvert.model.config_kinds import WHOLE
from gptconvert.model.config_table import Key, Values
from gptconvert.model.schemes import Drop, Row
from gptconvert.model.tensors import LazyTensor, Shape
from gptconvert.model.transforms import Sizes, take_rows
from reference_model.config import Rotary

GROUPS = 4
#: Position of the canonical q, k, v in a group of q, v, k. The permutation is its own inverse.
PLACES = (0, 2, 1)


@dataclass(frozen=True)
class Ungroup:
    """Rows [4, (q, v, k), D / 4] ↔ [(q, k, v), 4, D / 4]."""

    def forward(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return _blocks(tensor, (group * 3 + place for place in PLACES for group in range(GROUPS)))

    def inverse(self, tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
        return _blocks(tensor, (place * GROUPS + group for group in range(GROUPS) for place in PLACES))

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        return shape


def _blocks(tensor: LazyTensor, order: Iterable[int]) -> LazyTensor:
    """The twelve blocks of rows, reordered."""
    rows = tensor.shape[0] // (GROUPS * 3)
    return take_rows(tensor, [(block * rows, (block + 1) * rows) for block in order])


def _rotary(values: Values) -> Rotary:
    if values["n_head"] % GROUPS:
        expected = f"a multiple of {GROUPS}, the number of groups in qkv_proj"
        raise InputError("wrong value", item="n_head", expected=expected, found=str(values["n_head"]))
    return Rotary(values["rotary_dim"], interleaved=True)


CONFIG = keys.table(
    *keys.vocabulary(50400, tied=False, bos=50256, eos=50256),
    *keys.sizes(4096, 28, 16),
    Key("n_positions", "n_ctx", WHOLE, 2048, aliases=("max_position_embeddings",)),
    keys.inner("n_inner"),
    keys.NORM_EPS,
    Key("activation_function", "activation", keys.ACTIVATION, "gelu_new"),
    Key("rotary_dim", "rotary_dim", WHOLE, 64, of=lambda c: c.rotary.dim if c.rotary else None),
    harmless=(*keys.SUMMARY_KEYS, "n_ctx"),  # transformers writes n_ctx and reads n_positions
    unused={"scale_attn_weights": True, "rotary": True},
    writes={**keys.dropouts(0.0), **keys.ALWAYS},
    derived={"rotary": _rotary},
)

HEADS = {"text-generation": "CodeGenForCausalLM", "feature-extraction": "CodeGenModel"}
HF = hf_scheme(
    *gptj.ROWS,
    Row("h.{i}.attn.c_attn.weight", "h.{i}.attn.qkv_proj.weight", "3D D", (Ungroup(),)),
    drops=(
        Drop(r"h\.\d+\.attn\.causal_mask", "causal mask buffer"),
        Drop(r"h\.\d+\.attn\.embed_positions", "table of rotary angles"),
    ),
)

#: n_ctx is written, and so carried over.
UNREAD = {key: agrees for key, agrees in GPTJ_UNREAD.items() if key != "n_ctx"}

FAMILY = Family(
    "codegen",
    "CodeGen",
    ("codegen",),
    HEADS,
    HF,
    CONFIG,
    precedence=gptj.PRECEDENCE,
    unread=UNREAD,
    fixed=gptj.FIXED,
)
