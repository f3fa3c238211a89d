"""The gate for SavedModels fails when TensorFlow's outputs are altered."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.targets.saved_model import plan as model
from gptconvert.targets.saved_model.process import TensorFlowProcess
from gptconvert.targets.saved_model.verify import SavedModelVerifier, contract_problems
from gptconvert.targets.saved_model.verify_signatures import _new_tokens, check_other_signatures
from gptconvert.targets.target import Candidate
from gptconvert.verify.metrics import Measure
from gptconvert.verify.outputs import Group
from gptconvert.verify.report import ArtifactReport
from tests.families.witness import Case
from tests.targets.saved_model.support import Shared, understood, write

pytestmark = pytest.mark.tensorflow

Arrays = Mapping[str, Any]


@pytest.fixture(scope="module")
def checkpoint(saved: Path) -> Checkpoint:
    return understood(Case("gpt2"), saved)


@pytest.fixture(scope="module")
def path(checkpoint: Checkpoint, tensorflow: TensorFlowProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "TensorFlowProcess", Shared(tensorflow))
        return write(tmp_path_factory.mktemp("verify"), model.plan(checkpoint, Options())[0].files)


class Altered:
    """A TensorFlow process with the outputs of one signature altered."""

    def __init__(self, process: TensorFlowProcess, signature: str, alter: Callable[[Arrays, Arrays], Arrays]) -> None:
        self.process, self.signature, self.alter = process, signature, alter

    def ask(self, command: str, stop: object = None, **request: object) -> dict[str, Any]:
        return self.process.ask(command, **request)

    def assign(self, name: str, values: Any) -> None:
        self.process.assign(name, values)

    def run(self, signature: str, inputs: Arrays, wanted: tuple[str, ...] = ()) -> Arrays:
        outputs = self.process.run(signature, inputs, wanted)
        return self.alter(inputs, outputs) if signature == self.signature else outputs


def verdict(checkpoint: Checkpoint, path: Path, verifier: SavedModelVerifier) -> ArtifactReport:
    candidate = Candidate("tf", str(path), "saved_model", checkpoint)
    return verifier(candidate, "default", lambda name, total: lambda count: None)


def other_token(inputs: Arrays, outputs: Arrays) -> Arrays:
    sequences = outputs["sequences"].copy()
    sequences[1, -3] = (sequences[1, -3] + 1) % 97
    return {"sequences": sequences}


def other_prompt(inputs: Arrays, outputs: Arrays) -> Arrays:
    sequences = outputs["sequences"].copy()
    sequences[0, 0] = (sequences[0, 0] + 1) % 97
    return {"sequences": sequences}


def without_seed(inputs: Arrays, outputs: Arrays) -> Arrays:
    without_seed.calls += 1  # type: ignore[attr-defined]
    return other_token(inputs, outputs) if inputs["seed"] == 7 and without_seed.calls % 2 else outputs  # type: ignore[attr-defined]


without_seed.calls = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("signature", "alter", "message"),
    [
        ("serving_int32", lambda i, o: {"logits": o["logits"] + 1e-3}, "serving_int32: logits differs"),
        ("serving_int32", lambda i, o: {"logits": o["logits"][:, :1]}, "serving_int32: logits has shape"),
        ("serving_int32", lambda i, o: {"logits": o["logits"] * np.nan}, "serving_int32: logits differs"),
        ("last_logits", lambda i, o: {"logits": o["logits"][::-1]}, "last_logits: logits differs"),
        ("generate", other_token, "generate, greedy: token 5 of row 1"),
        ("generate", other_prompt, "generate, greedy: the sequences do not begin with the prompt"),
        ("generate", lambda i, o: {"sequences": o["sequences"][:, :-1]}, "generate, greedy: it ended after 7"),
        ("generate", without_seed, "generate: the same seed gives different texts"),
        ("serving_default", lambda i, o: {"logits": o["logits"] + 1e-3}, ""),
        ("decode", lambda i, o: {n: v + 1e-3 * (n == "present.1.key") for n, v in o.items()}, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "?"),
)
def test_altered_outputs_fail(
    signature: str,
    alter: Callable[[Arrays, Arrays], Arrays],
    message: str,
    checkpoint: Checkpoint,
    path: Path,
    tensorflow: TensorFlowProcess,
) -> None:
    report = verdict(checkpoint, path, SavedModelVerifier(Shared(Altered(tensorflow, signature, alter))))
    assert not report.ok
    others = [group for group in report.runs[0].groups if group.name == "other signatures"]
    if message:
        assert any(message in problem for problem in others[0].problems), others[0].problems
    else:
        assert not others, "a wrong signature must not serve as reference for others"


def test_unaltered_outputs_pass(checkpoint: Checkpoint, path: Path, tensorflow: TensorFlowProcess) -> None:
    unaltered = Altered(tensorflow, "decode", lambda inputs, outputs: outputs)
    report = verdict(checkpoint, path, SavedModelVerifier(Shared(unaltered)))
    assert report.ok
    assert report.runs[0].groups[-1].name == "other signatures"


class Generating:
    """A TensorFlow process whose ``generate`` gets other inputs, or whose text is cut."""

    def __init__(self, process: TensorFlowProcess, change: Callable[[Arrays], Arrays], cut: bool = False) -> None:
        self.process, self.change, self.cut = process, change, cut

    def run(self, signature: str, inputs: Arrays, wanted: tuple[str, ...] = ()) -> Arrays:
        if signature != "generate":
            return self.process.run(signature, inputs, wanted)
        made = self.process.run(signature, {**inputs, **self.change(inputs)}, wanted)
        long = self.cut and inputs["input_ids"].shape[1] > 20
        return {"sequences": made["sequences"][:, :-1]} if long else made


@pytest.mark.parametrize(
    ("change", "cut", "message"),
    [
        (lambda i: {}, False, None),
        (lambda i: {}, True, "generate, to the end of the context: it ended after 2 tokens"),
        (lambda i: {"top_k": i["top_k"] * (i["top_k"] == 1)}, False, "generate, top_k 3: token "),
        (
            lambda i: {"temperature": np.float32(i["temperature"] > 0)},
            False,
            "generate, temperature 0.001: token ",
        ),
        (
            lambda i: {"temperature": np.float32(i["temperature"] * (i["top_k"] > 0))},
            False,
            "generate: at a high temperature, all tokens but the first are the best ones",
        ),
        (lambda i: {"seed": np.int64(7)}, False, "generate: two seeds give the same text at a high temperature"),
    ],
    ids=["unchanged", "shorter context", "top_k", "temperature", "greedy", "seed"],
)
def test_limits_of_generate(
    change: Callable[[Arrays], Arrays],
    cut: bool,
    message: str | None,
    checkpoint: Checkpoint,
    path: Path,
    tensorflow: TensorFlowProcess,
) -> None:
    """Checked in a SavedModel whose nodes cannot be compared."""
    tensorflow.ask("load", path=str(path))
    measured = Group("all", measures={"logits": Measure("logits", 2.0**-23, usual_max=1e-5)})
    process: Any = Generating(tensorflow, change, cut)
    found, _ = check_other_signatures(process, checkpoint, [], [measured], thorough=True)
    assert bool(found.problems) == bool(message)
    assert message is None or any(problem.startswith(message) for problem in found.problems), found.problems


def test_contract_violations(checkpoint: Checkpoint, path: Path, tensorflow: TensorFlowProcess) -> None:
    loaded = tensorflow.ask("load", path=str(path))
    assert list(contract_problems(loaded, checkpoint.config)) == []
    wrong, cache = copy.deepcopy(loaded), ["float32", [None, 3, None, 8]]
    del wrong["signatures"]["last_logits"]
    wrong["signatures"]["extra"] = wrong["signatures"]["generate"]
    wrong["signatures"]["decode"]["inputs"]["past_key_values.1.key"][1][1] = None
    wrong["largest_constant"] = 1 << 21
    assert list(contract_problems(wrong, checkpoint.config)) == [
        "no signature last_logits",
        "signature extra is not in the contract",
        f"inputs of decode: past_key_values.1.key is {['float32', [None, None, None, 8]]}, expected {cache}",
        "the graph holds a constant of 2097152 bytes",
    ]


def test_savedmodel_of_another_exporter(checkpoint: Checkpoint, path: Path, tmp_path: Path) -> None:
    from gptconvert.targets.saved_model.bundle import plan_bundle
    from gptconvert.targets.saved_model.plan import BuiltGraph
    from tests.helpers import computed_tensors

    tensors = computed_tensors({"a": np.zeros(3, np.float32)}).tensors
    graph = BuiltGraph(b"", b"", {"a": "dense/kernel/.ATTRIBUTES/VALUE"})
    write(tmp_path, plan_bundle("saved_model/variables", tensors, lambda stop: graph))
    with pytest.raises(UnsupportedError, match="not written by gptconvert"):
        verdict(checkpoint, tmp_path / "saved_model", SavedModelVerifier())
    with pytest.raises(InputError):
        verdict(checkpoint, tmp_path, SavedModelVerifier())


def test_too_little_memory(checkpoint: Checkpoint, path: Path) -> None:
    verifier = SavedModelVerifier(lambda: pytest.fail("TensorFlow was started"), lambda: checkpoint.nbytes)
    with pytest.raises(UnsupportedError, match="too large to load") as caught:
        verdict(checkpoint, path, verifier)
    assert caught.value.found == f"{checkpoint.nbytes} bytes available"


@pytest.mark.parametrize(
    ("ids", "sequences", "counts"),
    [
        ([1, 2, 3, 4, 5, 6], [4, 5, 6, 0, 0, 0], [3]),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1]),
        ([1, 2, 3, 4, 5, 6], [6, 0, 0, 0, 0, 0], [5]),
        ([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0], []),
        ([1, 2], [1, 2, 3], [1]),
        ([1, 2], [2, 2, 3], []),
    ],
)
def test_how_many_tokens_follow_a_prompt(ids: list[int], sequences: list[int], counts: list[int]) -> None:
    """In a short context, all tokens of the prompt may have been dropped, but never more than there is room for."""
    found = _new_tokens(np.array([ids]), np.array([sequences]), room=5)
    assert found == counts
