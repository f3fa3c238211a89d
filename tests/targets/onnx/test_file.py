"""External data of an untrusted model is checked before a runtime opens it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gptconvert.errors import GptConvertError, InputError, UnsafeInputError
from gptconvert.targets.onnx import runner
from gptconvert.targets.onnx.file import open_onnx
from tests.verify.exports import edit, export, report_on, tiny


def put(key: str, value: str) -> Callable[[Any], None]:
    """Set a key of one weight's external data."""

    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "h.1.mlp.c_fc.weight")
        entry = next((e for e in tensor.external_data if e.key == key), None)
        (entry or tensor.external_data.add(key=key)).value = value

    return change


def drop_location(model: Any) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "h.1.mlp.c_fc.weight")
    kept = [(e.key, e.value) for e in tensor.external_data if e.key != "location"]
    del tensor.external_data[:]
    for key, value in kept:
        tensor.external_data.add(key=key, value=value)


def repeat_offset(model: Any) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "h.1.mlp.c_fc.weight")
    tensor.external_data.add(key="offset", value="0")


def repeat_initializer(model: Any) -> None:
    """A second value of the weight, which comes last or first depending on the reader."""
    twin = numpy_helper.from_array(np.zeros((56, 24), np.float32), "h.1.mlp.c_fc.weight")
    model.graph.initializer.append(twin)


def drop_data(model: Any) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "h.1.mlp.c_fc.weight")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT


def too_few_numbers(model: Any) -> None:
    drop_data(model)
    next(t for t in model.graph.initializer if t.name == "h.1.mlp.c_fc.weight").float_data.append(1.0)


CASES: list[tuple[str, Callable[[Any], None], type[GptConvertError], str]] = [
    ("parent", put("location", "../secret"), UnsafeInputError, "leaves"),
    ("parent inside", put("location", "sub/../../secret"), UnsafeInputError, "leaves"),
    ("backslash", put("location", "..\\secret"), UnsafeInputError, "leaves"),
    ("absolute", put("location", "/etc/passwd"), UnsafeInputError, "leaves"),
    ("drive", put("location", "C:secret"), UnsafeInputError, "leaves"),
    ("directory", put("location", "."), UnsafeInputError, "not a regular file"),
    ("missing", put("location", "gone"), InputError, "is missing"),
    ("no location", drop_location, InputError, "has no location"),
    ("beyond the end", put("offset", "99999999"), InputError, "truncated"),
    ("negative", put("offset", "-64"), InputError, "not a number"),
    ("words", put("offset", "abc"), InputError, "not a number"),
    ("short", put("length", "4"), InputError, "need"),
    ("long", put("length", "99999999"), InputError, "need"),
    ("unknown key", put("hook", "x"), InputError, "hook"),
    ("repeated key", repeat_offset, InputError, "key twice"),
    ("address in memory", put("location", "*/_ORT_MEM_ADDR_/*"), UnsafeInputError, "address in memory"),
    ("two initializers", repeat_initializer, InputError, "two initializers"),
    ("no data", drop_data, InputError, "0 numbers"),
    ("too few numbers", too_few_numbers, InputError, "1 numbers"),
]


@pytest.mark.parametrize(("change", "error", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_external_data(
    tmp_path: Path, change: Callable[[Any], None], error: type[GptConvertError], words: str, monkeypatch: Any
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("onnxruntime opened the file")

    for name in ("open_session", "OnnxProcess"):
        monkeypatch.setattr(runner, name, never)
    (tmp_path / "secret").write_bytes(b"x" * 100_000)
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    edit(path, change)
    with pytest.raises(error, match=words) as caught:
        report_on(checkpoint, path)
    assert "h.1.mlp.c_fc.weight" in str(caught.value)
    assert caught.value.exit_code == {UnsafeInputError: 7, InputError: 3}[error]


def test_links_and_pipes(tmp_path: Path) -> None:
    path = export(tmp_path, tiny(tmp_path))
    data, outside = path.with_name("model.onnx_data"), tmp_path / "outside"
    content = data.read_bytes()
    outside.write_bytes(content)
    data.unlink()
    data.symlink_to(outside)
    with pytest.raises(UnsafeInputError, match="links out"):
        open_onnx(str(path))
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        open_onnx(str(path))
    data.unlink()
    os.link(outside, data)  # a hard link is a regular file
    assert open_onnx(str(path)).initializers


def test_hub_cache_layout(tmp_path: Path) -> None:
    """Both files are links into a directory of blobs."""
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        path.with_name(name).rename(blobs / name[::-1])
        path.with_name(name).symlink_to(blobs / name[::-1])
    assert open_onnx(str(path)).initializers


@pytest.mark.parametrize(
    "content", [b"", b"<html>no</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x08\x0a"]
)
def test_not_a_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX model"):
        open_onnx(str(path))


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = export(tmp_path, tiny(tmp_path))
    path.with_name("model.onnx_data").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        open_onnx(str(path))
    assert "h.0.attn.c_attn.bias" in str(caught.value) and "more" in str(caught.value)


def test_tensors_hidden_in_subgraphs_are_checked(tmp_path: Path) -> None:
    inner = numpy_helper.from_array(np.zeros(3, np.float32), "inner")
    inner.ClearField("raw_data")
    inner.data_location = onnx.TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="../../etc/passwd")
    branch = helper.make_graph([helper.make_node("Constant", [], ["y"], value=inner)], "branch", [], [])
    node = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([node], "g", [], [])
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(UnsafeInputError, match="leaves"):
        open_onnx(str(tmp_path / "model.onnx"))


def test_tensors_hidden_in_functions_are_checked(tmp_path: Path) -> None:
    inner = numpy_helper.from_array(np.zeros(3, np.float32), "inner")
    inner.ClearField("raw_data")
    inner.data_location = onnx.TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="../../etc/passwd")
    body = [helper.make_node("Constant", [], ["y"], value=inner)]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("local", "f", [], ["y"], body, opsets)
    graph = helper.make_graph([helper.make_node("f", [], ["z"], domain="local")], "g", [], [])
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph, functions=[function]).SerializeToString())
    with pytest.raises(UnsafeInputError, match="leaves"):
        open_onnx(str(tmp_path / "model.onnx"))


def test_truncated_inline_data(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint, single_file=True)

    def cut(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "h.1.mlp.c_fc.weight")
        tensor.raw_data = tensor.raw_data[:-4]

    assert report_on(checkpoint, path).passed
    edit(path, cut)
    with pytest.raises(InputError, match="does not fill its shape"):
        report_on(checkpoint, path)
