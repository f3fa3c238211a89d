"""The process that runs the tokenizers library. Started by :mod:`.tokenizer_process`, never imported."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers

from gptconvert.targets.child.frames import Arrays
from gptconvert.targets.child.server import Command, serve
from gptconvert.targets.package.tokenizer_kinds import behaviour

#: Number → tokenizer.
TOKENIZERS: dict[int, tokenizers.Tokenizer] = {}
NUMBERS = itertools.count()

Answer = tuple[Mapping[str, object], Arrays]


def load(_: Mapping[str, Any], arrays: Arrays) -> Answer:
    """Load the tokenizer.json in the array ``content``; return its number."""
    number = next(NUMBERS)
    TOKENIZERS[number] = tokenizers.Tokenizer.from_str(arrays["content"].tobytes().decode())
    return {"tokenizer": number, "size": TOKENIZERS[number].get_vocab_size()}, {}


def describe(request: Mapping[str, Any], _: Arrays) -> Answer:
    """How a tokenizer splits and merges; its tokens and their ids as JSON in an array."""
    tokenizer = TOKENIZERS[request["tokenizer"]]
    tokens = json.dumps(tokenizer.get_vocab(with_added_tokens=True)).encode()
    return {"behaviour": behaviour(tokenizer)}, {"tokens": np.frombuffer(tokens, np.uint8)}


def encode(request: Mapping[str, Any], _: Arrays) -> Answer:
    """The ids of ``text`` in an array; with ``plain``, of the whole text and without special tokens."""
    tokenizer, plain = TOKENIZERS[request["tokenizer"]], request["plain"]
    if plain:
        tokenizer.no_truncation()
        tokenizer.no_padding()
    ids = tokenizer.encode(request["text"], add_special_tokens=not plain).ids
    return {}, {"ids": np.asarray(ids, np.uint32)}


def decode(request: Mapping[str, Any], _: Arrays) -> Answer:
    """The text of ``ids``, with special tokens if ``special``."""
    tokenizer = TOKENIZERS[request["tokenizer"]]
    return {"text": tokenizer.decode(request["ids"], skip_special_tokens=not request["special"])}, {}


COMMANDS: Mapping[str, Command] = {"load": load, "describe": describe, "encode": encode, "decode": decode}


if __name__ == "__main__":
    serve(COMMANDS, f"tokenizers {tokenizers.__version__}")
