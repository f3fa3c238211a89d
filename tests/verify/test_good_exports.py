"""Correct exports pass: several seeds, shapes, tasks and storage types; also in the style of other exporters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gptconvert.errors import UnsupportedError, UsageError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.transforms import cast
from gptconvert.targets.foreign import find_candidates
from gptconvert.targets.verification import verify
from tests.helpers import checkpoint_of, tiny_gpt2
from tests.verify.exports import edit, export, insert_after, node, report_on, tiny
from tests.verify.test_planted_bugs import erf_gelu, positions_ignore_padding


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_seeds(tmp_path: Path, seed: int, kv_cache: bool) -> None:
    checkpoint = tiny(tmp_path, seed, tie_word_embeddings=bool(seed % 2))
    report = report_on(checkpoint, export(tmp_path, checkpoint, kv_cache=kv_cache))
    assert report.passed, report.table()
    worst = max(m.ratio for run in report.artifacts[0].runs for g in run.groups for m in g.measures.values())
    assert 0.1 < worst < 4


def test_full_level(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    report = report_on(checkpoint, export(tmp_path, checkpoint), level="full")
    assert report.passed, report.table()
    assert {"length 39", "length 40", "past 7, 4 new"} <= {g.name for g in report.artifacts[0].runs[0].groups}
    with pytest.raises(UsageError):
        report_on(checkpoint, tmp_path, level="thorough")


@pytest.mark.parametrize(
    "sizes", [{"n_positions": 1}, {"n_positions": 2}, {"n_positions": 3}, {"vocab_size": 1}, {"n_layer": 1}]
)
def test_smallest_sizes(tmp_path: Path, sizes: dict[str, int]) -> None:
    checkpoint = tiny(tmp_path, **sizes)
    for kv_cache in (True, False):
        path = export(tmp_path / str(kv_cache), checkpoint, kv_cache=kv_cache)
        for level in ("default", "full"):
            report = report_on(checkpoint, path, level=level)
            assert report.passed, report.table()


@pytest.mark.parametrize("kv_cache", [True, False])
def test_bare_model(tmp_path: Path, kv_cache: bool) -> None:
    raw, arrays = tiny_gpt2(4)
    checkpoint = checkpoint_of(raw, arrays, tmp_path, request=Options(task="feature-extraction"))
    path = export(tmp_path, checkpoint, kv_cache=kv_cache)
    report = report_on(checkpoint, path)
    assert report.passed, report.table()
    assert "last_hidden_state" in report.artifacts[0].runs[0].groups[0].measures
    edit(path, erf_gelu)
    assert "begins in block 1" in report_on(checkpoint, path).table()


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16])
def test_half_precision_storage(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    """The truth uses the weights as stored; a wide checkpoint is rounded first."""
    wide = tiny(tmp_path)
    narrow = dataclasses.replace(wide, weights={name: cast(w, dtype) for name, w in wide.weights.items()})
    path = export(tmp_path, narrow)
    for checkpoint in (narrow, wide):
        report = report_on(checkpoint, path)
        assert report.passed, report.table()


def foreign(model: Any) -> None:
    """Rename tensors, symbols and producer as another exporter would."""
    model.producer_name = "another exporter"
    renamed = {t.name: f"transformer.{t.name}" for t in model.graph.initializer}
    renamed |= {f"h.{i}": f"/block.{i}/out" for i in range(2)} | {"embedding": "/embedding"}
    for part in (*model.graph.node, model.graph):
        for names in (getattr(part, "input", ()), getattr(part, "output", ())) if hasattr(part, "op_type") else ():
            for k, name in enumerate(names):
                names[k] = renamed.get(name, name)
    for tensor in model.graph.initializer:
        tensor.name = renamed[tensor.name]
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dim.dim_param.replace("batch_size", "N").replace("sequence", "tokens")


def test_names_of_another_exporter(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    edit(path, foreign)
    report = report_on(checkpoint, path)
    assert report.passed, report.table()
    assert (report.artifacts[0].weights.equal, report.artifacts[0].weights.strict) == (28, False)


def test_bug_of_another_exporter_is_located_by_the_cache(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)

    def spoil(model: Any) -> None:
        next(a for a in node(model, "h.0.mlp.active").attribute if a.name == "approximate").s = b"none"
        foreign(model)

    edit(path, spoil)
    report = report_on(checkpoint, path)
    assert not report.passed
    assert "block 1, in present.1.key, or block 0 after its keys and values" in report.table()


def test_int32_inputs(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)

    def narrow(model: Any) -> None:
        model.producer_name = ""
        for position, value in enumerate(list(model.graph.input)[:3]):
            value.type.tensor_type.elem_type = TensorProto.INT32
            wide = f"{value.name}.wide"
            for n in model.graph.node:
                for k, name in enumerate(n.input):
                    n.input[k] = wide if name == value.name else name
            model.graph.node.insert(position, helper.make_node("Cast", [value.name], [wide], to=TensorProto.INT64))

    edit(path, narrow)
    assert report_on(checkpoint, path).passed


def test_graph_without_position_ids(tmp_path: Path) -> None:
    """The graph can be fed; it counts padding as positions, and the verifier reports that bug."""
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)

    def without(model: Any) -> None:
        model.producer_name = ""
        positions_ignore_padding(model)
        model.graph.input.remove(next(v for v in model.graph.input if v.name == "position_ids"))

    edit(path, without)
    groups = {g.name: g.ok for g in report_on(checkpoint, path).artifacts[0].runs[0].groups}
    assert groups["length 40"] and groups["right padding"] and groups["past 39"] and not groups["left padding"]


def test_graphs_that_cannot_be_fed(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)

    def rename(model: Any) -> None:
        model.producer_name = ""
        extra = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
        model.graph.input.append(extra)
        for n in model.graph.node:
            for k, name in enumerate(n.input):
                n.input[k] = "mask" if name == "attention_mask" else name
        next(v for v in model.graph.input if v.name == "attention_mask").name = "mask"

    edit(path, rename)
    with pytest.raises(UnsupportedError) as caught:
        report_on(checkpoint, path)
    for words in ("unknown input use_cache_branch", "unknown input mask", "no input attention_mask"):
        assert words in str(caught.value)


def test_unknown_input(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)

    def add(model: Any) -> None:
        model.producer_name = ""
        model.graph.input.append(helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["N", "S"]))

    edit(path, add)
    with pytest.raises(UnsupportedError, match="unknown input token_type_ids"):
        report_on(checkpoint, path)


def test_report_as_json(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    first, second = report_on(checkpoint, path), report_on(checkpoint, path)
    json.dumps(first.as_dict(), allow_nan=False)
    assert first.as_dict(figures=False) == second.as_dict(figures=False)
    text = json.dumps(first.as_dict(figures=False))
    assert str(tmp_path) not in text and '"rmse"' not in text and "seconds" not in text


def test_finding_artifacts(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    export(tmp_path, checkpoint)
    found = find_candidates(checkpoint, str(tmp_path))
    assert [(a.target, a.shown_as) for a in found] == [("onnx", "onnx/model.onnx")]
    assert [a.shown_as for a in find_candidates(checkpoint, found[0].path)] == ["model.onnx"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedError, match="no artifact to verify"):
        find_candidates(checkpoint, str(tmp_path / "empty"))
    assert not verify([]).passed


def test_verifying_leaves_no_files(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    edit(path, erf_gelu)
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    assert not report_on(checkpoint, path).passed
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_extra_tensors_in_our_own_file(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)

    def add(model: Any) -> None:
        extra = onnx.numpy_helper.from_array(np.zeros((97, 60), np.float32), "left.over")
        model.graph.initializer.append(extra)
        insert_after(model, "logits_2d", helper.make_node("Shape", ["left.over"], ["unused"]))

    edit(path, add)
    assert "left.over: not a weight of this model" in report_on(checkpoint, path).table()
