"""The model card's transformers snippet for the safetensors of an export."""

from __future__ import annotations

from gptconvert.targets.target import CardFacts, Snippet

GENERATE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
output = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(output[0]))
"""
LOAD = """
from transformers import {auto}

model = {auto}.from_pretrained(".")
"""


def _transformers(facts: CardFacts) -> str:
    if facts.generates and facts.tokenized:
        return GENERATE
    return LOAD.format(auto="AutoModelForCausalLM" if facts.generates else "AutoModel")


SNIPPETS = (Snippet("transformers", "python", _transformers),)
