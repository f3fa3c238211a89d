"""A small GPT-1 tokenizer, in any of its released forms."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tests.helpers import ROOT

REAL = ROOT.parent / "shared" / "data" / "openai-gpt1"
UNKNOWN, NEWLINE = "<unk>", "\n</w>"
OPENAI = ("encoder_bpe_40000.json", "vocab_40000.bpe")
HUGGING_FACE = ("vocab.json", "merges.txt")
#: Each occurs with and without the end-of-word mark. Accented letters are composed, as in GPT-1's vocabulary.
SYMBOLS = [*"abcdefghijklmnopqrstuvwxyz", *"013.,'\"!?-#", "é", "ñ", "日"]
#: Pairs that occur in both orders, overlap, begin with a hash, and end words.
MERGES = [
    ("t", "h"),
    ("th", "e</w>"),
    ("i", "n"),
    ("in", "g</w>"),
    ("#", "#"),
    ("##", "#</w>"),
    ("e", "r</w>"),
    ("a", "a"),
    ("aa", "a"),
    ("é", "s</w>"),
    ("0", "1</w>"),
    ("th", "er</w>"),
    (".", ".</w>"),
    ("'", "t</w>"),
    ("n", "'t</w>"),
    ("n", "'"),
]
SIZE = 2 + 2 * len(SYMBOLS) + len(MERGES)


def symbols() -> dict[str, int]:
    """The vocabulary. Unlike OpenAI's, its unknown token is not id 0, and its symbols are not ordered."""
    merged = ["".join(pair) for pair in MERGES]
    every = [*SYMBOLS[::-1], UNKNOWN, *merged, *(f"{symbol}</w>" for symbol in SYMBOLS), NEWLINE]
    return {symbol: number for number, symbol in enumerate(every)}


def write_pair(
    directory: Path, names: Iterable[str] = OPENAI, vocabulary: dict[str, int] | None = None
) -> dict[str, str]:
    """The vocabulary and the merges in files of these names; name → path."""
    directory.mkdir(exist_ok=True, parents=True)
    lines = "".join(f"{a} {b}\n" for a, b in MERGES)
    contents = (json.dumps(vocabulary or symbols()), "#version: 0.2\n" + lines)
    for name, content in zip(names, contents, strict=True):
        (directory / name).write_text(content, "utf-8")
    return {name: str(directory / name) for name in names}
