"""A graph of unknown origin: refused by operator before it is loaded; what passes runs within limits.

ONNX has no operator that writes files, so a custom one stands for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.targets.child import client
from gptconvert.targets.onnx import process, run, runner
from gptconvert.targets.onnx.file import open_onnx
from gptconvert.targets.onnx.run import OnnxRuntime
from gptconvert.verify.probes import make_probes
from gptconvert.verify.run_probes import feeds_of
from gptconvert.verify.runners import RunError
from tests.commands import command
from tests.helpers import FIXTURES
from tests.verify.exports import edit, export, report_on, tiny

Change = Callable[[Any], None]
EVIL = helper.make_node("WriteFile", [], ["written"], name="planted", domain="evil")


def add(*nodes: Any, functions: Any = (), domains: Any = ("evil", "local")) -> Change:
    def change(model: Any) -> None:
        model.graph.node.extend(nodes)
        model.functions.extend(functions)
        model.ir_version = max(model.ir_version, 8)
        model.opset_import.extend(helper.make_opsetid(domain, 1) for domain in domains)

    return change


def constant(name: str, array: Any) -> Any:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(_single(array), name))


def _single(array: Any) -> Any:
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def graph(name: str, *nodes: Any, inputs: Any = (), outputs: Any = ()) -> Any:
    return helper.make_graph(nodes, name, list(inputs), list(outputs))


def branch_on(then: Any, name: str = "choice") -> Any:
    """An ``If`` with a node in one branch."""
    other = graph("else", constant(f"{name}_else", [1.0]))
    return helper.make_node(
        "If", ["yes"], [f"{name}_out"], name=name, then_branch=graph("then", then), else_branch=other
    )


def function(name: str, *nodes: Any) -> Any:
    return helper.make_function(
        "local", name, [], ["y"], nodes, [helper.make_opsetid("", 17), helper.make_opsetid("evil", 1)]
    )


def call(name: str, output: str) -> Any:
    return helper.make_node(name, [], [output], domain="local")


def body(*nodes: Any) -> Any:
    value = helper.make_tensor_value_info
    scalars = [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, [])]
    return graph("body", *nodes, inputs=scalars, outputs=[value("c", TensorProto.BOOL, [])])


def loop(*nodes: Any, trips: int = 10**12) -> Any:
    return (
        constant("trips", np.int64(trips)),
        helper.make_node("Loop", ["trips", ""], [], name="endless", body=body(*nodes)),
    )


def tower(levels: int) -> Any:
    """``If`` within ``If``, which onnxruntime resolves again at every level."""
    node = constant("bottom", [1.0])
    for level in range(levels):
        node = branch_on(node, f"level{level}")
    return node


def doubling(levels: int) -> list[Any]:
    """Functions that each call the next twice."""
    pairs = [(f"f{i}", [call(f"f{i + 1}", "y"), call(f"f{i + 1}", "z")]) for i in range(levels)]
    return [function(name, *nodes) for name, nodes in pairs] + [function(f"f{levels}", constant("y", [1.0]))]


def training(model: Any) -> None:
    model.training_info.add().algorithm.CopyFrom(graph("algorithm", EVIL))


CASES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "main graph": (add(EVIL), ("WriteFile of domain evil", "'planted'", "the main graph")),
    "branch": (add(branch_on(EVIL)), ("WriteFile", "then_branch of If 'choice'")),
    "branch in a branch": (add(branch_on(branch_on(EVIL, "inner"))), ("WriteFile", "If 'inner'", "If 'choice'")),
    "loop body": (add(*loop(EVIL, trips=1)), ("WriteFile", "operator Loop", "'endless'")),
    "function": (
        add(call("f", "out"), functions=[function("f", EVIL, constant("y", [1.0]))]),
        ("WriteFile", "function local:f"),
    ),
    "function that is not called": (add(functions=[function("f", EVIL)]), ("WriteFile", "function local:f")),
    "branch in a function": (
        add(functions=[function("f", constant("yes", True), branch_on(EVIL))]),
        ("WriteFile", "If 'choice'", "function local:f"),
    ),
    "unnamed node": (add(helper.make_node("WriteFile", [], ["out"], domain="evil")), ("WriteFile", "'out'")),
    "training graph": (training, ("graphs for training",)),
    "compiled binary": (
        add(helper.make_node("EPContext", [], ["out"], domain="com.microsoft"), domains=("com.microsoft",)),
        ("EPContext of domain com.microsoft",),
    ),
    "body on another operator": (
        add(helper.make_node("Identity", ["logits"], ["out"], name="n", body=graph("g", EVIL))),
        ("attribute body with a graph", "WriteFile"),
    ),
    "loop of 10^12 runs": (add(*loop(helper.make_node("Identity", ["c"], ["d"]))), ("operator Loop", "'endless'")),
    "random numbers": (add(helper.make_node("RandomNormal", [], ["out"], shape=[1 << 30])), ("RandomNormal",)),
    "2^39 calls": (add(call("f0", "out"), functions=doubling(39)), ("expand to", "nodes")),
    "a chain of 1000 calls": (
        add(functions=[function(f"f{i}", call(f"f{i + 1}", "y")) for i in range(1000)]),
        ("levels deep",),
    ),
    "recursion": (add(functions=[function("f", call("f", "y"))]), ("function local:f calls itself",)),
    "two functions of one name": (
        add(functions=[function("f", constant("y", [1.0])), function("f", constant("y", [2.0]))]),
        ("two functions named local:f",),
    ),
    "tower of branches": (add(tower(12)), ("branches nested more than 4 levels",)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny(tmp_path_factory.mktemp("checkpoint"))


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("onnxruntime was started")


@pytest.mark.parametrize("name", CASES)
def test_refused_before_a_runtime_starts(
    name: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, attribute in ((runner, "open_session"), (runner, "OnnxProcess"), (run, "OnnxProcess")):
        monkeypatch.setattr(module, attribute, never)
    change, words = CASES[name]
    path = export(tmp_path, checkpoint)
    edit(path, change)
    for attempt in (lambda: report_on(checkpoint, path), lambda: OnnxRuntime(str(tmp_path), {"n_positions": 40})):
        with pytest.raises(UnsafeInputError) as caught:
            attempt()
        assert caught.value.exit_code == 7 and caught.value.path == str(path)
        assert all(word in caught.value.message for word in words), caught.value.message


def test_exit_code_and_message(checkpoint: Checkpoint, tmp_path: Path, capsys: Any) -> None:
    path = export(tmp_path, checkpoint)
    edit(path, add(EVIL))
    done = command(capsys, "verify", FIXTURES / "tiny-gpt2/hf-safetensors", path, "--json")
    assert done.code == 7
    assert "WriteFile of domain evil (node 'planted', in the main graph)" in done.json["error"]["message"]


def test_harmless_functions_and_branches_are_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As other exporters write them."""
    path = export(tmp_path, checkpoint)
    inner = function("inner", constant("y", [1.0]))
    outer = function("outer", call("inner", "z"), helper.make_node("Identity", ["z"], ["y"]))
    for each in (inner, outer):
        each.opset_import.append(helper.make_opsetid("local", 1))
    other = (
        helper.make_tensor_value_info("t", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("e", TensorProto.FLOAT, None),
    )
    choice = helper.make_node(
        "If",
        ["yes"],
        ["chosen"],
        then_branch=graph("then", helper.make_node("Identity", ["one"], ["t"]), outputs=other[:1]),
        else_branch=graph("else", constant("e", [2.0]), outputs=other[1:]),
    )

    def change(model: Any) -> None:
        add(functions=[inner, outer], domains=("local",))(model)
        model.producer_name = "another exporter"
        next(n for n in model.graph.node if "logits" in n.output).output[0] = "plain"
        scaled = helper.make_node("Mul", ["plain", "chosen"], ["logits"])
        model.graph.node.extend([call("outer", "one"), constant("yes", True), choice, scaled])

    edit(path, change)
    assert report_on(checkpoint, path).passed


def multiplied(size: int, times: int, zero: float = 0.0) -> Change:
    """Add to the logits ``zero`` times a value that takes memory, or ``times`` products of time."""

    def change(model: Any) -> None:
        next(n for n in model.graph.node if "logits" in n.output).output[0] = "plain"
        nodes = [
            helper.make_node("Shape", ["input_ids"], ["sizes"]),  # not known when the graph is optimised
            constant("zeros", np.int64([0, 0])),
            constant("size", np.int64([size, size])),
            helper.make_node("Mul", ["sizes", "zeros"], ["nothing"]),
            helper.make_node("Add", ["nothing", "size"], ["square"]),
            constant("one", np.float32([1e-5])),
            helper.make_node("Expand", ["one", "square"], ["m0"]),
            *(helper.make_node("MatMul", [f"m{i}", "m0"], [f"m{i + 1}"]) for i in range(times)),
            helper.make_node("ReduceMax", [f"m{times}"], ["most"], keepdims=0),
            constant("zero", np.float32(zero)),
            helper.make_node("Mul", ["most", "zero"], ["none"]),
            helper.make_node("Add", ["plain", "none"], ["logits"]),
        ]
        model.graph.node.extend(nodes)

    return change


def test_three_gigabytes(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "OnnxProcess", process.OnnxProcess)
    path = export(tmp_path, checkpoint)
    edit(path, multiplied(28_000, 0))
    file, config = open_onnx(str(path)), checkpoint.config
    confined = runner.OnnxRunner(file, runner.bind(file, config), config)
    feeds = feeds_of(make_probes(config, kv_cache=True)[0], config)
    with pytest.raises(RunError, match=r"(?i)allocate|bad_alloc"):
        confined.run(feeds, False)


def test_endless_graph(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products take hours."""
    monkeypatch.setattr(runner, "OnnxProcess", process.OnnxProcess)
    monkeypatch.setattr(client, "SECONDS", 3.0)
    path = export(tmp_path, checkpoint)
    edit(path, multiplied(2000, 2000))
    with pytest.raises(UnsafeInputError, match="does not end in time") as caught:
        report_on(checkpoint, path)
    assert caught.value.path == str(path)


def test_process_that_dies(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(process.OnnxProcess):
        def call(self, command: str, *arguments: Any, **fields: Any) -> Any:
            if command == "run":
                self._process.kill()
            return super().call(command, *arguments, **fields)

    monkeypatch.setattr(runner, "OnnxProcess", Killed)
    with pytest.raises(UnsafeInputError, match="killed by signal 9"):
        report_on(checkpoint, export(tmp_path, checkpoint))


def test_failing_step_is_an_input_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export(tmp_path, checkpoint)
    loaded = OnnxRuntime(str(tmp_path), {"n_positions": 40})
    try:
        with pytest.raises(InputError, match="onnxruntime cannot run the graph"):
            loaded.step([[9999]], [0])
    finally:
        loaded.close()


def test_our_own_graphs_hold_nothing_else(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from gptconvert.targets.onnx.safety import check_operators

    check_operators(onnx.load_model(export(tmp_path, checkpoint), load_external_data=False), "")


@pytest.mark.parametrize("where", ["operator", "function", "tensor", "input", "attribute"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, where: str) -> None:
    """Protobuf returns such text as bytes, wherever it is."""
    names = {key: f"name-of-{key}" for key in ("operator", "function", "tensor", "input", "attribute")}
    single = helper.make_tensor(names["tensor"], TensorProto.FLOAT, [1], [1.0])
    value = helper.make_tensor_value_info(names["input"], TensorProto.FLOAT, [1])
    node = helper.make_node(names["operator"], [names["input"]], ["y"], **{names["attribute"]: 1})
    made = helper.make_model(
        helper.make_graph([node], "g", [value], [], [single]),
        functions=[helper.make_function("local", names["function"], [], [], [], [])],
    ).SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(made.replace(names[where].encode(), b"\xff" + names[where][1:].encode()))
    with pytest.raises(InputError, match="UTF-8"):
        open_onnx(str(path))
