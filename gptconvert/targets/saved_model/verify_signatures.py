"""Verifies the other signatures against ``serving_default`` and ``decode``, which are compared with the truth.

Two runs that are each within a distance of the truth are within twice that distance of each other. That distance is
known by then, so no further tolerance is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.generation import SpecialIds
from gptconvert.model.tensors import Array
from gptconvert.targets.saved_model.contract import INT32, XLA, inputs_of, signature_names
from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess
from gptconvert.verify.greedy import Continuation
from gptconvert.verify.outputs import Group
from gptconvert.verify.probes import MOST_RANDOM, Integers
from gptconvert.verify.runners import one_line
from reference_model.config import CACHED_TASKS, GPTConfig

Arrays = Mapping[str, Array]
#: Tokens to generate.
NEW_TOKENS = 8
NAME = "other signatures"
#: Temperatures at which any two tokens are equally likely, and at which all but the best are not drawn.
HOT, COLD = 1e6, 1e-3
#: A token drawn at ``COLD`` is this far below the best one, or more, with a chance of e⁻⁴⁰.
FAR = 40 * COLD
#: Texts drawn at ``HOT`` are compared if they agree, or end at once, with a chance below e to this power, negated.
UNLIKELY = 25.0


def check_other_signatures(
    tensorflow: TensorFlowProcess,
    checkpoint: Checkpoint,
    present: Sequence[str],
    groups: Sequence[Group],
    seed: int = 0,
    *,
    thorough: bool = False,
) -> tuple[Group, Continuation | None]:
    """Check the signatures ``present`` in the loaded model, given the ``groups`` that have passed.

    Any ``seed`` but 0 draws the size of the batch, too. ``thorough`` also checks which tokens
    ``generate`` draws, and where it ends.

    Returns:
        a group without figures, and the greedy continuation of ``generate`` (None without such a signature).
    """
    allowed: dict[str, float] = {}
    for measure in (m for group in groups for m in group.measures.values()):
        allowed[measure.tensor] = max(allowed.get(measure.tensor, 0.0), 2 * measure.most)
    config = checkpoint.config
    check = _Check(tensorflow, config, checkpoint.special_ids, allowed, seed)
    group = Group(NAME)
    try:
        group.problems += check.int32()
        if "generate" in signature_names(config):
            group.problems += check.last_logits()
            if config.n_ctx > 1:  # one token of prompt leaves room for another
                group.problems += check.generate("generate", check.prompts)
                group.problems += check.limits() if thorough else ()
        if any(name.endswith(XLA) for name in present):
            group.problems += check.twins()
    except TensorFlowError as error:
        group.problems.append(f"a run failed: {one_line(error)}")
    group.tokens = check.tokens
    return group, check.greedy


class _Check:
    """The inputs, and one method per signature."""

    def __init__(
        self,
        tensorflow: TensorFlowProcess,
        config: GPTConfig,
        special: SpecialIds,
        allowed: Mapping[str, float],
        seed: int,
    ) -> None:
        self.tensorflow, self.config, self.special, self.allowed = tensorflow, config, special, allowed
        self.random = np.random.default_rng([1, seed])
        self.tokens = 0
        self.greedy: Continuation | None = None
        rows, length = 3, 7
        if seed:
            rows, length = int(self.random.integers(3, 10)), int(self.random.integers(1, MOST_RANDOM + 1))
        length = max(1, min(length, config.n_ctx - NEW_TOKENS))
        mask = np.ones((rows, length), np.int64)
        mask[1, : length // 2], mask[2, length - length // 2 :] = 0, 0  # left and right padding
        self.prompts = self._inputs(mask)

    def _inputs(self, mask: Integers) -> dict[str, Array]:
        """Random ids [B, S] under a mask; for multiple-choice one question with B choices."""
        batch, length = mask.shape
        self.tokens += int(mask.sum())
        ids = self.random.integers(0, self.config.vocab_size, (batch, length))
        inputs: dict[str, Array] = {"input_ids": ids, "attention_mask": mask}
        if self.config.task == "multiple-choice":
            inputs["mc_token_ids"] = np.asarray(self.random.integers(0, length, batch))
            return {name: array[None] for name, array in inputs.items()}
        return inputs

    def int32(self) -> Iterator[str]:
        """The int32 twin equals ``serving_default``."""
        narrow = {name: array.astype(np.int32) for name, array in self.prompts.items()}
        yield from self._same(INT32, narrow, self.tensorflow.run("serving_default", self.prompts))

    def last_logits(self) -> Iterator[str]:
        """The logits are those of each row's last real token."""
        logits = self.tensorflow.run("serving_default", self.prompts)["logits"]
        last = _last_real(self.prompts["attention_mask"])
        yield from self._same("last_logits", self.prompts, {"logits": logits[np.arange(len(last)), last]})

    def generate(self, name: str, prompts: Arrays) -> Iterator[str]:
        """Greedy picks a best token each time, with any padding; sampling is reproducible by seed."""
        greedy = self._sequences(name, prompts, temperature=0.0)
        yield from (f"{name}, greedy: {problem}" for problem in self._unlikely(greedy, prompts))
        narrowed = self._sequences(name, prompts, temperature=1.0, top_k=1, seed=1)
        yield from (f"{name}, top_k 1: {problem}" for problem in self._unlikely(narrowed, prompts))
        first, second = (self._sequences(name, prompts, temperature=1.0, seed=7) for _ in range(2))
        if not np.array_equal(first, second):
            yield f"{name}: the same seed gives different texts"

    def limits(self) -> Iterator[str]:
        """``generate`` ends with the context, and draws from the ``top_k`` best tokens, by temperature and seed."""
        prompts, vocabulary = self.prompts, self.config.vocab_size
        long = self._inputs(np.ones((1, max(1, self.config.n_ctx - 3)), np.int64))
        full = self._sequences("generate", long, temperature=0.0)
        yield from (f"generate, to the end of the context: {problem}" for problem in self._unlikely(full, long))
        few = self._sequences("generate", prompts, temperature=HOT, top_k=3, seed=1)
        yield from (f"generate, top_k 3: {problem}" for problem in self._unlikely(few, prompts, among=3))
        cold = self._sequences("generate", prompts, temperature=COLD, seed=2)
        yield from (f"generate, temperature {COLD:g}: {p}" for p in self._unlikely(cold, prompts, slack=FAR))
        hot, other = (self._sequences("generate", prompts, temperature=HOT, seed=seed) for seed in (3, 4))
        draws = min(2 * len(hot), hot.size - prompts["input_ids"].size - len(hot))
        if draws * np.log(vocabulary) > UNLIKELY:
            if np.array_equal(hot, other):
                yield "generate: two seeds give the same text at a high temperature"
            if all(problem.startswith("token 0 ") for problem in self._unlikely(hot, prompts)):
                yield "generate: at a high temperature, all tokens but the first are the best ones"

    def twins(self) -> Iterator[str]:
        """Compiled signatures equal the plain ones on a left-padded sequence as long as the context."""
        n_ctx, config = self.config.n_ctx, self.config
        mask = np.zeros((1, n_ctx), np.int64)
        mask[:, -max(1, min(5, n_ctx - NEW_TOKENS)) :] = 1
        inputs = self._inputs(mask)
        yield from self._same("serving_default" + XLA, inputs, self.tensorflow.run("serving_default", inputs))
        if config.task in CACHED_TASKS:
            step = {
                **inputs,
                "input_ids": inputs["input_ids"][:, -1:],
                "position_ids": mask.sum(1, keepdims=True) - 1,
            }
            for key, (_, shape) in inputs_of(config, "decode" + XLA).items():
                if key.startswith("past_key_values."):
                    step[key] = self.random.standard_normal(
                        [1 if size is None else size for size in shape], np.float32
                    )
            yield from self._same("decode" + XLA, step, self.tensorflow.run("decode", step))
        if "generate" in signature_names(config):
            yield from self._same("last_logits" + XLA, inputs, self.tensorflow.run("last_logits", inputs))
            if n_ctx > 1:
                yield from self.generate("generate" + XLA, inputs)

    def _same(self, signature: str, inputs: Arrays, expected: Arrays) -> Iterator[str]:
        """Yield the outputs of a signature that differ from ``expected`` by more than two good runs may."""
        for name, array in self.tensorflow.run(signature, inputs).items():
            if array.shape != expected[name].shape:
                yield f"{signature}: {name} has shape {list(array.shape)}, expected {list(expected[name].shape)}"
            elif not np.abs(np.subtract(array, expected[name], dtype=np.float64)).max() <= self.allowed[name]:
                yield f"{signature}: {name} differs from the plain signature's"

    def _sequences(
        self, name: str, prompts: Arrays, *, temperature: float, top_k: int = 0, seed: int = 0
    ) -> Integers:
        choices = {"max_new_tokens": np.int64(NEW_TOKENS), "top_k": np.int64(top_k), "seed": np.int64(seed)}
        inputs = {**prompts, **choices, "temperature": np.float32(temperature)}
        return self.tensorflow.run(name, inputs)["sequences"].astype(np.int64)  # type: ignore[arg-type]

    def _unlikely(self, sequences: Integers, prompts: Arrays, *, among: int = 1, slack: float = 0.0) -> Sequence[str]:
        """The errors of a continuation by the best ``among`` tokens, by the logits of ``serving_default``."""
        ids = prompts["input_ids"].astype(np.int64)
        room = self.config.n_ctx - int(prompts["attention_mask"].sum(1).max())
        news = _new_tokens(ids, sequences, room)
        checked = [self._continued(n, sequences, prompts, room, among, slack) for n in news]
        if not checked:
            return ["the sequences do not begin with the prompt"]
        made, errors = min(checked, key=lambda each: len(each[1]))
        self.greedy = self.greedy or made
        return errors

    def _continued(
        self, new: int, sequences: Integers, prompts: Arrays, room: int, among: int, slack: float
    ) -> tuple[Continuation, Sequence[str]]:
        """The continuation by the last ``new`` tokens, and its errors."""
        ids, mask = prompts["input_ids"].astype(np.int64), prompts["attention_mask"].astype(np.int64)
        mask = np.concatenate((mask, np.ones_like(sequences[:, -new:])), 1)
        made = Continuation(np.concatenate((ids, sequences[:, -new:]), 1), mask, new, self.allowed["logits"])
        feeds = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
        logits = self.tensorflow.run("serving_default", feeds)["logits"]
        errors = list(made.unlikely(logits, self.special, made.allowed + slack, among))
        if new != min(NEW_TOKENS, room) and not made.ended(self.special.eos)[:, -1].all():
            errors.append(f"it ended after {new} tokens")
        return made, errors


def _new_tokens(ids: Integers, sequences: Integers, room: int) -> list[int]:
    """How many tokens may follow ``ids``, at most ``room``.

    At fixed length, as many were dropped in front; if the prompt repeats itself, several numbers are possible.
    """
    if sequences.shape != ids.shape:
        new = sequences.shape[1] - ids.shape[1]
        return [new] if new > 0 and np.array_equal(sequences[:, :-new], ids) else []
    most = min(NEW_TOKENS, room)
    return [n for n in range(most, 0, -1) if np.array_equal(sequences[:, :-n], ids[:, n:])]


def _last_real(mask: Array) -> Integers:
    """Index of the last 1 of each row: [B, S] → [B]."""
    real = np.asarray(mask) != 0
    return np.asarray(real.shape[1] - 1 - real[:, ::-1].argmax(1), np.int64)
