"""GPT-1, the first GPT: post-norm blocks and no final norm.

Sources: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training";
openai/finetune-transformer-lm ``train.py`` (tanh-GELU, eps 1e-5, order of the released arrays); Hugging Face
``OpenAIGPTConfig``. Conv1D weights are [in, out] in both; canonical linear weights are [out, in].

``afn: "gelu"`` of config.json means the tanh formula for this family; elsewhere it means the erf formula.
"""

from __future__ import annotations

from gptconvert.families import keys
from gptconvert.families.family import Family
from gptconvert.families.heads import embedding, hf_scheme
from gptconvert.families.precedence import COMMON_NAMES, common_names_win, in_turn, without_default_scaling
from gptconvert.families.rows import CONV1D_BLOCK
from gptconvert.families.trainers import openai_gpt1
from gptconvert.model.config_kinds import SIZE, WHOLE
from gptconvert.model.config_table import Key
from gptconvert.model.schemes import Drop, Row

HEADS = {
    "text-generation": "OpenAIGPTLMHeadModel",
    "feature-extraction": "OpenAIGPTModel",
    "text-classification": "OpenAIGPTForSequenceClassification",
    "multiple-choice": "OpenAIGPTDoubleHeadsModel",
}

HF = hf_scheme(
    # transformers 5 saves double heads under the head's name only, which transformers 4 cannot load.
    *embedding("tokens_embed.weight"),
    Row("wpe.weight", "positions_embed.weight", "C D"),
    *CONV1D_BLOCK,
    anchor="positions_embed.weight",
    drops=(Drop(r"position_ids", "position buffer"),),
)
CONFIG = keys.table(
    *keys.vocabulary(40478, tied=True, bos=None, eos=None),
    *keys.sizes(768, 12, 12),
    # n_ctx is the length of the training texts; n_positions, where present, is the number of rows of the table.
    Key("n_ctx", "text_length", SIZE, None),
    Key("n_positions", "n_ctx", WHOLE, lambda v: v["text_length"] or 512, aliases=("max_position_embeddings",)),
    keys.NORM_EPS,
    openai_gpt1.AFN,
    harmless=keys.SUMMARY_KEYS,
    writes={**keys.dropouts(0.1), **keys.SUMMARY_KEYS, "initializer_range": keys.ALWAYS["initializer_range"]},
)
FIXED = {"norm_position": "post", "final_norm": False}

FAMILY = Family(
    "gpt1",
    "GPT-1",
    ("openai-gpt",),
    HEADS,
    HF,
    CONFIG,
    trainers=(openai_gpt1.LAYOUT,),
    precedence=in_turn(common_names_win(COMMON_NAMES), without_default_scaling),
    fixed=FIXED,
    tokenizer="word-end",
)
