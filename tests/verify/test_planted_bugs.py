"""Each of these bugs, planted into a good export, must be found and located.

The table lists what the report must contain. Bugs are in the last layer where possible, so that blaming the first
block by default fails.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.targets.onnx.verify import OnnxVerifier
from gptconvert.verify.report import Report
from tests.verify.exports import altered, attribute, edit, export, insert_after, node, report_on, tiny


def transposed_use(model: Any) -> None:
    product = node(model, "h.1.attn.out.product")
    product.op_type = "Gemm"
    product.attribute.append(helper.make_attribute("transB", 1))


def query_and_key_swapped(model: Any) -> None:
    outputs = node(model, "h.1.attn.q_2d").output
    outputs[0], outputs[1] = outputs[1], outputs[0]


def erf_gelu(model: Any) -> None:
    attribute(model, "h.1.mlp.active", "approximate").s = b"none"


def small_epsilon(model: Any) -> None:
    attribute(model, "h.1.norm_2", "epsilon").f = 1e-6


def missing_bias(model: Any) -> None:
    shifted = node(model, "h.1.mlp.inner")
    shifted.op_type = "Identity"
    del shifted.input[1]


def query_blind_to_itself(model: Any) -> None:
    node(model, "bias.causal").op_type = "Less"


def query_sees_one_ahead(model: Any) -> None:
    insert_after(model, "bias.query", helper.make_node("Add", ["bias.query", "constant.1"], ["next"]))
    node(model, "bias.causal").input[1] = "next"


def padding_ignored(model: Any) -> None:
    node(model, "bias.seen").input[1] = "bias.causal"


def positions_ignore_padding(model: Any) -> None:
    node(model, "positions").input[1] = "bias.query_1d"


def half_precision_scores(model: Any) -> None:
    half = helper.make_node("Cast", ["h.1.attn.scores"], ["half"], to=TensorProto.FLOAT16)
    single = helper.make_node("Cast", ["half"], ["single"], to=TensorProto.FLOAT)
    insert_after(model, "h.1.attn.scores", half, single)
    node(model, "h.1.attn.masked").input[0] = "single"


def infinite_mask(model: Any) -> None:
    lowest = next(t for t in model.graph.initializer if t.name == node(model, "bias").input[2])
    lowest.CopyFrom(onnx.numpy_helper.from_array(np.array(-np.inf, np.float32), lowest.name))


def layers_swapped(model: Any) -> None:
    for layer in (0, 1):
        node(model, f"h.{layer}.mlp.inner.product").input[1] = f"h.{1 - layer}.mlp.c_fc.weight"


def layers_bytes_swapped(model: Any) -> None:
    first, second = (next(t for t in model.graph.initializer if t.name == f"h.{i}.mlp.c_fc.weight") for i in (0, 1))
    places = [list(t.external_data) for t in (first, second)]
    for tensor, place in zip((first, second), reversed(places), strict=True):
        entries = [(entry.key, entry.value) for entry in place]
        del tensor.external_data[:]
        for key, value in entries:
            tensor.external_data.add(key=key, value=value)


def caches_swapped(model: Any) -> None:
    node(model, "present.0.key").input[0] = "past_key_values.1.key"
    node(model, "present.1.key").input[0] = "past_key_values.0.key"


def past_dropped_from_scores(model: Any) -> None:
    node(model, "h.1.attn.k_flipped").input[0] = "h.1.attn.k"
    node(model, "h.1.attn.mixed").input[1] = "h.1.attn.v"


def scale_missing(model: Any) -> None:
    node(model, "h.1.attn.scores").input[0] = "h.1.attn.q"


def final_norm_missing(model: Any) -> None:
    node(model, "logits_2d").input[0] = "h.1"


def constant_output(model: Any) -> None:
    insert_after(model, "logits_2d", helper.make_node("Sub", ["logits_2d", "logits_2d"], ["nothing"]))
    node(model, "logits").input[0] = "nothing"


def input_ignored(model: Any) -> None:
    insert_after(model, "shape.tokens", helper.make_node("Sub", ["input_ids", "input_ids"], ["zeros"]))
    node(model, "tokens").input[1] = "zeros"


def head_reads_embedding(model: Any) -> None:
    node(model, "logits_2d").input[1] = "wte.weight"


def head_dropped(model: Any) -> None:
    head_reads_embedding(model)
    head = next(t for t in model.graph.initializer if t.name == "lm_head.weight")
    model.graph.initializer.remove(head)


def output_renamed(model: Any) -> None:
    node(model, "logits").output[0] = "scores"
    model.graph.output[0].name = "scores"


def batch_fixed(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


GRAPH_BUGS: list[tuple[Callable[[Any], None], list[str]]] = [
    (transposed_use, ["h.1.attn.c_proj.weight: differs"]),
    (query_and_key_swapped, ["block 1, from present.1.key"]),
    (erf_gelu, ["begins in block 1\n"]),
    (small_epsilon, ["begins in block 1\n"]),
    (missing_bias, ["begins in block 1\n"]),
    (query_blind_to_itself, ["begins in block 0\n"]),
    (query_sees_one_ahead, ["begins in block 0\n", "a token changes the outputs before it"]),
    (padding_ignored, ["begins in block 0\n"]),
    (positions_ignore_padding, ["begins in the embedding"]),
    (half_precision_scores, ["begins in block 1\n"]),
    (infinite_mask, ["NaN"]),
    (layers_swapped, ["begins in block 0\n"]),
    (layers_bytes_swapped, ["h.0.mlp.c_fc.weight: differs", "h.1.mlp.c_fc.weight: differs"]),
    (caches_swapped, ["present.0.key does not begin with the past"]),
    (past_dropped_from_scores, ["past 5: the run failed"]),
    (scale_missing, ["begins in block 1\n"]),
    (final_norm_missing, ["the head"]),
    (constant_output, ["logits is constant"]),
    (input_ignored, ["the embedding"]),
    (output_renamed, ["output logits is missing", "output scores is not in the contract"]),
    (batch_fixed, ["input input_ids is INT64 [1, 'sequence_length']"]),
]


Judge = Callable[[Checkpoint, Path], Report]


@pytest.fixture(params=["small", pytest.param("large", marks=pytest.mark.slow)])
def judge(request: pytest.FixtureRequest) -> Judge:
    """Large models run with the source's weights, before the file's are known to be equal."""
    verifier = OnnxVerifier() if request.param == "small" else OnnxVerifier(small_model=0)
    return lambda checkpoint, path: report_on(checkpoint, path, verifiers={"onnx": verifier})


@pytest.mark.parametrize(("bug", "named"), GRAPH_BUGS, ids=lambda value: getattr(value, "__name__", ""))
def test_bug_in_the_graph(judge: Judge, tmp_path: Path, bug: Callable[[Any], None], named: list[str]) -> None:
    checkpoint = tiny(tmp_path, n_inner=24)
    path = export(tmp_path, checkpoint)
    edit(path, bug)
    report = judge(checkpoint, path)
    assert not report.passed
    for words in named:
        assert words in report.table() + "\n"


@pytest.mark.parametrize("bug", [head_reads_embedding, head_dropped])
def test_untied_head_silently_tied(judge: Judge, tmp_path: Path, bug: Callable[[Any], None]) -> None:
    checkpoint = tiny(tmp_path, tie_word_embeddings=False)
    path = export(tmp_path, checkpoint)
    edit(path, bug)
    report = judge(checkpoint, path)
    assert not report.passed
    assert {"head_dropped": "lm_head.weight: not in the graph"}.get(bug.__name__, "the head") in report.table()


CONFIG_BUGS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("erf for tanh GELU", {}, {"activation": "gelu_erf"}, "begins in block 0\n"),
    ("eps 1e-6", {}, {"norm_eps": 1e-6}, "begins in block 0"),
    ("scale of one layer", {}, {"attn_scale": (8**-0.5, 1.0)}, "begins in block 1\n"),
    ("window off by one", {"attn_window": (None, 5)}, {"attn_window": (None, 6)}, "begins in block 1\n"),
    ("window ignored", {"attn_window": (None, 20)}, {"attn_window": (None, None)}, "begins in block 1\n"),
    ("no final norm", {}, {"final_norm": False}, "the head"),
]


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize(("right", "wrong", "named"), [b[1:] for b in CONFIG_BUGS], ids=[b[0] for b in CONFIG_BUGS])
def test_export_of_another_architecture(
    judge: Judge, tmp_path: Path, right: dict[str, Any], wrong: dict[str, Any], named: str, kv_cache: bool
) -> None:
    checkpoint = altered(tiny(tmp_path), **right)
    export(tmp_path / "good", checkpoint, kv_cache=kv_cache)
    assert judge(checkpoint, tmp_path / "good").passed
    export(tmp_path / "bad", altered(checkpoint, **wrong), kv_cache=kv_cache)
    report = judge(checkpoint, tmp_path / "bad")
    assert not report.passed
    if "final_norm" in wrong:  # its weights are not even in the graph
        named = "ln_f.weight: not in the graph"
    assert named in report.table()


def test_one_flipped_bit(judge: Judge, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    data = export(tmp_path, checkpoint).with_name("model.onnx_data")
    content = bytearray(data.read_bytes())
    model = onnx.load_model(tmp_path / "onnx/model.onnx", load_external_data=False)
    place = next(t for t in model.graph.initializer if t.name == "h.1.mlp.c_fc.weight").external_data
    offset = int(next(entry.value for entry in place if entry.key == "offset"))
    content[offset + 4 * (2 * 56 + 3)] ^= 1  # stored [in, out] = [24, 56]
    data.write_bytes(content)
    report = judge(checkpoint, tmp_path)
    assert not report.passed
    assert "h.1.mlp.c_fc.weight: differs from its source, first at element [2, 3]" in report.table()


def test_truncated_data_file(judge: Judge, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    data = export(tmp_path, checkpoint).with_name("model.onnx_data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated") as caught:
        judge(checkpoint, tmp_path)
    assert caught.value.exit_code == 3


def test_optimiser_bug_is_named(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptconvert.targets.onnx import runner as onnx_runner

    original = onnx_runner.OnnxRunner.run

    def run(self: Any, feeds: Any, presents: bool) -> Any:
        outputs = original(self, feeds, presents)
        if not self.taps:  # the copy that returns every block's output runs without optimisation
            outputs.named["logits"][...] *= 1.001
        return outputs

    monkeypatch.setattr(onnx_runner.OnnxRunner, "run", run)
    checkpoint = tiny(tmp_path)
    report = judge(checkpoint, export(tmp_path, checkpoint))
    assert not report.passed
    assert "onnxruntime's graph optimisation" in report.table()


def _groups(report: Report) -> dict[str, bool]:
    return {group.name: group.ok for group in report.artifacts[0].runs[0].groups}


def test_failing_groups_name_the_kind_of_input(judge: Judge, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    edit(path, positions_ignore_padding)
    groups = _groups(judge(checkpoint, path))
    assert {name for name, ok in groups.items() if not ok} == {
        "left padding",
        "holes",
        "holes, left padding",
        "one token",
        "past 5, left padding",
        "past 5, holes",
    }
