"""GPT-2 and DistilGPT-2.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; openai/gpt-2 ``src/model.py``
(variables, tanh-GELU, eps 1e-5); Hugging Face ``GPT2Config`` (config.json keys and the options added there).
Conv1D weights are [in, out] in both; canonical linear weights are [out, in].
"""

from __future__ import annotations

from gptconvert.families import keys
from gptconvert.families.family import Family
from gptconvert.families.heads import embedding, hf_scheme
from gptconvert.families.precedence import (
    COMMON_NAMES,
    common_names_win,
    in_turn,
    positions_from_the_table,
    without_default_scaling,
)
from gptconvert.families.rows import CONV1D_BLOCK, FINAL_NORM
from gptconvert.families.trainers import gguf, llmc, megatron, nanogpt, openai_tf
from gptconvert.model.config_kinds import FLAG, WHOLE
from gptconvert.model.config_table import MAX_LAYERS, Key, Values, usual_scale
from gptconvert.model.schemes import Row

HEADS = {
    "text-generation": "GPT2LMHeadModel",
    "feature-extraction": "GPT2Model",
    "text-classification": "GPT2ForSequenceClassification",
    "token-classification": "GPT2ForTokenClassification",
    "question-answering": "GPT2ForQuestionAnswering",
    "multiple-choice": "GPT2DoubleHeadsModel",
}


def _scale(values: Values) -> tuple[float, ...]:
    """The score factor of each layer: 1 / √(features per head) or 1, optionally divided by the layer index + 1."""
    scale = usual_scale(values["n_embd"], values["n_head"]) if values["scaled"] else 1.0
    by_layer, layers = values["by_layer"], min(values["n_layer"], MAX_LAYERS)
    return tuple(scale / (i + 1) if by_layer else scale for i in range(layers))


HF = hf_scheme(*embedding("wte.weight"), Row("wpe.weight", "wpe.weight", "C D"), *CONV1D_BLOCK, *FINAL_NORM)
CONFIG = keys.table(
    *keys.vocabulary(50257, tied=True, bos=50256, eos=50256),
    *keys.sizes(768, 12, 12),
    # llama.cpp reads n_ctx.
    Key("n_positions", "n_ctx", WHOLE, 1024, aliases=("max_position_embeddings",), repeats=("n_ctx",)),
    keys.inner("n_inner"),
    keys.NORM_EPS,
    Key("activation_function", "activation", keys.ACTIVATION, "gelu_new"),
    Key("scale_attn_weights", "scaled", FLAG, True, of=lambda c: c.attn_scale[0] == c.head_dim**-0.5),
    Key(
        "scale_attn_by_inverse_layer_idx",
        "by_layer",
        FLAG,
        False,
        of=lambda c: c.attn_scale[0] != c.attn_scale[-1],
    ),
    # The same mathematics, softmax kept in float32.
    Key("reorder_and_upcast_attn", None, FLAG, False, of=lambda c: False),
    harmless=keys.SUMMARY_KEYS,
    writes={**keys.dropouts(0.1), **keys.SUMMARY_KEYS, **keys.ALWAYS},
    derived={"attn_scale": _scale},
)

FAMILY = Family(
    "gpt2",
    "GPT-2, DistilGPT-2",
    ("gpt2",),
    HEADS,
    HF,
    CONFIG,
    trainers=(openai_tf.LAYOUT, *nanogpt.LAYOUTS, llmc.LAYOUT, *megatron.LAYOUTS, gguf.GPT2),
    precedence=in_turn(common_names_win(COMMON_NAMES), positions_from_the_table, without_default_scaling),
)
