"""Unsupported models are recognised by their tensors, and supported ones never are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptconvert.errors import UnsupportedError
from gptconvert.families.family import Family
from gptconvert.families.registry import FAMILIES
from gptconvert.model.options import Options
from gptconvert.model.strangers import STRANGERS, refusal
from gptconvert.sources.detect import open_source

#: Title → names in its files.
NAMES = {
    "LitGPT": ("transformer.wte.weight", "transformer.h.0.attn.qkv.weight"),
    "Llama or a similar model": ("tok_embeddings.weight", "layers.0.attention.wq.weight"),
    "BERT or RoBERTa": ("roberta.embeddings.word_embeddings.weight",),
    "fairseq": ("decoder.embed_tokens.weight",),
    "T5": ("decoder.block.0.layer.0.SelfAttention.q.weight",),
    "BLOOM": ("transformer.h.0.self_attention.query_key_value.weight",),
    "TransformerLens": ("embed.W_E", "blocks.0.attn.W_Q"),
    '"Build a Large Language Model (From Scratch)"': ("tok_emb.weight", "trf_blocks.0.att.W_query.weight"),
    "gpt2-ml (Grover)": ("newslm/embeddings/word_embed", "newslm/layer00/query_layer/kernel"),
}


@pytest.mark.parametrize("title", NAMES)
def test_a_file_of_such_tensors_is_refused_by_name(title: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"model_state_dict": {name: torch.ones(2, 3) for name in NAMES[title]}, "epoch": 1}, file)
    for path in (tmp_path, file):
        with pytest.raises(UnsupportedError) as caught:
            open_source(path, Options())
        assert f"the tensors of {title}, which is not supported" in str(caught.value)
        assert NAMES[title][0] in str(caught.value)


def test_every_stranger_is_tested() -> None:
    assert NAMES.keys() == {each.title for each in STRANGERS}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_supported_model_is_a_stranger(family: Family) -> None:
    for scheme in family.schemes:
        names = [name.replace("{i}", "1") for row in scheme.rows for name in (*row.names, *row.aliases)]
        for prefix in scheme.prefixes or ("", "transformer.", "gpt_neox.", "model.", "decoder.", "encoder."):
            assert refusal((prefix + name for name in names), None) is None
