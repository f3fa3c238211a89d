"""LiteRT files run in LiteRT: every family and task is proven, and planted bugs fail in bytes or outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.containers.tflite import read_tflite
from gptconvert.errors import InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.options import TFLITE_TYPES
from gptconvert.targets.foreign import find_candidates
from gptconvert.targets.tflite.build import ConverterProcess
from gptconvert.targets.tflite.process import LiteProcess
from gptconvert.targets.verification import verify
from gptconvert.verify.evaluation import Amount, Evaluation
from tests.families.witness import Case
from tests.helpers import checkpoint_of, tiny_gpt2
from tests.targets.saved_model.support import understood
from tests.targets.tflite.support import constant, edited, exported, operators, ratios, written

pytestmark = pytest.mark.tensorflow

#: A tied head with a bias.
TIED = Case("gptj", keys={"tie_word_embeddings": True}, name="tied")
CASES = (
    Case("gpt1"),
    Case("gpt_neo"),
    TIED,
    Case("gpt_neox"),
    Case("gpt2", "text-classification"),
    Case("gpt2", "multiple-choice"),
    Case("gpt_neox", "feature-extraction"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family(case: Case, shared: ConverterProcess, saved: Path, tmp_path: Path) -> None:
    checkpoint = understood(case, saved)
    report = exported(checkpoint, tmp_path, *(TFLITE_TYPES if case is TIED else ("f32",)))
    assert report.passed, report.table()
    for artifact in report.artifacts:
        assert artifact.weights.equal == artifact.weights.expected == len(checkpoint.weights)
        assert len(artifact.runs) == 1 and (case.task != "text-generation" or max(ratios(artifact)) < 3)
    found = verify(find_candidates(checkpoint, str(tmp_path)))
    assert found.passed and len(found.artifacts) == len(report.artifacts), found.table()


def test_the_same_bytes_everywhere(shared: ConverterProcess, gpt2: Path, tmp_path: Path) -> None:
    """Whatever TensorFlow has converted before, and wherever it keeps its files."""
    exports = written(checkpoint_of(*tiny_gpt2()), tmp_path, *TFLITE_TYPES)
    assert [(tmp_path / e.path).read_bytes() for e in exports] == [(gpt2 / e.path).read_bytes() for e in exports]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, converter: ConverterProcess) -> Path:
    """Files of every type of one model."""
    from gptconvert.targets.tflite import build
    from tests.targets.saved_model.support import Shared

    directory = tmp_path_factory.mktemp("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "ConverterProcess", Shared(converter))
        written(checkpoint_of(*tiny_gpt2()), directory, *TFLITE_TYPES)
    return directory


def copied(gpt2: Path, directory: Path, name: str = "model.tflite") -> Path:
    path = directory / name
    path.write_bytes((gpt2 / name).read_bytes())
    return path


#: Type of the file → name of a weight, and its part that is damaged.
DAMAGE = [
    ("model.tflite", "h.1.mlp.c_fc.bias", "stored"),
    ("model.tflite", "wte.weight", "stored"),
    ("model_fp16.tflite", "h.0.attn.c_attn.weight", "stored"),
    ("model_int8.tflite", "wte.weight", "stored"),
    ("model_int8.tflite", "h.1.mlp.c_proj.weight", "scales"),
    ("model_int8.tflite", "h.0.attn.c_attn.weight", "zeros"),
    ("model_int8.tflite", "wte.weight/scales", "stored"),
]


@pytest.mark.parametrize(("file", "name", "part"), DAMAGE)
def test_altered_bytes(file: str, name: str, part: str, gpt2: Path, tmp_path: Path, shared: Any) -> None:
    path = copied(gpt2, tmp_path, file)
    tensor = next(t for t in read_tflite(str(path)).graphs[0].tensors if t.name == name)
    (segment,) = getattr(tensor, part).parts
    data = bytearray(path.read_bytes())
    data[segment.offset + segment.nbytes // 2] ^= 1
    path.write_bytes(data)
    (artifact,) = verify(find_candidates(checkpoint_of(*tiny_gpt2()), str(path))).artifacts
    assert not artifact.ok and not artifact.runs
    assert any(name.partition("/")[0] in problem and "differs" in problem for problem in artifact.weights.problems)


def without_mask(model: Any) -> None:
    """The value that hides a key becomes 0."""
    found = {graph.tensors[operator.inputs[2]].buffer for graph, operator in operators(model, "SELECT_V2")}
    for buffer in (model.buffers[number] for number in found):
        assert buffer.data.view(np.float32)[0] < -1e38
        buffer.data = np.zeros(4, np.uint8)


def other_epsilon(model: Any) -> None:
    for graph, operator in operators(model, "RSQRT"):
        added = next(o for o in graph.operators if operator.inputs[0] in o.outputs)
        model.buffers[graph.tensors[added.inputs[1]].buffer].data = np.array([1e-3], np.float32).view(np.uint8)


def swapped_parts(model: Any) -> None:
    """q and k change places."""
    for _, operator in operators(model, "SPLIT"):
        operator.outputs = [operator.outputs[i] for i in (1, 0, 2)]


def permuted_heads(model: Any) -> None:
    """Features are split as [d, H] instead of [H, d]."""
    for _, operator in operators(model, "PACK"):
        if len(operator.inputs) == 4:
            operator.inputs = [operator.inputs[i] for i in (0, 1, 3, 2)]
    products = {int(o.outputs[0]) for _, o in operators(model, "BATCH_MATMUL")}
    for graph, operator in operators(model, "TRANSPOSE"):
        if operator.inputs[0] not in products:
            operator.inputs = [operator.inputs[0], constant(model, graph, np.array((0, 3, 1, 2), np.int32))]


def unscaled(model: Any) -> None:
    """Scores without 1 / √d."""
    for graph, operator in operators(model, "MUL"):
        data = model.buffers[graph.tensors[operator.inputs[1]].buffer].data
        if data is not None and len(data) == 4:
            model.buffers[graph.tensors[operator.inputs[1]].buffer].data = np.ones(1, np.float32).view(np.uint8)


BUGS = (without_mask, other_epsilon, unscaled, swapped_parts, permuted_heads)


@pytest.mark.parametrize(("file", "bug"), [*(("model.tflite", bug) for bug in BUGS), ("model_int8.tflite", unscaled)])
def test_planted_bugs(file: str, bug: Any, gpt2: Path, tmp_path: Path, shared: Any) -> None:
    """Changes of the graph around weights that are right."""
    path = copied(gpt2, tmp_path, file)
    edited(path, bug)
    (artifact,) = verify(find_candidates(checkpoint_of(*tiny_gpt2()), str(path))).artifacts
    assert artifact.weights.ok and not artifact.ok
    assert max(ratios(artifact)) > 20


def test_an_edit_without_a_bug(gpt2: Path, tmp_path: Path, shared: Any) -> None:
    path = copied(gpt2, tmp_path)
    edited(path, lambda model: None)
    assert verify(find_candidates(checkpoint_of(*tiny_gpt2()), str(path))).passed


def test_other_rotary_pairs(shared: ConverterProcess, saved: Path, tmp_path: Path) -> None:
    checkpoint = understood(Case("gptj"), saved)
    rotary = checkpoint.config.rotary
    assert rotary is not None and rotary.interleaved
    config = dataclasses.replace(checkpoint.config, rotary=dataclasses.replace(rotary, interleaved=False))
    written(dataclasses.replace(checkpoint, config=config), tmp_path, "f32")
    (artifact,) = verify(find_candidates(checkpoint, str(tmp_path))).artifacts
    assert artifact.weights.ok and not artifact.ok and max(ratios(artifact)) > 20


def test_what_8_bits_lose(shared: ConverterProcess, gpt2: Path, saved: Path) -> None:
    checkpoint = checkpoint_of(*tiny_gpt2())
    evaluation = Evaluation(checkpoint, None, amount=Amount(4, 32, 2, 16))
    candidates = find_candidates(checkpoint, str(gpt2))
    report = verify([dataclasses.replace(c, evaluation=evaluation) for c in candidates])
    qualities = [artifact.quality for artifact in report.artifacts]
    assert report.passed and qualities[:2] == [None, None], report.table()
    assert qualities[2] is not None and qualities[2].figures is not None
    assert 1e-6 < qualities[2].figures.kl_mean < qualities[2].limit == 0.05  # type: ignore[operator]
    strict = dataclasses.replace(evaluation, max_kl=1e-7)
    report = verify([dataclasses.replace(c, evaluation=strict) for c in candidates])
    assert report.misses_limit


def test_files_of_others(shared: ConverterProcess, gpt2: Path, tmp_path: Path) -> None:
    other = checkpoint_of(*tiny_gpt2(1))
    report = verify(find_candidates(other, str(gpt2 / "model.tflite")))
    assert not report.passed and report.artifacts[0].weights.equal == 0
    path = copied(gpt2, tmp_path)

    def rename(model: Any) -> None:
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                tensor.name = "x"

    edited(path, rename)
    with pytest.raises(UnsupportedError, match="not written by gptconvert"):
        verify(find_candidates(other, str(path)))


def test_missing_signature(shared: ConverterProcess, gpt2: Path, tmp_path: Path) -> None:
    path = copied(gpt2, tmp_path)

    def drop(model: Any) -> None:
        model.signatureDefs = [s for s in model.signatureDefs if s.signatureKey != b"decode"]

    edited(path, drop)
    (artifact,) = verify(find_candidates(checkpoint_of(*tiny_gpt2()), str(path))).artifacts
    assert artifact.problems == ["no signature decode"]


def test_a_large_constant_that_is_no_weight(shared: ConverterProcess, gpt2: Path, tmp_path: Path) -> None:
    path = copied(gpt2, tmp_path)

    edited(path, lambda model: constant(model, model.subgraphs[0], np.zeros(1 << 19, np.int32)))
    (artifact,) = verify(find_candidates(checkpoint_of(*tiny_gpt2()), str(path))).artifacts
    assert artifact.weights.problems == ["more: a constant of 2097152 bytes that is not a weight of this model"]


def test_operators_that_are_not_mathematics(gpt2: Path, tmp_path: Path) -> None:
    path = copied(gpt2, tmp_path)

    def custom(model: Any) -> None:
        model.operatorCodes[0].builtinCode = model.operatorCodes[0].deprecatedBuiltinCode = 32

    edited(path, custom)
    with pytest.raises(UnsafeInputError, match="not built in"):
        verify(find_candidates(checkpoint_of(*tiny_gpt2()), str(path)))


def test_a_file_that_litert_cannot_load(shared: ConverterProcess, gpt2: Path, tmp_path: Path) -> None:
    path = copied(gpt2, tmp_path)

    def version(model: Any) -> None:
        for code in model.operatorCodes:
            code.version = 99

    edited(path, version)
    with pytest.raises(InputError, match="cannot load"):
        verify(find_candidates(checkpoint_of(*tiny_gpt2()), str(path)))


def test_a_confined_process_runs_it(gpt2: Path) -> None:
    """As any file of unknown origin."""
    checkpoint = checkpoint_of(*tiny_gpt2())
    report = verify(find_candidates(checkpoint, str(gpt2 / "model_int8.tflite")))
    assert report.passed, report.table()


def test_ids_out_of_range_fail(gpt2: Path) -> None:
    with LiteProcess() as process:
        process.load(str(gpt2 / "model.tflite"), 1)
        ids = np.array([[97]], np.int64)
        with pytest.raises(Exception, match="gather"):
            process.run("serving_default", {"input_ids": ids, "attention_mask": np.ones_like(ids)})


def test_weights_that_are_left_out(shared: ConverterProcess, tmp_path: Path) -> None:
    """Adding zeros or multiplying by ones changes nothing, so the converter drops such constants."""
    raw, arrays = tiny_gpt2()
    for name, array in arrays.items():
        if ".ln_1." in name:
            array[:] = name.endswith("weight")
    report = exported(checkpoint_of(raw, arrays), tmp_path, "f32")
    assert report.passed and report.artifacts[0].weights.equal == report.artifacts[0].weights.expected
    names = {t.name for t in read_tflite(str(tmp_path / "model.tflite")).graphs[0].tensors if t.stored is not None}
    assert not any("h.0.ln_1.bias" in name for name in names)


def test_equal_constants_of_different_shapes(shared: ConverterProcess, tmp_path: Path) -> None:
    """The converter stores them once; in 8 bits they differ in their scales."""
    raw, arrays = tiny_gpt2(n_inner=48)
    for name, array in arrays.items():
        if ".mlp." in name and name.endswith("weight"):
            array[:] = 0.25
    report = exported(checkpoint_of(raw, arrays), tmp_path, "int8", "f16")
    assert report.passed, report.table()


def test_a_weight_too_large_for_float16(shared: ConverterProcess, tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2()
    arrays["transformer.h.0.mlp.c_fc.weight"][0, 0] = 1e6
    with pytest.raises(UnsupportedError, match="too large for float16"):
        written(checkpoint_of(raw, arrays), tmp_path, "f16")
