"""Verifies a GGUF file: its bytes by rule 1, and what llama.cpp computes with it by rule 2.

llama.cpp's kernels round more than float32 does, so the yardstick is the reference model with those roundings
(:mod:`.yardstick`). llama.cpp predicts one position per request: the distribution of the next token after several
prompts is compared, also by its Kullback-Leibler divergence from the truth and by the most likely token.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.gguf import TYPES, GgufModel, read_gguf
from gptconvert.errors import install_hint, short_repr
from gptconvert.families.trainers.gguf import OUTPUT, gguf_name
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.ggml import GgmlQuantised
from gptconvert.model.options import Level
from gptconvert.model.progress import Stage
from gptconvert.model.tensors import LazyTensor
from gptconvert.targets.gguf.foreign import check_model, metadata_problems
from gptconvert.targets.gguf.layout import ARCHITECTURES, Item, as_computed, in_file_order, items_of, stored_as
from gptconvert.targets.gguf.plan import NAME
from gptconvert.targets.gguf.process import LlamaError, LlamaProcess, is_installed, limits_of
from gptconvert.targets.gguf.yardstick import LlamaPass
from gptconvert.targets.package.tokenizer import tokenizer_files
from gptconvert.targets.package.tokenizer_process import TokenizerProcess
from gptconvert.targets.package.verify import CORPUS
from gptconvert.targets.target import Candidate
from gptconvert.verify.background import half_the_cores
from gptconvert.verify.evaluation import Evaluation
from gptconvert.verify.metrics import EPSILON, UNDERFLOW, Errors, Measure
from gptconvert.verify.outputs import Group
from gptconvert.verify.probes import USUAL, Probe, usual_amount
from gptconvert.verify.quality import measurable, measure
from gptconvert.verify.report import ArtifactReport, RunReport
from gptconvert.verify.source_model import SourceModel
from gptconvert.verify.weights import Pair, WeightReport, compare

if TYPE_CHECKING:
    from torch import Tensor

#: Lengths of the prompts, and of the last one; that of a large model is shorter.
LENGTHS, LONG, LONG_OF_LARGE = (1, 2, 8, 33), 130, 70
#: The package whose reader is a second witness of the bytes.
READER = "gguf"


#: Most KL(truth ‖ llama.cpp) in nats: of weights in float32 or float16, and of others, for which llama.cpp rounds
#: activations to 8 bits. Deeper models add up more roundings: so many times the yardstick's is allowed too.
MAX_DIVERGENCE, MAX_DIVERGENCE_ROUNDED, MAX_DIVERGENCE_RATIO = 1e-4, 1e-3, 4.0
YARDSTICK = "the reference model\nwith llama.cpp's roundings"
#: What is compared.
OUTPUT_NAME = "log-probabilities"
#: Type of most matrices → default limit of the mean KL divergence from the source, in nats per token.
MAX_KL = {"Q8_0": 0.01, "Q5_0": 0.1, "Q4_0": 0.2}


def verify(candidate: Candidate, level: Level, stage: Stage) -> ArtifactReport:
    """The report on one model.

    Raises:
        InputError: a file cannot be read; or the checkpoint itself computes NaN.
        UnsupportedError: a file has tensors of types that are not compared.
        UnsafeInputError: a file of unknown origin exceeds its limits.
    """
    model = read_gguf(candidate.path)
    check_model(model, candidate.path)
    report = ArtifactReport(NAME, candidate.shown_as, WeightReport(len(candidate.checkpoint.weights)))
    checkpoint = _as_found(candidate, model, report)
    if not report.problems:
        report.problems = [*metadata_problems(checkpoint, model, planned=candidate.export is not None)]
        if candidate.export is not None and (level == "full" or not is_installed()):
            report.problems += _second_reading(model)
        pairs = _pairs(checkpoint, model, report.weights)
        compare(report.weights, [p for p in pairs if p.weight], stage("comparing weights", checkpoint.nbytes))
        zeros = compare(WeightReport(0), [pair for pair in pairs if not pair.weight])
        report.weights.problems += zeros.problems
    if report.problems or not report.weights.ok:
        return report
    checkpoint = _in_file(checkpoint, model)
    if not is_installed():
        report.computes = False
        report.notes.append(
            f"{candidate.shown_as}: its bytes were compared, but nothing ran it, because llama.cpp is not installed "
            f"({install_hint('gguf')})"
        )
    else:
        _run(report, checkpoint, model, candidate, level, stage)
    if report.proven and candidate.evaluation is not None:
        _measure(report, checkpoint, candidate.evaluation, stage)
    return report


def _as_found(candidate: Candidate, model: GgufModel, report: ArtifactReport) -> Checkpoint:
    """The checkpoint with its weights as stored: by plan, else by the types in the file."""
    if candidate.export is not None:
        return candidate.checkpoint
    checkpoint = candidate.checkpoint
    if checkpoint.config.family not in ARCHITECTURES:
        report.problems.append(f"llama.cpp has no graph for {checkpoint.config.family}")
        return checkpoint
    found = {name: tensor.type.name for name, tensor in model.tensors.items()}
    return stored_as(as_computed(checkpoint), lambda name, shape: _fitting(found.get(gguf_name(name), "F32"), shape))


def _fitting(kind: str, shape: tuple[int, ...]) -> str:
    """The type, or float32 if it has no form for this shape."""
    return "F32" if TYPES[kind].dtype is None and (len(shape) != 2 or shape[1] % TYPES[kind].block) else kind


def _pairs(checkpoint: Checkpoint, model: GgufModel, report: WeightReport) -> list[Pair]:
    """Every tensor that the file should have, with the one that it has; those of zeros belong to no weight."""
    expected = {item.name: item for item in items_of(checkpoint)}
    if OUTPUT in model.tensors and OUTPUT not in expected and checkpoint.config.tied_head:
        expected[OUTPUT] = dataclasses.replace(
            expected[gguf_name("wte.weight")], name=OUTPUT
        )  # llama.cpp's converter
    report.problems += [f"{name}: not in the file" for name in expected if name not in model.tensors]
    report.problems += [f"{name}: not a tensor of this model" for name in model.tensors if name not in expected]
    pairs = []
    for name, item in expected.items():
        if name in model.tensors and not (problem := _other_kind(item, model)):
            pairs.append(Pair(item.weight or "", name, item.tensor, model.tensors[name].stored))
        elif name in model.tensors:
            report.problems.append(problem)
    return pairs


def _other_kind(item: Item, model: GgufModel) -> str:
    """How a tensor's type or shape differs; empty if it does not."""
    found = model.tensors[item.name]
    if found.type != item.type:
        return f"{item.name}: expected type {item.type.name}, found {found.type.name}"
    if found.shape != item.shape:
        return f"{item.name}: expected shape {list(item.shape)}, found {list(found.shape)}"
    return ""


def _in_file(checkpoint: Checkpoint, model: GgufModel) -> Checkpoint:
    """The checkpoint with quantised weights read from the file, which has been compared: they need no computing."""

    def found(name: str, weight: LazyTensor) -> LazyTensor:
        if not isinstance(weight, GgmlQuantised) or in_file_order(checkpoint.config, name, weight) is not weight:
            return weight
        return dataclasses.replace(weight, encoded=model.tensors[gguf_name(name)].stored)

    weights = {name: found(name, weight) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def _second_reading(model: GgufModel) -> Iterator[str]:
    """Differences between this program's reading of the files and that of the gguf package, if it is installed.

    It takes seconds for a large vocabulary; llama.cpp, which reads the file too, takes less.
    """
    if importlib.util.find_spec(READER) is None:
        return
    from gguf import GGUFReader

    ours = {name: (t.type.number, t.shape, t.stored.nbytes, _places(t.stored)) for name, t in model.tensors.items()}
    theirs = {}
    for path in model.files:
        for tensor in GGUFReader(path).tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            place = ((path, int(tensor.data_offset)),) if tensor.n_bytes else ()
            theirs[tensor.name] = (int(tensor.tensor_type), shape, int(tensor.n_bytes), place)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: the gguf package reads {theirs.get(name)}, expected {ours.get(name)}"


def _places(stored: object) -> tuple[tuple[str, int], ...]:
    segments = stored.segments() or ()  # type: ignore[attr-defined]
    return tuple((segment.path, segment.offset) for segment in segments)


def _run(
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
    groups = [Group(prompt.name, probes=[prompt]) for prompt in prompts]
    report.runs = [RunReport("llama.cpp on the CPU", groups, yardstick=YARDSTICK)]
    nbytes = sum(tensor.stored.nbytes for tensor in model.tensors.values())
    limits = None
    longest = max(prompt.input_ids.shape[1] for prompt in prompts)
    if candidate.export is None:
        head = sum(os.path.getsize(path) for path in model.files) - nbytes
        width = 8 * config.n_layer * config.n_embd
        limits = limits_of(candidate.path, nbytes, head, config.vocab_size, longest + 1, width)
    stage("computing the truth", 0)
    truth = SourceModel(checkpoint, prompts, exact=True)
    noisy = SourceModel(checkpoint, prompts, instead=LlamaPass(checkpoint))
    exact, rounded = truth.last_logits(prompts), noisy.last_logits(prompts)  # (n, V)
    advance, answers = stage("running llama.cpp", len(prompts)), []
    try:
        with LlamaProcess(limits) as process:
            process.load(candidate.path, nbytes, longest + 1, half_the_cores())
            for prompt in prompts:
                found = process.log_probabilities(prompt.input_ids[0].tolist(), config.vocab_size)
                answers.append(found)
                advance(1)
            texts = [*_texts(checkpoint, longest)]
            report.problems += [
                f"llama.cpp tokenizes {short_repr(text)} differently"
                for text, ids in texts
                if process.most_likely(text, len(ids)) != process.most_likely(ids, len(ids))
            ]
    except LlamaError as error:
        groups[0].problems.append(f"the run failed: {error}")
        return
    judge(groups, np.stack(answers), exact, rounded, _most_divergence(checkpoint))


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
    groups: Sequence[Group], answers: NDArray[np.float32], truth: Tensor, yardstick: Tensor, most: float
) -> None:
    """Add the comparison of each prompt to its group.

    Args:
        groups: one per prompt.
        answers: llama.cpp's log-probabilities [n, V].
        truth: logits [n, V].
        yardstick: logits [n, V].
        most: largest KL divergence from the truth.
    """
    import torch

    found = torch.from_numpy(answers).double()  # (n, V)
    exact, noisy = (logits.double().log_softmax(-1) for logits in (truth, yardstick))  # (n, V)
    noise = Errors.of(noisy, exact)
    usual = noise.square.sum().div(exact.numel()).sqrt().item(), noise.largest.max().item()
    typical, epsilon, underflow = exact.square().mean().sqrt().item(), EPSILON["float32"], UNDERFLOW["float32"]
    for number, group in enumerate(groups):
        one = slice(number, number + 1)
        group.tokens = 1
        if not bool(found[one].isfinite().all()):
            group.problems.append("log-probabilities are missing, NaN or infinite")
            continue
        measure = Measure(OUTPUT_NAME, epsilon, underflow, typical, *usual)
        measure.add(Errors.of(found[one], exact[one]), noise.at(one), exact[one])
        group.measures[OUTPUT_NAME] = measure
        group.similarity.add(found[one], exact[one], usual[1])
        limit = max(most, MAX_DIVERGENCE_RATIO * float((exact[one].exp() * (exact[one] - noisy[one])).sum()))
        if not group.similarity.max_divergence <= limit:
            group.problems.append(
                f"KL divergence {group.similarity.max_divergence:.2g}, expected at most {limit:.2g}"
            )
        if group.similarity.same_top < 1:
            group.problems.append("another token is the most likely")


def _measure(report: ArtifactReport, checkpoint: Checkpoint, evaluation: Evaluation, stage: Stage) -> None:
    """Rule 3 for quantised weights: what they lose, computed with the weights as stored.

    llama.cpp was shown to compute the same; it predicts one position per request, which is too slow for a text.
    """
    quantised = {n: w for n, w in checkpoint.weights.items() if isinstance(w, GgmlQuantised)}
    if not quantised or not measurable(evaluation.checkpoint.config):
        return
    import torch

    stage("running the source model", 0)
    evaluation.source  # noqa: B018 - computed here, in a stage of its own
    stage("running the quantised model", 0)
    stored = SourceModel(checkpoint, evaluation.windows)

    def run(window: Probe) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = torch.cat([each for _, each in stored.logits(window)])[
            None
        ].numpy()  # (1, S, V)
        return logits

    limit = MAX_KL[_main_type(list(quantised.values()))]
    advance = stage("measuring the quality", len(evaluation.windows))
    report.quality = measure(evaluation, run, limit, quantised, advance)


def _main_type(weights: Sequence[GgmlQuantised]) -> str:
    """The type with the fewest bits."""
    return min((weight.format for weight in weights), key=lambda form: form.nbytes).name
