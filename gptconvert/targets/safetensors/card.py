"""The model card's transformers snippet for the safetensors of an export."""

from __future__ import annotations

from gptconvert.targets.python_code import auto_class, python_code
from gptconvert.targets.target import CardFacts, Snippet


def _transformers(facts: CardFacts) -> str:
    return python_code(facts, "transformers", auto_class(facts))


SNIPPETS = (Snippet("transformers", "python", _transformers),)
