"""A few planted bugs of the campaign, and each of its outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from campaigns import planted, planted_saved_model
from campaigns.correct import close_tensorflow, one_tensorflow
from campaigns.graph_mutations import Mutant, mutants
from campaigns.planted import EVERY, Bugs, Correct, outcome_of
from campaigns.report import Report
from gptconvert.targets.onnx import verify as onnx_verify


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Correct]:
    with planted.remembered_truths():
        yield Correct.of("gpt2", tmp_path_factory.mktemp("planted") / "gpt2")


def named(export: Correct, name: str) -> Mutant:
    return next(mutant for mutant in mutants(export.graph) if mutant.name == name)


OUTCOMES = {
    "h.1.norm_2 (LayerNormalization): epsilon 0.0": "caught by outputs",
    "h.1.mlp.out (Add): clipped at 65504": "caught by stress weights",
    "bias.causal (LessOrEqual): Less": "caught by outputs",
    "present.0.key (Concat): inputs 0 and 1 swapped": "caught by outputs",
    "h.1.mlp.c_fc.weight: one element": "caught by weights",
    "bias.seen (And): inputs 0 and 1 swapped": "equal",
    "logits_2d (Gemm): transB 0": "cannot run",
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes(export: Correct, name: str) -> None:
    assert outcome_of(export, named(export, name)) == OUTCOMES[name]


def test_algebra(export: Correct) -> None:
    """One added to all scores of a query changes their softmax by rounding alone."""
    import numpy as np
    from onnx import helper, numpy_helper

    def plant(model: Any) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(1 / 3, np.float32), "third"))
        index = next(i for i, n in enumerate(model.graph.node) if "h.1.attn.masked" in n.output)
        model.graph.node[index].output[0] = "masked"
        model.graph.node.insert(index + 1, helper.make_node("Add", ["masked", "third"], ["h.1.attn.masked"]))

    assert outcome_of(export, Mutant("shifted scores", plant)) == "equal but for rounding"


def test_survivors_are_failures(export: Correct, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without stress weights, or without the comparison of nodes."""
    mutant = named(export, "h.1.mlp.out (Add): clipped at 65504")
    with monkeypatch.context() as patched:
        patched.setattr(onnx_verify, "settings_of", lambda config: ())
        case = planted.run_case(0, export, mutant)
    assert (case.outcome, case.failed) == ("survived: as another program's", True)
    with monkeypatch.context() as patched:
        patched.setattr(planted, "caught_as_own", lambda *_: False)
        case = planted.run_case(0, export, mutant)
    assert (case.outcome, case.failed) == ("survived: as our own", True)


def test_every_node_of_every_family_is_mutated(export: Correct) -> None:
    names = [mutant.name for mutant in mutants(export.graph)]
    assert len(names) == len(set(names)) > 1000
    for node in export.graph.model.graph.node:
        assert any(node.output[0] in name for name in names), node.output[0]
    for name in export.checkpoint.weights:
        assert f"{name}: one element" in names


def test_a_run_is_repeatable_and_scored() -> None:
    report = planted.run(1, 60, only=2)
    again = planted.run(1, 60, only=2)
    assert report.cases == 1 and report.outcomes == again.outcomes
    assert report.failures == []
    assert (report.caught, report.missed) == (again.caught, again.missed)
    assert report.caught.total() + report.missed.total() <= 1


def test_scores_add_up() -> None:
    first, second = Report("planted", 0, caught=Counter({"onnx, gpt2": 2})), Report("planted", 0)
    second.caught["onnx, gpt2"], second.missed["onnx, gpt2"] = 1, 1
    first.merge(Report.from_dict(second.as_dict()))
    assert first.scores == ["onnx, gpt2: 75.00% of 4 bugs caught"]
    assert "75.00%" in str(first)


SAVED_MODEL_OUTCOMES = {
    "block/Softmax (Softmax): LogSoftmax": "caught by outputs",
    "body/GatherV2 (GatherV2): batch_dims 1": "cannot run",
    "block/add/y (Const): * 1.01": "caught by stress weights",
    "cond_true/cond/or (LogicalOr): left out, input 0 stays": "too small to see",
}


@pytest.mark.campaign
@pytest.mark.tensorflow
def test_saved_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The correct one passes; each mutant has its outcome; one that the comparison of nodes misses is a failure."""
    with planted.remembered_truths(), one_tensorflow():
        bugs = Bugs(tmp_path, 0)
        number = EVERY * [*planted.FAMILIES].index("gpt2") + EVERY - 1
        case = bugs[number]
        assert case is not None
        export, _ = case
        assert isinstance(export, planted_saved_model.CorrectSavedModel) and export.family == "gpt2"
        nothing = Mutant("nothing", lambda model: None)
        assert not planted_saved_model.caught_as_own(export, nothing)
        assert planted_saved_model.caught_as_foreign(export, nothing) == "nothing"
        named = {mutant.name: mutant for mutant in export.order}
        assert len(named) == len(export.order) > 5000
        with monkeypatch.context() as patched:  # takes ten seconds
            patched.setattr(planted_saved_model, "agrees", lambda *_: False)
            for name, outcome in SAVED_MODEL_OUTCOMES.items():
                done = planted.run_case(number, export, named[name])
                assert (done.outcome.partition(":")[0], done.failed) == (outcome, False), done
            patched.setattr(planted_saved_model, "caught_as_own", lambda *_: False)
            done = planted.run_case(number, export, named["block/Softmax (Softmax): LogSoftmax"])
        assert (done.outcome, done.failed) == ("survived: as our own", True)
    close_tensorflow()
