"""What llama.cpp predicts with a GGUF file, compared with the truth by rule 2.

llama.cpp's kernels round more than float32 does, so the yardstick is the reference model with those roundings
(:mod:`.yardstick`). llama.cpp predicts one position per request: the distribution of the next token after several
prompts is compared, also by its Kullback-Leibler divergence from the truth and by the most likely token.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.gguf import GgufModel
from gptconvert.errors import short_repr
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.ggml import GgmlQuantised
from gptconvert.model.options import Level
from gptconvert.model.progress import Stage
from gptconvert.targets.child.client import Limits
from gptconvert.targets.gguf.process import LlamaError, LlamaProcess, limits_of
from gptconvert.targets.gguf.yardstick import LlamaPass
from gptconvert.targets.package.tokenizer import tokenizer_files
from gptconvert.targets.package.tokenizer_process import TokenizerProcess
from gptconvert.targets.package.verify import CORPUS
from gptconvert.targets.target import Candidate
from gptconvert.verify.background import half_the_cores
from gptconvert.verify.metrics import EPSILON, UNDERFLOW, Errors, Measure
from gptconvert.verify.outputs import YARDSTICKS, Group
from gptconvert.verify.probes import USUAL, Probe, usual_amount
from gptconvert.verify.report import ArtifactReport, RunReport
from gptconvert.verify.source_model import SourceModel

if TYPE_CHECKING:
    from torch import Tensor

#: Lengths of the prompts, and of the last one; that of a large model is shorter.
LENGTHS, LONG, LONG_OF_LARGE = (1, 2, 8, 33), 130, 70


#: Most KL(truth ‖ llama.cpp) in nats: of weights in float32 or float16, and of others, for which llama.cpp rounds
#: activations to 8 bits. Deeper models add up more roundings: so many times the yardstick's is allowed too.
MAX_DIVERGENCE, MAX_DIVERGENCE_ROUNDED, MAX_DIVERGENCE_RATIO = 1e-4, 1e-3, 4.0
YARDSTICK = "the reference model\nwith llama.cpp's roundings"
#: Smaller log-probabilities count as this: llama.cpp computes them from float32 probabilities, which underflow.
LEAST = -80.0
#: What is compared.
OUTPUT_NAME = "log-probabilities"


def compare_predictions(
    report: ArtifactReport, checkpoint: Checkpoint, model: GgufModel, candidate: Candidate, level: Level, stage: Stage
) -> None:
    """Compare llama.cpp's predictions after several prompts with the truth."""
    config = checkpoint.config
    prompts = list(_prompts(checkpoint, level, candidate.seed))
    if not prompts:
        report.computes = False
        report.notes.append(f"{report.path}: llama.cpp did not run it, because it needs a context of two tokens")
        return
    report.probes = [prompt.as_dict() for prompt in prompts]
    nbytes, longest = sum(t.stored.nbytes for t in model.tensors.values()), prompts[-1].input_ids.shape[1]
    stage("computing the truth", 0)
    truth = SourceModel(checkpoint, prompts, exact=True).last_logits(prompts)  # (n, V)
    noisy = [_yardstick(checkpoint, prompts)]
    advance, answers = stage("running llama.cpp", len(prompts)), []
    run = RunReport("llama.cpp on the CPU", [], yardstick=YARDSTICK)
    report.runs = [run]
    try:
        with LlamaProcess(_limits(candidate, model, nbytes, longest)) as process:
            process.load(candidate.path, nbytes, longest + 1, half_the_cores())
            for prompt in prompts:
                answers.append(process.log_probabilities(prompt.input_ids[0].tolist(), config.vocab_size))
                advance(1)
            report.problems += [
                f"llama.cpp tokenizes {short_repr(text)} differently"
                for text, ids in _texts(checkpoint, longest)
                if process.most_likely(text, len(ids)) != process.most_likely(ids, len(ids))
            ]
    except LlamaError as error:
        run.groups = [Group(prompts[0].name, problems=[f"the run failed: {error}"])]
        return
    most = _most_divergence(checkpoint)
    run.groups = judge(prompts, np.stack(answers), truth, noisy, most)
    if not run.ok:
        stage("measuring the rounding noise", 0)
        noisy += [_yardstick(checkpoint, prompts, seed) for seed in range(1, YARDSTICKS)]
        run.groups = judge(prompts, np.stack(answers), truth, noisy, most)


def _yardstick(checkpoint: Checkpoint, prompts: Sequence[Probe], seed: int | None = None) -> Tensor:
    """Logits [n, V] of the reference model with llama.cpp's roundings, by chance up or down with a ``seed``."""
    return SourceModel(checkpoint, prompts, instead=LlamaPass(checkpoint, seed)).last_logits(prompts)


def _limits(candidate: Candidate, model: GgufModel, nbytes: int, longest: int) -> Limits | None:
    """The limits of a file of unknown origin."""
    if candidate.export is not None:
        return None
    config, head = candidate.checkpoint.config, sum(map(os.path.getsize, model.files)) - nbytes
    width = 8 * config.n_layer * config.n_embd  # bytes of keys and values per token
    return limits_of(candidate.path, nbytes, head, config.vocab_size, longest + 1, width)


def _texts(checkpoint: Checkpoint, most: int) -> Iterator[tuple[str, list[int]]]:
    """Texts of at most ``most`` tokens, and their ids by the checkpoint's tokenizer; none without one.

    The same prediction after a text and after its ids shows that llama.cpp tokenizes it as the checkpoint does.
    """
    data = tokenizer_files(checkpoint)[0].get("tokenizer.json")
    if data is None:
        return
    path = checkpoint.source.path
    with TokenizerProcess(path, len(data)) as process:
        tokenizer = process.load(data, path)
        for text in filter(_is_plain, CORPUS):
            ids = tokenizer.encode(text)
            if 0 < len(ids) <= most:
                yield text, ids


def _is_plain(text: str) -> bool:
    """Whether a text has no control characters but white space, no special tokens, and is normalised.

    llama.cpp ends a prompt at a NUL, and does not normalise.
    """
    return "<|" not in text and "\0" not in text and unicodedata.is_normalized("NFC", text)


def _most_divergence(checkpoint: Checkpoint) -> float:
    rounded = any(isinstance(w, GgmlQuantised) or w.dtype == BFLOAT16 for w in checkpoint.weights.values())
    return MAX_DIVERGENCE_ROUNDED if rounded else MAX_DIVERGENCE


def _prompts(checkpoint: Checkpoint, level: Level, seed: int) -> Iterator[Probe]:
    """Beginnings of one random sequence; llama.cpp needs a place for the token after it."""
    config = checkpoint.config
    most = config.n_ctx - 1
    long = LONG if usual_amount(config) is USUAL else LONG_OF_LARGE
    lengths = sorted({min(length, most) for length in (*LENGTHS, most if level == "full" else long)} - {0})
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, max(lengths, default=0))
    borders = [config.vocab_size - 1, 0, config.vocab_size - 1][: len(ids)]
    ids[: len(borders)] = borders
    for length in lengths:
        plain = ids[None, :length].astype(np.int64)  # (1, S)
        positions = np.arange(length)[None]
        yield Probe((f"length {length}",), plain, np.ones_like(plain), positions, compare_presents=False)


def judge(
    prompts: Sequence[Probe], answers: NDArray[np.float32], truth: Tensor, yardsticks: Sequence[Tensor], most: float
) -> list[Group]:
    """One group for each prompt, with the comparison of what was predicted after it.

    Args:
        prompts: n prompts.
        answers: llama.cpp's log-probabilities [n, V].
        truth: logits [n, V].
        yardsticks: logits [n, V] each.
        most: largest KL divergence from the truth.
    """
    import torch

    found = torch.from_numpy(answers).double().clamp(min=LEAST)  # (n, V); NaN stays
    exact, *noisy = (x.double().log_softmax(-1).clamp(min=LEAST) for x in (truth, *yardsticks))  # (n, V) each
    noise = Errors.of_several(noisy, exact)
    usual = float(noise.square.sum() / exact.numel()) ** 0.5, float(noise.largest.max())
    typical = float(exact.square().mean()) ** 0.5
    divergences = torch.stack([(exact.exp() * (exact - each)).sum(-1) for each in noisy]).amax(0).tolist()  # n
    groups = []
    for number, prompt in enumerate(prompts):
        one, group = slice(number, number + 1), Group(prompt.name, tokens=1, probes=[prompt])
        groups.append(group)
        if not bool(found[one].isfinite().all()):
            group.problems.append("log-probabilities are missing, NaN or infinite")
            continue
        measure = Measure(OUTPUT_NAME, EPSILON["float32"], UNDERFLOW["float32"], typical, *usual)
        measure.add(Errors.of(found[one], exact[one]), noise.at(one), exact[one])
        group.measures[OUTPUT_NAME] = measure
        group.similarity.add(found[one], exact[one], max(usual[1], measure.floor))
        divergence, limit = group.similarity.max_divergence, max(most, MAX_DIVERGENCE_RATIO * divergences[number])
        if not divergence <= limit:
            group.problems.append(f"KL divergence {divergence:.2g}, expected at most {limit:.2g}")
        if group.similarity.same_top < 1:
            group.problems.append("another token is the most likely")
    return groups
