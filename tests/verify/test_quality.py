"""Rule 3: the figures against numpy on transformers' logits; broken exports; the worst layers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.verify.evaluation import Amount, Evaluation
from gptconvert.verify.probes import Probe
from gptconvert.verify.quality import Quality, measure, require_measurable, worst
from gptconvert.verify.runners import RunError
from tests.families import witness
from tests.families.witness import BY_TASK, Case
from tests.helpers import computed_tensors
from tests.verify.exports import tiny
from tests.verify.test_evaluation import encode, text

PROSE = Amount(prose_windows=3, prose_tokens=16, sampled_rows=0)
CASES = [case for case in BY_TASK if case.task.endswith(("generation", "classification"))]
Run = Callable[[Probe], Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def on_prose(checkpoint: Checkpoint, **fields: Any) -> Evaluation:
    return Evaluation(checkpoint, encode, text(90), "a.txt", amount=PROSE, **fields)


def model_of(checkpoint: Checkpoint) -> Run:
    """The checkpoint itself, in float64."""
    model = witness.reference(checkpoint)
    return lambda window: witness.our_outputs(
        model, {"input_ids": window.input_ids, "attention_mask": window.attention_mask}
    )["logits"]


def distorted(logits: Any) -> Any:
    """Other logits, the same for the same input."""
    return logits * 0.9 + 0.3 * np.sin(1e3 * logits)


def log_softmax(logits: Any) -> Any:
    shifted = np.asarray(logits, np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_figures_are_those_of_numpy_on_transformers_logits(case: Case, directory: Path) -> None:
    checkpoint = witness.checkpoint(case, directory)
    evaluation, model = on_prose(checkpoint), model_of(checkpoint)
    found = measure(evaluation, lambda window: distorted(model(window)), None, {}).figures
    p, follows = [], []
    for window in evaluation.windows:
        inputs = {"input_ids": window.input_ids, "attention_mask": window.attention_mask}
        logits = witness.hf_outputs(case, inputs)["logits"]
        p.append(logits.reshape(-1, logits.shape[-1]))
        follows.append(window.input_ids[0, 1:])
    own, other = (np.concatenate([log_softmax(f(x)) for x in p]) for f in (lambda x: x, distorted))
    kl = (np.exp(own) * (own - other)).sum(-1)
    best = own.argmax(-1)
    top5 = np.argsort(-other, -1)[:, :5]
    expected = [kl.mean(), np.quantile(kl, 0.999), kl.max(), (best == other.argmax(-1)).mean()]
    assert found is not None
    assert found.kl_mean > 1e-3
    assert [found.kl_mean, found.kl_high, found.kl_max, found.top1] == pytest.approx(expected, rel=1e-3)
    assert found.top5 == np.mean([b in five for b, five in zip(best, top5, strict=True)])
    if case.task != "text-generation":
        assert found.perplexity is None
        return
    at = [(16 * w + i, token) for w, tokens in enumerate(follows) for i, token in enumerate(tokens)]
    surprisals = [np.exp(np.mean([-each[i, token] for i, token in at])) for each in (own, other)]
    assert found.perplexity == pytest.approx(surprisals, rel=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_model_itself_loses_nothing(case: Case, directory: Path) -> None:
    checkpoint = witness.checkpoint(case, directory)
    found = measure(on_prose(checkpoint), model_of(checkpoint), 1e-9, {})
    assert found.ok
    assert found.figures is not None
    assert found.figures.kl_max < 1e-9
    assert (found.figures.top1, found.figures.top5) == (1, 1)


def test_the_text_of_a_model_decides_its_perplexity(tmp_path: Path) -> None:
    """Uniform logits have the perplexity V."""
    checkpoint = tiny(tmp_path)
    found = measure(on_prose(checkpoint), lambda window: np.zeros((1, 16, 97)), None, {}).figures
    assert found is not None
    assert found.perplexity is not None
    assert found.perplexity[1] == pytest.approx(97)


def test_a_vocabulary_of_three(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, vocab_size=3, bos_token_id=None, eos_token_id=None)
    model = model_of(checkpoint)
    found = measure(Evaluation(checkpoint, None), lambda window: distorted(model(window)), None, {}).figures
    assert found is not None
    assert found.top5 == 1


def raising(_: Probe) -> Any:
    raise RunError("out of memory")


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (lambda _: np.full((1, 16, 97), np.nan, np.float32), "logits have NaN or infinite values"),
        (lambda _: np.zeros((1, 16, 98), np.float32), r"logits have shape \[1, 16, 98\], expected \[1, 16, 97\]"),
        (lambda _: np.zeros((1, 1, 97), np.float32), "logits have shape"),
        (raising, "the run failed: out of memory"),
    ],
    ids=["NaN", "vocabulary", "last token", "run"],
)
def test_broken_exports_fail(run: Run, problem: str, tmp_path: Path) -> None:
    import re

    found = measure(on_prose(tiny(tmp_path)), run, None, {})
    assert not found.ok
    assert re.search(problem, found.problem)
    assert re.search(problem, "\n".join(found.lines()))
    plain = json.loads(json.dumps(found.as_dict(True), allow_nan=False))
    assert plain["kl_mean"] is plain["perplexity"] is None
    assert re.search(problem, plain["problem"])


def test_limits(tmp_path: Path) -> None:
    """The limit of the evaluation takes the place of the export's own."""
    checkpoint = tiny(tmp_path)
    model = model_of(checkpoint)

    def found(limit: float | None, max_kl: float | None) -> Quality:
        return measure(on_prose(checkpoint, max_kl=max_kl), lambda window: distorted(model(window)), limit, {})

    kl = found(None, None).figures
    assert kl is not None
    verdicts = [found(limit, most).ok for limit, most in ((None, None), (1, None), (0.0, None), (0.0, 1), (1, 0.0))]
    assert verdicts == [True, True, False, True, False]
    assert (found(1, None).limit, found(1, 2).limit) == (1, 2)


def test_worst_layers_and_weights(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    factors = {"wte.weight": 1.1, "h.0.mlp.c_fc.weight": 1.01, "h.1.mlp.c_fc.weight": 1.3, "h.1.mlp.c_proj.weight": 1}
    arrays = {name: (checkpoint.weights[name].read() * factor).astype(np.float32) for name, factor in factors.items()}
    layers, weights = worst(checkpoint.weights, computed_tensors(arrays))
    assert [name for name, _ in layers] == ["h.1", "wte", "h.0"]
    assert weights[0] == ("h.1.mlp.c_fc.weight", pytest.approx(0.3, rel=1e-5))
    fc, proj = (checkpoint.weights[f"h.1.mlp.{n}.weight"].read().astype(np.float64) for n in ("c_fc", "c_proj"))
    expected = 0.3 * np.sqrt((fc**2).sum() / ((fc**2).sum() + (proj**2).sum()))
    assert layers[0][1] == pytest.approx(expected, rel=1e-5)


def test_a_missed_limit_names_the_worst(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    model = model_of(checkpoint)
    decoded = computed_tensors({"h.1.mlp.c_fc.weight": checkpoint.weights["h.1.mlp.c_fc.weight"].read() * 1.1})
    missed = measure(on_prose(checkpoint), lambda window: distorted(model(window)), 1e-6, decoded)
    assert [name for name, _ in missed.layers] == ["h.1"]
    assert any("worst layers" in line and "h.1" in line for line in missed.lines())
    assert missed.as_dict(True)["worst_layers"] == dict(missed.layers)
    assert missed.as_dict(False) == {"ok": False, "max_kl": 1e-6}
    assert measure(on_prose(checkpoint), model, 1e-6, decoded).layers == ()


@pytest.mark.parametrize(
    ("task", "labels", "ok"),
    [
        ("text-generation", 0, True),
        ("text-classification", 2, True),
        ("text-classification", 1, False),
        ("token-classification", 2, True),
        ("feature-extraction", 0, False),
        ("question-answering", 2, False),
    ],
)
def test_what_can_be_measured(task: str, labels: int, ok: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny(tmp_path).config, task=task, n_labels=labels)
    if ok:
        require_measurable(config)
        return
    with pytest.raises(UnsupportedError, match=f"quality of {task} is not measured"):
        require_measurable(config)
