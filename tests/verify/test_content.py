"""Other exporters' weights: found in every usual form, and damage to them is a difference, named by element.

Damage in rows that no probe reads leaves every output unchanged, so only the comparison of weights can see it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gptconvert.errors import InputError
from gptconvert.families.registry import family_named
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.model.schemes import write_names
from gptconvert.pipeline import verify_export
from gptconvert.verify.content import match_by_content
from gptconvert.verify.weights import WeightReport
from tests.commands import TINY, command
from tests.families import witness
from tests.helpers import computed_tensors
from tests.verify.exports import export, report_on, tiny

Array = NDArray[Any]
ROWS, POSITIONS = 5000, 300
Stored = Callable[[Array], tuple[list[Array], list[Any]]]


def plain(array: Array) -> tuple[list[Array], list[Any]]:
    return [array], []


def transposed(array: Array) -> tuple[list[Array], list[Any]]:
    return [array.T.copy()], [("Transpose", {"perm": [1, 0]})]


def half(array: Array) -> tuple[list[Array], list[Any]]:
    return [array.astype(np.float16)], [("Cast", {"to": TensorProto.FLOAT})]


def blocks(array: Array) -> tuple[list[Array], list[Any]]:
    """The fused q, k and v as three tensors."""
    axis = int(array.ndim > 1)  # GPT-2 stores [D, 3 D]
    return np.split(array, 3, axis), [("Concat", {"axis": axis})]


def scaled(array: Array) -> tuple[list[Array], list[Any]]:
    """Folded beyond recognition."""
    return [array * 2], [("Mul", {}, np.float32(0.5))]


def rewritten(path: Path, forms: Mapping[str, Stored], damage: Mapping[str, Callable[[Array], None]]) -> None:
    """Rewrite a graph as another exporter would: its own names, one file, and weights stored in other forms.

    ``damage`` changes arrays after the weight was brought into its form.
    """
    model = onnx.load_model(path)
    model.producer_name = "another exporter"
    nodes, tensors = list[Any](), list[Any]()
    for number, tensor in enumerate(model.graph.initializer):
        array = numpy_helper.to_array(tensor).copy()
        stored, steps = forms.get(tensor.name, plain)(array)
        spoil = damage.get(tensor.name)
        if spoil is not None:
            spoil(stored[0])
        names = [f"onnx::{number}.{k}" if steps or array.size > 50 else tensor.name for k in range(len(stored))]
        tensors += [numpy_helper.from_array(np.ascontiguousarray(a), n) for a, n in zip(stored, names, strict=True)]
        for operator, attributes, *operands in steps or [("Identity", {})] * (names != [tensor.name]):
            tensors += [numpy_helper.from_array(operand, f"{tensor.name}.{operator}") for operand in operands]
            names += [f"{tensor.name}.{operator}" for _ in operands]
            nodes.append(helper.make_node(operator, names, [tensor.name], **attributes))
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    path.write_bytes(model.SerializeToString())
    path.with_name("model.onnx_data").unlink()


def zero_rows(array: Array) -> None:
    """Ten rows in the middle, which the fixed probes do not read."""
    array[array.shape[0] // 2 : array.shape[0] // 2 + 10] = 0


def one_element(array: Array) -> None:
    array[5, 7] *= np.float32(1 + 1e-6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny(tmp_path_factory.mktemp("model"), vocab_size=ROWS, n_positions=POSITIONS, n_layer=2)


def judged(checkpoint: Checkpoint, directory: Path, forms: Any, damage: Any) -> Any:
    path = export(directory, checkpoint)
    rewritten(path, forms, damage)
    return report_on(checkpoint, path)


C_ATTN = "h.1.attn.c_attn.weight"
FORMS: Mapping[str, Mapping[str, Stored]] = {
    "as stored": {},
    "transposed": dict.fromkeys(("wte.weight", "h.0.mlp.c_fc.weight", C_ATTN), transposed),
    "split into blocks": {C_ATTN: blocks, "h.1.attn.c_attn.bias": blocks},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_are_found(checkpoint: Checkpoint, tmp_path: Path, form: str) -> None:
    report = judged(checkpoint, tmp_path, FORMS[form], {})
    assert report.passed, report.table()
    weights = report.artifacts[0].weights
    assert (weights.equal, weights.outputs_only, report.notes) == (weights.expected, [], ())
    assert report.table().endswith("\nverified")


@pytest.mark.parametrize("some", [True, False], ids=["one weight", "most weights"])
def test_16_bit_copies_are_found(checkpoint: Checkpoint, tmp_path: Path, some: bool) -> None:
    """Converters leave some weights in 32 bits; each is compared in the type that it is stored in."""
    wide = ("h.1.ln_1.weight", "wpe.weight")
    forms = {"wte.weight": half} if some else {name: half for name in checkpoint.weights if name not in wide}
    report = judged(checkpoint, tmp_path, forms, {})
    assert report.passed, report.table()
    assert report.artifacts[0].weights.outputs_only == []


@pytest.mark.parametrize(
    ("name", "form", "spoil", "said"),
    [
        ("wte.weight", plain, zero_rows, "240 of 120000 elements differ from wte.weight, first at element [2500, 0]"),
        ("wpe.weight", plain, zero_rows, "240 of 7200 elements differ from wpe.weight, first at element [150, 0]"),
        (
            "wte.weight",
            transposed,
            one_element,
            "1 of 120000 elements differ from wte.weight, first at element [5, 7]",
        ),
        (C_ATTN, transposed, one_element, f"1 of 1728 elements differ from {C_ATTN}, first at element [5, 7]"),
        (C_ATTN, blocks, one_element, f"1 of 576 elements differ from {C_ATTN}, first at element [5, 7]"),
        ("wte.weight", half, zero_rows, "first at element [2500, 0]"),
    ],
    ids=["zeroed rows", "position", "transposed table", "fused, transposed", "split", "half"],
)
def test_damage_is_a_difference(
    checkpoint: Checkpoint, tmp_path: Path, name: str, form: Stored, spoil: Any, said: str
) -> None:
    report = judged(checkpoint, tmp_path, {name: form}, {name: spoil})
    assert not report.passed
    assert said in report.table()


def test_unknown_form_qualifies_the_verdict(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The outputs agree, but say nothing about rows that no probe reads."""
    report = judged(checkpoint, tmp_path, {"wte.weight": scaled, "h.0.attn.c_proj.weight": scaled}, {})
    assert report.passed
    assert report.table().endswith("\nverified, except for 2 weights found in no stored form: outputs only")
    of_stress_weights, note = report.notes
    assert "and stress weights did not replace them" in note
    assert "kept the checkpoint's values (h.0.attn.c_attn.weight" in of_stress_weights
    assert "2 weights are found in no stored form (h.0.attn.c_proj.weight, wte.weight)" in note
    weights = report.as_dict()["artifacts"][0]["weights"]
    assert weights["outputs_only"] == ["h.0.attn.c_proj.weight", "wte.weight"]


def test_unused_copy_proves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = export(tmp_path, checkpoint)
    rewritten(path, {"wte.weight": scaled}, {})
    model = onnx.load_model(path)
    decoy = numpy_helper.from_array(np.ascontiguousarray(checkpoint.weights["wte.weight"].read()), "decoy")
    model.graph.initializer.append(decoy)
    path.write_bytes(model.SerializeToString())
    assert report_on(checkpoint, path).artifacts[0].weights.outputs_only == ["wte.weight"]


def test_weights_in_constant_nodes_are_found(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = export(tmp_path, checkpoint)
    rewritten(path, {}, {})
    model = onnx.load_model(path)
    held = [t for t in model.graph.initializer if t.dims == [ROWS, 24]]
    assert held
    for tensor in held:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        model.graph.initializer.remove(tensor)
    path.write_bytes(model.SerializeToString())
    report = report_on(checkpoint, path)
    assert report.passed and report.artifacts[0].weights.outputs_only == []


def matched(checkpoint: Checkpoint, arrays: Mapping[str, Array]) -> WeightReport:
    return match_by_content(computed_tensors(arrays), checkpoint)[0]


def read(checkpoint: Checkpoint) -> dict[str, Array]:
    return {f"t.{name}": np.array(weight.read()) for name, weight in checkpoint.weights.items()}


@pytest.mark.parametrize("family", witness.TINY)
def test_layouts_of_transformers(family: str, tmp_path: Path) -> None:
    """Its separate or interleaved q, k and v, as stored and transposed; one damaged element is found in each."""
    found = witness.checkpoint(witness.Case(family), tmp_path)
    layout = write_names(family_named(family).scheme("hf"), found.config, found.weights)
    for flip in (False, True):
        arrays = {f"onnx::{i}": np.array(t.read().T if flip else t.read()) for i, t in enumerate(layout.values())}
        report = matched(found, arrays)
        assert (report.equal, report.outputs_only, report.problems) == (report.expected, [], [])
        for name in (n for n, array in arrays.items() if array.ndim == 2 and np.unique(array).size > 2):
            spoiled = {**arrays, name: arrays[name].copy()}
            spoiled[name][3, 2] += 1
            (problem,) = matched(found, spoiled).problems
            assert problem.startswith(f"{name}: 1 of ") and problem.endswith("first at element [3, 2]")


def test_other_shapes_of_the_same_elements(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    arrays = {name: array.reshape(1, *array.shape, 1) for name, array in read(found).items()}
    arrays["t.wte.weight"] = np.concatenate((read(found)["t.wte.weight"], np.zeros((31, 24), np.float32)))
    assert matched(found, arrays).outputs_only == []
    arrays["t.wte.weight"][96, 23] = 1e-3
    arrays["t.h.0.mlp.c_fc.bias"][0, 9, 0] = 0
    assert [line.rpartition(" element ")[::2] for line in matched(found, arrays).problems] == [
        ("t.h.0.mlp.c_fc.bias: 1 of 56 elements differ from h.0.mlp.c_fc.bias, first at", "[0, 9, 0]"),
        ("t.wte.weight: 1 of 2328 elements differ from wte.weight, first at", "[96, 23]"),
    ]


def test_equal_weights_may_share_one_tensor(tmp_path: Path) -> None:
    """Exporters merge equal tensors, such as the zero biases of an untrained model."""
    trained = tiny(tmp_path)
    arrays = read(trained)
    ones = computed_tensors({n: np.ones(24, np.float32) for n in trained.weights if ".ln_" in n and "weight" in n})
    untrained = with_weights(trained, {**trained.weights, **ones})
    merged = {name: array for name, array in arrays.items() if name.removeprefix("t.") not in ones}
    assert matched(untrained, {**merged, "ones": np.ones(24, np.float32)}).outputs_only == []
    copies = {f"t.{name}": np.ones(24, np.float32) for name in ones}
    copies["t.h.1.ln_2.weight"][5] = 0
    (problem,) = matched(untrained, {**merged, **copies}).problems
    assert problem.startswith("t.h.1.ln_2.weight: 1 of 24 elements")


def with_weights(checkpoint: Checkpoint, weights: Mapping[str, Any]) -> Checkpoint:
    return dataclasses.replace(checkpoint, weights=weights)


def test_clamp_of_float16_converters_is_not_a_difference(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    arrays = read(found)
    small = arrays["t.wte.weight"]
    small[3, :5] = [1e-9, -1e-9, 5e-8, 0, 1e-7]
    found = with_weights(found, {**found.weights, **computed_tensors({"wte.weight": small})})
    narrow = {name: array.astype(np.float16) for name, array in arrays.items()}
    narrow["t.wte.weight"][3, :3] = [1e-7, -1e-7, 1e-7]
    report = matched(found, narrow)
    assert (report.problems, report.outputs_only) == ([], [])
    narrow["t.wte.weight"][3, 4] = 1e-6
    assert len(matched(found, narrow).problems) == 1


def test_pruned_weights_are_not_taken_for_copies_of_others(tmp_path: Path) -> None:
    """They have their zeros in common."""
    found = tiny(tmp_path)
    random = np.random.default_rng(1)
    sparse = {f"h.{i}.mlp.c_fc.weight": random.normal(size=(56, 24)).astype(np.float32) for i in (0, 1)}
    for array in sparse.values():
        array[:, 4:] = 0
    found = with_weights(found, {**found.weights, **computed_tensors(sparse)})
    arrays = {**read(found), "t.h.1.mlp.c_fc.weight": 2 * sparse["h.1.mlp.c_fc.weight"]}
    report = matched(found, arrays)
    assert (report.problems, report.outputs_only) == ([], ["h.1.mlp.c_fc.weight"])


def test_command_line(capsys: Any, tmp_path: Path) -> None:
    """A qualified verdict is a success with a note, which --strict refuses."""
    source, out = TINY / "openai-tf", tmp_path / "out"
    assert command(capsys, "convert", source, "-o", out, "--no-verify").code == 0
    path = out / "onnx" / "model.onnx"
    rewritten(path, {"wpe.weight": scaled}, {})
    done = command(capsys, "verify", source, path)
    assert done.code == 0
    assert "verified, except for 1 weight found in no stored form: outputs only" in done.out
    assert "1 weight is found in no stored form (wpe.weight)" in done.err
    strict = command(capsys, "verify", source, path, "--strict")
    assert strict.code == 3 and "wpe.weight" in strict.err
    with pytest.raises(InputError, match="found in no stored form"):
        verify_export(source, path, Options(strict=True))
