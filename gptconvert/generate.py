"""Continue a text with an exported model: the smallest honest use of an artifact.

Greedy, or sampling with temperature, top-k and top-p (Holtzman et al. 2020) from a seeded generator, in that order.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import InputError, UnsupportedError, UsageError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: upper bound of tokens to add.
        temperature: divides the logits; 0 is greedy.
        top_k: keep this many best tokens; None: all.
        top_p: keep the smallest set of best tokens whose probabilities reach this; None: all.
        seed: of the generator.
    """

    max_new_tokens: int = 50
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Runtime(Protocol):
    """A loaded model. Keeps its own keys and values."""

    n_ctx: int

    def step(self, ids: Sequence[int]) -> Floats:
        """Logits [V] after ``ids``, which continue what earlier steps were given."""
        ...


def choose(logits: Floats, sampling: Sampling, random: np.random.Generator) -> int:
    """The next token from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature  # [V]
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k]  # best first
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    if sampling.top_p is not None:
        keep = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order, weights = order[:keep], weights[:keep] / weights[:keep].sum()
    return int(random.choice(order, p=weights))


def continuation(
    runtime: Runtime, prompt: Sequence[int], sampling: Sampling, stop: int | None = None
) -> Iterator[int]:
    """New token ids, one by one, until ``stop``, the limit asked for, or the end of the context."""
    random = np.random.default_rng(sampling.seed)
    ids: Sequence[int] = prompt
    for _ in range(min(sampling.max_new_tokens, runtime.n_ctx - len(prompt))):
        token = choose(runtime.step(ids), sampling, random)
        if token == stop:
            return
        yield token
        ids = [token]


class OnnxRuntime:
    """An exported graph in onnxruntime, on the CPU, with plain ``session.run``."""

    def __init__(self, directory: str, config: Mapping[str, object]) -> None:
        import onnxruntime

        path = find_onnx(directory)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(f"onnxruntime cannot load the graph: {error}", path=path) from error
        self.n_ctx = context_length(config)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        if "logits" not in self.outputs:
            raise UnsupportedError("the graph has no output `logits`, so it cannot generate", path=path)
        self.seen: list[int] = []
        self.past: dict[str, Floats] = {
            name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
            for name, item in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def step(self, ids: Sequence[int]) -> Floats:
        self.seen += ids
        new = ids if self.past else self.seen
        start = len(self.seen) - len(new)
        feed: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, len(self.seen)), np.int64),
            "position_ids": np.arange(start, len(self.seen), dtype=np.int64)[None],
        }
        feed = {name: value for name, value in feed.items() if name in self.inputs} | dict(self.past)
        results = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        self.past = {name: results[name.replace("past_key_values", "present")] for name in self.past}
        logits: Floats = results["logits"][0, -1]
        return logits


#: runtime → how to load it.
RUNTIMES: Mapping[str, Callable[[str, Mapping[str, object]], Runtime]] = {"onnx": OnnxRuntime}


def find_onnx(directory: str) -> str:
    """The graph of an export: ``onnx/model.onnx``, a variant of it, or a graph at the top.

    Raises:
        InputError: there is none.
    """
    for pattern in ("onnx/model.onnx", "model.onnx", "onnx/model*.onnx", "*.onnx"):
        found = sorted(glob.glob(os.path.join(glob.escape(directory), pattern)))
        if found:
            return found[0]
    raise InputError("no ONNX graph here", path=directory, expected="onnx/model.onnx")


def context_length(config: Mapping[str, object]) -> int:
    """The longest sequence a config.json allows."""
    for key in ("n_positions", "n_ctx", "max_position_embeddings"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise InputError("config.json names no context length", expected="n_positions or max_position_embeddings")


@dataclass(frozen=True)
class Continued:
    """A running continuation.

    Attributes:
        prompt: the prompt's token ids.
        pieces: text as it comes; concatenated it is the continuation.
        ids: new token ids, filled while ``pieces`` is consumed.
    """

    prompt: tuple[int, ...]
    pieces: Iterator[str]
    ids: list[int]


def generate(directory: str, prompt: str, sampling: Sampling, runtime: str = "onnx") -> Continued:
    """Continue ``prompt`` with the model exported to ``directory``.

    Raises:
        InputError: the directory lacks the graph, config.json or tokenizer.json, or one of them is broken.
        UsageError: the prompt is empty or fills the context.
    """
    from tokenizers import Tokenizer

    tokenizer_path = os.path.join(directory, "tokenizer.json")
    config = _read_json(os.path.join(directory, "config.json"))
    if not os.path.isfile(tokenizer_path):
        hint = "the checkpoint had no tokenizer files; put the model's tokenizer.json there"
        raise InputError("no tokenizer.json, so text cannot be turned into tokens", path=directory, hint=hint)
    try:
        tokenizer = Tokenizer.from_file(tokenizer_path)
    except Exception as error:
        raise InputError(f"not a tokenizer: {error}", path=tokenizer_path) from error
    ids = tokenizer.encode(prompt).ids
    eos = config.get("eos_token_id")
    stop = eos if isinstance(eos, int) else None
    if not ids and stop is not None:
        ids = [stop]  # GPT-2 starts a text after the end of another
    if not ids:
        raise UsageError("the prompt is empty, and the model has no token to start with")
    n_ctx = context_length(config)
    if len(ids) >= n_ctx:
        raise UsageError("the prompt fills the context", expected=f"fewer than {n_ctx} tokens", found=len(ids))
    loaded = RUNTIMES[runtime](directory, config)
    new: list[int] = []

    def pieces() -> Iterator[str]:
        shown = ""
        for token in continuation(loaded, ids, sampling, stop):
            new.append(token)
            text = tokenizer.decode(new, skip_special_tokens=False)
            if not text.endswith("\ufffd"):  # a character may need several tokens
                yield text[len(shown) :]
                shown = text
        yield tokenizer.decode(new, skip_special_tokens=False)[len(shown) :] if new else ""

    return Continued(tuple(ids), pieces(), new)


def _read_json(path: str) -> Mapping[str, object]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        raise InputError("no such file", path=path, hint="DIR is a directory written by gptconvert") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", path=path)
    return value
