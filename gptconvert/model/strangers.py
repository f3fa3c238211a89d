"""Models that are not supported, recognised by the names of their tensors.

Sources: the modules of Lightning-AI/litgpt, facebookresearch/llama, karpathy/llama2.c, facebookresearch/fairseq,
TransformerLensOrg/TransformerLens, rasbt/LLMs-from-scratch, imcaspar/gpt2-ml, and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gptconvert.errors import UnsupportedError
from gptconvert.model.names import collapse


@dataclass(frozen=True)
class Stranger:
    """A program or model, and its names of tensors.

    Attributes:
        title: its name.
        pattern: regular expression found in the name of at least one of its tensors, and in no supported model's.
        advice: how to get a supported checkpoint; None if there is no way.
    """

    title: str
    pattern: str
    advice: str | None = None


#: The first match wins.
STRANGERS: tuple[Stranger, ...] = (
    Stranger(
        "LitGPT",
        r"transformer\.h\.\d+\.(attn\.(qkv|attn)\.|norm_1\.)",
        "run `litgpt convert_from_litgpt CHECKPOINT_DIR OUT`, put config.json next to OUT/model.pth, and pass that",
    ),
    Stranger("Llama or a similar model", r"tok_embeddings\.|layers\.\d+\.(attention\.wq|self_attn\.q_proj)\."),
    Stranger("BERT or RoBERTa", r"(bert|roberta)\.(embeddings|encoder)\."),
    Stranger("fairseq", r"decoder\.(embed_tokens\.|layers\.\d+\.self_attn\.)"),
    Stranger("T5", r"(encoder|decoder)\.block\.\d+\.layer\."),
    Stranger("BLOOM", r"word_embeddings_layernorm\.|h\.\d+\.self_attention\."),
    Stranger(
        "TransformerLens",
        r"blocks\.\d+\.attn\.[Wb]_[QKV]",
        "convert the Hugging Face model that it was loaded from",
    ),
    Stranger('"Build a Large Language Model (From Scratch)"', r"trf_blocks\.\d+\."),
    Stranger("gpt2-ml (Grover)", r"newslm/"),
)


def refusal(names: Iterable[str], path: str | None) -> UnsupportedError | None:
    """The error for tensors of a known but unsupported model; None if unknown."""
    names = sorted(names)
    found = next((each for each in STRANGERS if any(re.search(each.pattern, name) for name in names)), None)
    if found is None:
        return None
    return UnsupportedError(
        f"these are the tensors of {found.title}, which is not supported",
        path=path,
        found=", ".join(collapse(names)[:5]),
        hint=found.advice,
    )
