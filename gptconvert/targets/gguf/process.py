"""The client of :mod:`.worker`: llama.cpp in a process, through the prebuilt wheel ``xllamacpp``.

llama.cpp answers requests for probabilities through its server, which needs an address. On Linux that is an abstract
Unix socket, which a confined process may open: no port, no file. Elsewhere it is a port of the loopback interface.
Either requires a random key, so no other program is served.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import UnsupportedError, install_hint
from gptconvert.publish.utf8_path import utf8_path
from gptconvert.targets.child.client import ChildError, ChildProcess, Limits

PACKAGE = "xllamacpp"
#: Above this many bytes of weights, llama.cpp must not keep a second copy in its kernels' layout.
LARGE = 600 << 20
#: Bytes of memory beside the weights, per id of the vocabulary: an answer names every id, as text.
ANSWER_BYTES = 4096
#: Tokens that are compared to find out whether two prompts are the same.
MOST_LIKELY = 20
#: Tokens that are asked for beside those needed, since equally likely ones may follow the last.
SPARE = 20
#: No debugger is started to describe a crash.
VARIABLES: Mapping[str, str] = {"GGML_NO_BACKTRACE": "1"}


class LlamaError(ChildError):
    """llama.cpp failed, or its process died; the message is one line."""


def is_installed() -> bool:
    """Whether llama.cpp can run here; does not import it."""
    return importlib.util.find_spec(PACKAGE) is not None


def require_llama() -> None:
    """Raise :class:`UnsupportedError` unless llama.cpp can run here."""
    if not is_installed():
        raise UnsupportedError(
            f"running GGUF files needs the Python package {PACKAGE} (llama.cpp), which is not installed",
            hint=install_hint("gguf"),
        )


class LlamaProcess(ChildProcess):
    """A llama.cpp process; use as a context manager.

    Args:
        limits: for a file of unknown origin; None for one that was just written.
    """

    module, program, subject, error = "gptconvert.targets.gguf.worker", "llama.cpp", "GGUF file", LlamaError

    def __init__(self, limits: Limits | None = None) -> None:
        require_llama()
        super().__init__(limits, VARIABLES)

    def load(self, path: str, nbytes: int, n_ctx: int, threads: int) -> None:
        """Load a model, with keys and values in float32.

        Args:
            path: of the file, the first of several.
            nbytes: of its weights.
            n_ctx: longest sequence.
            threads: to compute in.

        Raises:
            LlamaError: llama.cpp refuses the file.
            UnsafeInputError: a confined process exceeded its time, or died.
        """
        with utf8_path(os.path.abspath(path)) as readable:
            fields: dict[str, Any] = {"n_ctx": n_ctx, "threads": threads, "repack": nbytes <= LARGE}
            self.call("load", path=readable, **fields)

    def log_probabilities(
        self, ids: Sequence[int], vocabulary: int, most: int | None = None, *, cached: bool = False
    ) -> NDArray[np.float32]:
        """Log-probabilities [V] of the token after ``ids``.

        Args:
            ids: the whole sequence.
            vocabulary: V.
            most: how many of the largest are needed; the others may be −∞. None for all, of which each that llama.cpp
                does not return is NaN.
            cached: whether to reuse keys and values of the longest common beginning with the request before.

        Raises:
            LlamaError: llama.cpp refuses the request.
            UnsafeInputError: a confined process exceeded its time, or died.
        """
        count = vocabulary if most is None else min(most + SPARE, vocabulary)
        tokens, values = self._predict(list(ids), len(ids), count, cached=cached)
        found = np.full(vocabulary, np.nan if count == vocabulary else -np.inf, np.float32)
        inside = (tokens >= 0) & (tokens < vocabulary)
        found[tokens[inside]] = values[inside]
        return found

    def most_likely(self, prompt: Sequence[int] | str, tokens: int) -> list[tuple[int, float]]:
        """The most likely tokens after token ids or a text of about ``tokens`` tokens, and their log-probabilities.

        Raises as :meth:`log_probabilities`.
        """
        ids, values = self._predict(prompt if isinstance(prompt, str) else list(prompt), tokens, MOST_LIKELY)
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    def _predict(
        self, prompt: list[int] | str, tokens: int, most: int, *, cached: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        found = self.call("predict", tokens=tokens, prompt=prompt, most=most, cached=cached)[1]
        return np.asarray(found["ids"], np.int64), np.asarray(found["log_probabilities"], np.float32)


def limits_of(path: str, weight_bytes: int, head_bytes: int, vocabulary: int, n_ctx: int, width: int) -> Limits:
    """The limits for a file of unknown origin.

    Args:
        path: of the file.
        weight_bytes: of its weights.
        head_bytes: of its metadata.
        vocabulary: number of ids.
        n_ctx: longest sequence.
        width: bytes of keys and values per token.
    """
    plain = Limits.of(path, weight_bytes, head_bytes, None, n_ctx)
    return Limits(path, plain.memory + ANSWER_BYTES * vocabulary + 4 * n_ctx * width, weight_bytes, head_bytes)
