"""A SavedModel of unknown origin: an operator that writes a file is found wherever TensorFlow can hold one.

The models are saved by TensorFlow itself, or edited afterwards. Nothing is loaded, so nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.targets.child import client
from gptconvert.targets.child.client import Limits
from gptconvert.targets.saved_model import run as runtime
from gptconvert.targets.saved_model import verify as verifier
from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess
from gptconvert.targets.saved_model.safety import check_saved_model
from gptconvert.targets.saved_model.verify import SavedModelVerifier
from gptconvert.targets.target import Candidate
from tests.commands import command
from tests.families.witness import Case
from tests.helpers import FIXTURES
from tests.targets.saved_model.support import understood

pytestmark = pytest.mark.tensorflow

Build = Callable[[Any, Any, str], Any]


def save(tf: Any, directory: Path, build: Build, target: Path) -> Path:
    """A SavedModel with a weight under our name, and the signature ``decode`` that ``build`` returns."""
    root = tf.Module()
    root.weights = {"wte.weight": tf.Variable(tf.zeros((97, 24)))}
    signature = build(tf, root, str(target))
    path = directory / "saved_model"
    tf.saved_model.save(root, str(path), signatures={"decode": signature})
    return path


def function(tf: Any, body: Callable[[Any], Any]) -> Any:
    return tf.function(body, input_signature=[tf.TensorSpec((None,), tf.float32, "x")])


def planted(tf: Any, target: str) -> None:
    tf.io.write_file(target, "planted")


def in_signature(tf: Any, root: Any, target: str) -> Any:
    def body(x: Any) -> Any:
        planted(tf, target)
        return {"logits": x + tf.reduce_sum(root.weights["wte.weight"])}

    return function(tf, body)


def in_library(tf: Any, root: Any, target: str) -> Any:
    inner = function(tf, lambda x: in_signature(tf, root, target)(x)["logits"])
    return function(tf, lambda x: {"logits": inner(x)})


def in_while_body(tf: Any, root: Any, target: str) -> Any:
    def step(i: Any) -> Any:
        planted(tf, target)
        return (i + 1,)

    return function(tf, lambda x: {"logits": x + tf.cast(tf.while_loop(lambda i: i < 3, step, (0,))[0], tf.float32)})


def in_while_condition(tf: Any, root: Any, target: str) -> Any:
    def again(i: Any) -> Any:
        planted(tf, target)
        return i < 3

    return function(
        tf, lambda x: {"logits": x + tf.cast(tf.while_loop(again, lambda i: (i + 1,), (0,))[0], tf.float32)}
    )


def in_branch(tf: Any, root: Any, target: str) -> Any:
    def write() -> Any:
        planted(tf, target)
        return 1.0

    return function(tf, lambda x: {"logits": x + tf.cond(tf.reduce_sum(x) > 0, write, lambda: 2.0)})


def in_gradient(tf: Any, root: Any, target: str) -> Any:
    @tf.custom_gradient
    def squared(x: Any) -> Any:
        def gradient(upstream: Any) -> Any:
            planted(tf, target)
            return upstream * x

        return x * x, gradient

    def body(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = squared(x)
        return {"logits": tape.gradient(y, x)}

    return function(tf, body)


def in_initializer(tf: Any, root: Any, target: str) -> Any:
    """Runs as soon as the model is loaded."""

    class Table(tf.saved_model.experimental.TrackableResource):  # type: ignore[misc]
        def _create_resource(self) -> Any:
            return tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64)

        def _initialize(self) -> None:
            planted(tf, target)

    root.table = Table()

    def body(x: Any) -> Any:
        size = tf.raw_ops.LookupTableSizeV2(table_handle=root.table.resource_handle)
        return {"logits": x + tf.cast(size, tf.float32)}

    return function(tf, body)


def in_python(tf: Any, root: Any, target: str) -> Any:
    return function(
        tf, lambda x: {"logits": tf.py_function(lambda y: Path(target).write_text("") or y, [x], tf.float32)}
    )


def with_asset(tf: Any, root: Any, target: str) -> Any:
    source = Path(target).with_name("words")
    source.write_text("a\nb\n")
    root.asset = tf.saved_model.Asset(str(source))
    return function(tf, lambda x: {"logits": x})


def reading(tf: Any, root: Any, target: str) -> Any:
    return function(
        tf, lambda x: {"logits": x + tf.cast(tf.strings.length(tf.io.read_file("/etc/passwd")), tf.float32)}
    )


def saving(tf: Any, root: Any, target: str) -> Any:
    """A checkpoint is a file too."""

    def body(x: Any) -> Any:
        tf.raw_ops.SaveV2(prefix=target, tensor_names=["a"], shape_and_slices=[""], tensors=[x])
        return {"logits": x}

    return function(tf, body)


def harmless_fill(tf: Any, root: Any, target: str) -> Any:
    return function(tf, lambda x: {"logits": x + tf.reduce_sum(tf.raw_ops.Fill(dims=[4], value=1.0))})


BUILT: dict[str, tuple[Build, tuple[str, ...]]] = {
    "signature": (in_signature, ("operator WriteFile", "in function __inference_body")),
    "function library": (in_library, ("operator WriteFile",)),
    "body of While": (in_while_body, ("operator WriteFile", "while_body")),
    "condition of While": (in_while_condition, ("operator WriteFile", "while_cond")),
    "branch of If": (in_branch, ("operator WriteFile", "cond_true")),
    "gradient function": (in_gradient, ("operator WriteFile",)),
    "initializer": (in_initializer, ("operator WriteFile", "has resource", "HashTableV2")),
    "Python": (in_python, ("PyFunc",)),
    "asset": (with_asset, ("has asset", "asset file 'words'")),
    "reading a file": (reading, ("operator ReadFile",)),
    "saving a checkpoint": (saving, ("operator SaveV2",)),
}


def refused(path: Path, words: tuple[str, ...], target: Path, monkeypatch: Any, saved: Path) -> None:
    """Both commands refuse the model, and start no TensorFlow."""
    for module in (verifier, runtime):
        monkeypatch.setattr(module, "TensorFlowProcess", lambda *_: pytest.fail("TensorFlow was started"))
    candidate = Candidate("tf", str(path), "saved_model", understood(Case("gpt2"), saved))
    for attempt in (
        lambda: SavedModelVerifier()(candidate, "default", lambda name, total: lambda count: None),
        lambda: runtime.TensorFlowRuntime(str(path.parent), {"n_positions": 40}),
    ):
        with pytest.raises(UnsafeInputError) as caught:
            attempt()
        assert caught.value.exit_code == 7
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("name", BUILT)
def test_saved_by_tensorflow(
    name: str, tf: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, words = BUILT[name]
    target = tmp_path / "written"
    refused(save(tf, tmp_path, build, target), words, target, monkeypatch, saved)


def write_file(model: Any) -> None:
    model.meta_graphs[0].graph_def.node.add(name="planted", op="WriteFile", input=["a", "b"])


def chain(levels: int) -> Callable[[Any], None]:
    """Functions that each call the next twice."""

    def change(model: Any) -> None:
        library = model.meta_graphs[0].graph_def.library
        for level in range(levels):
            function = library.function.add()
            function.signature.name = f"f{level}"
            for name in ("a", "b"):
                call = function.node_def.add(name=name, op="PartitionedCall")
                call.attr["f"].func.name = f"f{level + 1}"
        library.function.add().signature.name = f"f{levels}"
        root = model.meta_graphs[0].graph_def.node.add(name="root", op="PartitionedCall")
        root.attr["f"].func.name = "f0"

    return change


def recursion(model: Any) -> None:
    chain(0)(model)
    body = model.meta_graphs[0].graph_def.library.function[-1]
    body.node_def.add(name="n", op="PartitionedCall").attr["f"].func.name = "f0"


def call_save(model: Any) -> None:
    """A signature that calls the function with which TensorFlow saves checkpoints."""
    library = model.meta_graphs[0].graph_def.library
    saving = next(f.signature.name for f in library.function if "traced_save" in f.signature.name)
    caller = next(f for f in library.function if "signature_wrapper" in f.signature.name)
    caller.node_def.add(name="planted", op="StatefulPartitionedCall").attr["f"].func.name = saving


def swap_save(model: Any) -> None:
    """TensorFlow replaces functions of one ``api_implements`` by each other."""
    for function in model.meta_graphs[0].graph_def.library.function:
        function.attr["api_implements"].s = b"same"


def splat(model: Any) -> None:
    constant = model.meta_graphs[0].graph_def.node.add(name="huge", op="Const").attr["value"].tensor
    constant.dtype = 1
    constant.float_val.append(1.0)
    constant.tensor_shape.dim.add(size=1 << 34)


EDITED: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "main graph": (write_file, ("operator WriteFile (node planted, in the main graph)",)),
    "gradient of the library": (
        lambda m: m.meta_graphs[0].graph_def.library.gradient.add(function_name="f", gradient_func="g"),
        ("gradient function of f",),
    ),
    "registered gradient": (
        lambda m: m.meta_graphs[0].graph_def.library.registered_gradients.add(registered_op_type="Mul"),
        ("registered gradient",),
    ),
    "collection": (
        lambda m: m.meta_graphs[0].collection_def["legacy_init_op"].node_list.value.append("planted"),
        ("collection legacy_init_op",),
    ),
    "second graph": (lambda m: m.meta_graphs.add(), ("2 graphs",)),
    "no objects": (
        lambda m: m.meta_graphs[0].ClearField("object_graph_def"),
        ("1 graphs, expected one with objects",),
    ),
    "class": (
        lambda m: setattr(m.meta_graphs[0].object_graph_def.nodes[0].user_object, "identifier", "_tf_keras_model"),
        ("Python class _tf_keras_model",),
    ),
    "saver of a class": (
        lambda m: setattr(m.meta_graphs[0].object_graph_def.nodes[0], "registered_name", "Evil"),
        ("has registered_name",),
    ),
    "signature that saves": (call_save, ("operator SaveV2",)),
    "exchanged function": (swap_save, ("attribute api_implements",)),
    "2^39 calls": (chain(39), ("levels deep", "expand to")),
    "nesting": (chain(2000), ("levels deep",)),
    "recursion": (recursion, ("function f0 calls itself",)),
    "huge constant": (splat, ("constant huge of 17179869184 elements",)),
}


@pytest.fixture(scope="module")
def plain(tf: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = save(tf, tmp_path_factory.mktemp("plain"), harmless_fill, Path("/nowhere"))
    assert check_saved_model(str(path)) > 1000
    return (path / "saved_model.pb").read_bytes()


@pytest.fixture
def harmless(tf: Any, plain: bytes, tmp_path: Path) -> Path:
    """A copy of a model that passes."""
    path = save(tf, tmp_path, harmless_fill, Path("/nowhere"))
    (path / "saved_model.pb").write_bytes(plain)
    return path


@pytest.mark.parametrize("name", EDITED)
def test_edited(name: str, harmless: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    change, words = EDITED[name]
    file = harmless / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    change(model)
    file.write_bytes(model.SerializeToString())
    refused(harmless, words, tmp_path / "written", monkeypatch, saved)


@pytest.mark.parametrize("name", ["saved_model.cpb", "saved_model.pbtxt"])
def test_second_graph_file(
    name: str, harmless: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (harmless / name).write_bytes(b"")
    refused(harmless, ("more than one graph", name), tmp_path / "written", monkeypatch, saved)


def test_damaged_graph(plain: bytes, tmp_path: Path) -> None:
    for content in (plain[:-7], b"\x12\xff\xff\xff\xff\x0f", bytes(100)):
        (tmp_path / "saved_model.pb").write_bytes(content)
        with pytest.raises((InputError, UnsafeInputError)):
            check_saved_model(str(tmp_path))


def test_exit_code_and_message(tf: Any, tmp_path: Path, capsys: Any) -> None:
    save(tf, tmp_path, in_initializer, tmp_path / "written")
    done = command(capsys, "verify", FIXTURES / "tiny-gpt2/hf-safetensors", tmp_path, "--json")
    assert done.code == 7 and "operator WriteFile" in done.json["error"]["message"]
    assert not (tmp_path / "written").exists()


def test_limits_of_the_process(tf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing, memory and time, one after another, for a model that is loaded unchecked."""
    target, root = tmp_path / "written", tf.Module()
    target.write_text("kept")

    def write(x: Any) -> Any:
        planted(tf, str(target))
        return {"y": x}

    def large(x: Any) -> Any:
        return {"y": tf.reduce_sum(tf.fill((tf.cast(x[0], tf.int32), 1 << 20), x[0]))}

    def endless(x: Any) -> Any:
        return {"y": tf.while_loop(lambda i: i >= 0.0, lambda i: (i * 0.5,), (x[0],))[0]}

    named = {"write": write, "large": large, "endless": endless}
    tf.saved_model.save(root, str(tmp_path / "m"), {name: function(tf, body) for name, body in named.items()})
    one = {"x": np.ones(1, np.float32)}
    with TensorFlowProcess(Limits.of(str(tmp_path), 0, 0, None, 0)) as confined:
        confined.ask("load", path=str(tmp_path / "m"))
        with pytest.raises(TensorFlowError):
            confined.run("write", one)
        assert target.read_text() == "kept"
        with pytest.raises(TensorFlowError, match=r"OOM|alloc|memory"):
            confined.run("large", {"x": np.float32([3000])})
        monkeypatch.setattr(client, "SECONDS", 1.0)
        with pytest.raises(UnsafeInputError, match="does not end in time"):
            confined.run("endless", one)
