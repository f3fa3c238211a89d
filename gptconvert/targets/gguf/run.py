"""Runs a GGUF file token by token in llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.gguf import GgufModel, is_later_file, read_gguf
from gptconvert.containers.untrusted import entries
from gptconvert.errors import InputError, UnsupportedError, short_repr
from gptconvert.sources.gguf import TOKENS
from gptconvert.targets.context import MOST, context_length
from gptconvert.targets.gguf.layout import ARCHITECTURES
from gptconvert.targets.gguf.process import LlamaError, LlamaProcess, limits_of, require_llama
from gptconvert.verify.background import half_the_cores

Floats = NDArray[np.float32]
#: Ends of names, in order of preference.
PREFERRED = ("-F16", "-BF16", "-F32", "-Q8_0", "-Q5_0", "-Q4_0")
KNOWN = frozenset(architecture.name for architecture in ARCHITECTURES.values())


class GgufRuntime:
    """A GGUF file in llama.cpp, on the CPU, in a confined process of its own.

    Each step passes the whole text, of which llama.cpp keeps keys and values, and returns log-probabilities, which
    are logits up to a constant.
    """

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        path = self.path = find_gguf(directory)
        require_llama()
        model = read_gguf(path)
        self.vocab_size: int | None = _vocabulary(model, path)
        self.n_ctx = min(context_length(config), _size(model, "context_length"))
        self.texts: list[list[int]] = [[]]
        self.most: int | None = None
        nbytes = sum(tensor.stored.nbytes for tensor in model.tensors.values())
        head = sum(os.path.getsize(file) for file in model.files) - nbytes
        width = 8 * _size(model, "block_count") * _size(model, "embedding_length")  # of keys and values per token
        limits = limits_of(path, nbytes, head, self.vocab_size, self.n_ctx, width)
        self.process = LlamaProcess(limits)
        try:
            # llama.cpp's threads spin until all are done: one that has no core stops the others.
            self.process.load(path, nbytes, self.n_ctx, half_the_cores())
        except LlamaError as error:
            self.close()
            raise InputError("llama.cpp cannot load the file", path=path, found=error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self.process.close()

    def step(self, rows: Sequence[Sequence[int]], parents: Sequence[int]) -> Floats:
        before = self.texts if self.texts[0] else [[]] * (max(parents) + 1)
        self.texts = [[*before[parent], *row] for parent, row in zip(parents, rows, strict=True)]
        try:
            return np.stack([self._after(text) for text in self.texts])
        except LlamaError as error:
            raise InputError("llama.cpp cannot run the file", path=self.path, found=error) from error

    def reset(self, most: int | None = None) -> None:
        self.texts, self.most = [[]], most

    def _after(self, text: Sequence[int]) -> Floats:
        return self.process.log_probabilities(text, self.vocab_size or MOST, self.most, cached=True)


def find_gguf(directory: str) -> str:
    """The GGUF file of an export with the most exact weights that are not larger than needed: float16 first.

    Raises:
        InputError: there is none.
    """
    names = [name for name in entries(directory, files_only=True) if name.endswith(".gguf")]
    found = [name for name in names if not is_later_file(name)]
    if not found:
        raise InputError(
            "no GGUF file here",
            path=directory,
            expected="*.gguf",
            hint="convert with --to gguf, or choose another --runtime",
        )
    ranked = {name: next((i for i, kind in enumerate(PREFERRED) if kind in name), len(PREFERRED)) for name in found}
    return os.path.join(directory, min(found, key=lambda name: (ranked[name], name)))


def _vocabulary(model: GgufModel, path: str) -> int:
    """The number of ids.

    Raises:
        UnsupportedError: the file is not of an architecture that this program writes.
        InputError: the file has no tokens.
    """
    architecture = model.metadata.get("general.architecture")
    if architecture not in KNOWN:
        expected = " or ".join(sorted(KNOWN))
        raise UnsupportedError(
            "the file is of another architecture", path=path, expected=expected, found=architecture
        )
    tokens = model.metadata.get(TOKENS)
    if not isinstance(tokens, list) or not tokens:
        raise InputError("the file has no tokens", path=path, item=TOKENS)
    return len(tokens)


def _size(model: GgufModel, key: str) -> int:
    """A size in the metadata of the architecture.

    Raises:
        InputError: it is missing, or impossible.
    """
    key = f"{model.metadata['general.architecture']}.{key}"
    value = model.metadata.get(key)
    if type(value) is not int or not 0 < value < MOST:
        raise InputError("wrong value", path=model.files[0], item=key, expected="a size", found=short_repr(value))
    return value
