"""The client of :mod:`.tokenizer_worker`: tokenizers of unknown origin, run by the tokenizers library in a process.

A tokenizer.json can make the library panic, abort its process, allocate without bound (padding, precompiled tables)
or search without end (regular expressions). In a confined process, each of these is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from gptconvert.containers.json import parse_json
from gptconvert.errors import InputError
from gptconvert.targets.child.client import ChildError, ChildProcess, Limits
from gptconvert.targets.package.tokenizer_kinds import MAX_VALUES
from gptconvert.verify.probes import Integers
from gptconvert.verify.text import Encoder

#: Memory of the process, and per byte of tokenizer.json, of which the library needs up to 20.
MEMORY, MEMORY_PER_BYTE = 1 << 30, 64
#: Time for any request, and per byte; GPT-2's tokenizer.json of 1.4 MB loads in 0.1 s.
SECONDS, SECONDS_PER_BYTE = 8.0, 2 / (1 << 20)
#: A byte of a long text counts as this many of tokenizer.json: ideographs take 240 bytes of memory per byte.
BYTES_PER_TEXT_BYTE = 8
#: One thread: the library starts others only for batches, NumPy for nothing that happens here.
VARIABLES: Mapping[str, str] = {
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",
    "RUST_BACKTRACE": "0",
}


class _TokenizerLimits(Limits):
    """Limits in proportion to the size of tokenizer.json."""

    def seconds(self, tokens: int) -> float:
        """Time for one request on a text of ``tokens`` tokens or characters."""
        return SECONDS + SECONDS_PER_BYTE * (self.graph_bytes + tokens)


class TokenizerProcess(ChildProcess):
    """A tokenizers process; use as a context manager.

    Args:
        path: the tokenizer.json, for messages.
        size: bytes of all files to load.
    """

    module, program, subject = "gptconvert.targets.package.tokenizer_worker", "tokenizers", "tokenizer"

    def __init__(self, path: str, size: int) -> None:
        super().__init__(_TokenizerLimits(path, MEMORY + MEMORY_PER_BYTE * size, 0, size), VARIABLES)

    def failure(self, answer: Mapping[str, Any]) -> str:
        """The library's message, on one line."""
        return " ".join(answer["message"].split())[:200]

    def load(self, data: bytes, path: str) -> RemoteTokenizer:
        """The tokenizer in the tokenizer.json ``data``, which was read from ``path``.

        Raises:
            InputError: the library cannot read it.
            UnsafeInputError: reading it exceeds a limit, or ends the process.
        """
        try:
            answer = self.call("load", arrays={"content": np.frombuffer(data, np.uint8)})[0]
        except ChildError as error:
            parse_json(data, path, "tokenizer.json", MAX_VALUES)  # its message is better, if this is not JSON
            raise InputError("cannot be read by the tokenizers library", path=path, found=error) from error
        return RemoteTokenizer(self, path, answer["tokenizer"], answer["size"])


@dataclass(frozen=True)
class RemoteTokenizer:
    """A loaded tokenizer.

    Attributes:
        process: runs it.
        path: of its tokenizer.json, for messages.
        number: in the process.
        size: number of tokens.
    """

    process: TokenizerProcess
    path: str
    number: int
    size: int

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        """The ids of a text. Raises as :meth:`TokenizerProcess.load`.

        Args:
            text: the text.
            plain: from now on, ignore the truncation and padding that tokenizer.json sets, and add no special tokens.
        """
        ids: list[int] = self._ask("encode", len(text), text=text, plain=plain)[1]["ids"].tolist()
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of ids, with or without special tokens. Raises as :meth:`TokenizerProcess.load`."""
        text: str = self._ask("decode", len(ids), ids=list(ids), special=special)[0]["text"]
        return text

    def _ask(self, command: str, tokens: int, **request: object) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return self.process.call(command, tokens=tokens, tokenizer=self.number, **request)  # type: ignore[arg-type]
        except ChildError as error:
            message = f"the tokenizers library cannot {command} text with it"
            raise InputError(message, path=self.path, found=error) from error


@dataclass(frozen=True)
class Description:
    """A tokenizer.

    Attributes:
        tokens: token → id, added tokens included.
        behaviour: of :func:`.tokenizer_kinds.behaviour`.
    """

    tokens: Mapping[str, int]
    behaviour: list[object]


@lru_cache(maxsize=4)
def describe(data: bytes, path: str) -> Description:
    """Describe the tokenizer in the tokenizer.json ``data``. Raises as :meth:`TokenizerProcess.load`."""
    with TokenizerProcess(path, len(data)) as process:
        answer, arrays = process.load(data, path)._ask("describe", 0)
    return Description(json.loads(arrays["tokens"].tobytes()), answer["behaviour"])


def text_encoder(files: Mapping[str, bytes]) -> Encoder | None:
    """What tokenizes a whole text, in a process of its own; None if ``files`` (name → content) has no tokenizer."""
    data = files.get("tokenizer.json")
    return None if data is None else partial(_ids_of, data, "tokenizer.json")


def _ids_of(data: bytes, path: str, text: str) -> Integers:
    with TokenizerProcess(path, len(data) + BYTES_PER_TEXT_BYTE * len(text.encode())) as process:
        return np.asarray(process.load(data, path).encode(text, plain=True), np.int64)
