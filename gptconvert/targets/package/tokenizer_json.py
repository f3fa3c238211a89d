"""A new ``tokenizer.json``, in the form that old and new versions of the tokenizers library read."""

from __future__ import annotations

import json
from typing import Any

from gptconvert.targets.package.tokenizer_kinds import Kind, Settings, token_text


def portable_json(tokenizer: Any, kind: Kind, settings: Settings) -> bytes:
    """tokenizer.json with merges as ``"a b"``, which all versions of the library read; since 0.20 it writes pairs."""
    raw = json.loads(tokenizer.to_str())
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    ends = {end: _end(tokenizer, f"{end}_token", kind, settings) for end in ("bos", "eos")}
    if any(ends.values()):
        raw["post_processor"] = _template(ends["bos"], ends["eos"])
    return json.dumps(raw, indent=2, ensure_ascii=False).encode()


def _end(tokenizer: Any, key: str, kind: Kind, settings: Settings) -> tuple[str, int] | None:
    """The token and id with which ``add_bos_token`` begins each text, or ``add_eos_token`` ends it; None if unset."""
    token = token_text(settings.get(key, kind.named.get(key)))
    number = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return (str(token), number) if settings.get(f"add_{key}") is True and number is not None else None


def _template(first: tuple[str, int] | None, last: tuple[str, int] | None) -> dict[str, object]:
    """The post-processor that adds special tokens around each text, as transformers writes it."""

    def around(sequence: str, type_id: int) -> list[object]:
        before, after = (
            [{"SpecialToken": {"id": end[0], "type_id": type_id}}] if end else [] for end in (first, last)
        )
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *after]

    tokens = {end[0]: {"id": end[0], "ids": [end[1]], "tokens": [end[0]]} for end in (first, last) if end}
    pair = [*around("A", 0), *around("B", 1)]
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": tokens}
