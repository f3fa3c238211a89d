"""Quantised graphs: every family and head is proven; planted bugs fail; files say how they were made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from gptconvert.errors import UsageError
from gptconvert.model.blocks import Quantised
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.encodings import QUANTISED
from gptconvert.model.options import QUANTISED as NAMES
from gptconvert.model.options import Options
from gptconvert.targets.onnx.file import open_onnx
from gptconvert.targets.onnx.plan import plan
from gptconvert.targets.verification import verify_exports
from gptconvert.verify.report import Report
from tests.families import witness
from tests.families.witness import BY_TASK, Case
from tests.helpers import write_planned
from tests.verify.exports import edit, node, report_on, tiny

TYPES = (np.float32, np.float16, BFLOAT16)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def exported(directory: Path, checkpoint: Any, *quantize: str, **options: Any) -> tuple[Report, Path]:
    """The report on the quantised graphs of a checkpoint, and the path of the first."""
    exports = plan(checkpoint, Options(**{"quantize": quantize, "no_base": True, "block_size": 16, **options}))
    for export in exports:
        write_planned(directory, export.files)
    return verify_exports(exports, str(directory)), directory / exports[0].path


def test_the_table_is_the_options() -> None:
    assert tuple(QUANTISED) == NAMES


@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_every_family_and_head(case: Case, directory: Path, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(case, directory)
    report, path = exported(tmp_path, checkpoint, "q8", "q4")
    assert report.passed, report.table()
    assert report_on(checkpoint, path.parent).passed


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)
def test_sources_of_16_bits(dtype: Any, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "source", dtype=dtype)
    report, path = exported(tmp_path, checkpoint, "q8", "q4:plain", kv_cache=False, opset=17, dtype="fp16")
    assert report.passed, report.table()
    assert report_on(checkpoint, path.parent).passed


def test_widths_that_are_no_multiple_of_the_block(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "source", n_embd=27, n_inner=41)
    report, path = exported(tmp_path, checkpoint, "q4", "q8", single_file=False)
    assert report.passed, report.table()
    assert report_on(checkpoint, path.parent).passed


def test_the_outer_blocks_keep_8_bits(tmp_path: Path) -> None:
    weights = plan(tiny(tmp_path, n_layer=5), Options(quantize=("q4",), no_base=True))[0].checkpoint.weights
    bits = {name: weight.format.bits for name, weight in weights.items() if isinstance(weight, Quantised)}
    assert {name for name, n in bits.items() if n == 8} == {
        "wte.weight",
        *(f"h.{i}.{name}.weight" for i in (0, 4) for name in ("attn.c_attn", "mlp.c_proj")),
    }
    assert not isinstance(weights["wpe.weight"], Quantised)
    assert all(
        ".ln_" in name or name.endswith("bias") or name in ("wpe.weight", "ln_f.weight")
        for name in weights.keys() - bits
    )


@pytest.mark.parametrize(
    "options",
    [
        {"no_base": True},
        {"quantize": ("q4", "q4:plain")},
        {"quantize": ("q8",), "allow_nonfinite": True},
    ],
    ids=str,
)
def test_contradictions(options: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        plan(tiny(tmp_path), Options(**options))


@pytest.mark.parametrize("options", [{"quantize": ("q3",)}, {"block_size": 48}, {"block_size": 8}], ids=str)
def test_unknown_values(options: Any) -> None:
    with pytest.raises(UsageError, match="one of"):
        Options(**options)


def initializer(model: Any, name: str) -> Any:
    return next(t for t in model.graph.initializer if t.name == name)


def changed(name: str, function: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Replace an initializer by a function of its array."""

    def change(model: Any) -> None:
        tensor = initializer(model, name)
        array = numpy_helper.to_array(tensor).copy()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(function(array), array.dtype), name))

    return change


def swapped_scales(scales: Any) -> Any:
    scales[0, [0, 1]] = scales[0, [1, 0]]
    return scales


def one_code_off(codes: Any) -> Any:
    codes[3, 1, 2] ^= 1
    return codes


def bias_dropped(model: Any) -> None:
    del node(model, "h.1.mlp.inner").input[3:]


def scales_of_another_layer(model: Any) -> None:
    node(model, "h.1.mlp.inner").input[2] = "h.0.mlp.c_fc.weight.scales"


def head_with_scales_of_a_layer(model: Any) -> None:
    """A layer's are of the same shape, because its inner width is the number of tokens."""
    node(model, "logits_2d").input[2] = "h.0.mlp.c_fc.weight.scales"


def zero_point_of_7(model: Any) -> None:
    """An explicit zero point, where the codes were made for the default of 8."""
    product = node(model, "h.1.mlp.inner")
    codes = numpy_helper.to_array(initializer(model, product.input[1]))
    rows, blocks = codes.shape[:2]
    model.graph.initializer.append(numpy_helper.from_array(np.full((rows, -(-blocks // 2)), 0x77, np.uint8), "zeros"))
    product.input[3] = "zeros"


def block_size_off(model: Any) -> None:
    """Blocks of 32 elements, with every second scale: loads, and decodes half of the blocks wrongly."""
    product = node(model, "h.0.mlp.out")
    next(a for a in product.attribute if a.name == "block_size").i = 32
    changed(product.input[1], lambda codes: codes.reshape(len(codes), -1, 16))(model)
    changed(product.input[2], lambda scales: scales[:, ::2])(model)


def embedding_is_not_the_head(model: Any) -> None:
    """The embedding reads codes of its own, shifted by one row."""
    codes = numpy_helper.to_array(initializer(model, "wte.weight.codes"))
    model.graph.initializer.append(numpy_helper.from_array(np.roll(codes, 1, axis=0), "other.codes"))
    node(model, "tokens.codes").input[0] = "other.codes"


BUGS: dict[str, Callable[[Any], None]] = {
    "scales of two blocks swapped": changed("h.0.attn.c_attn.weight.scales", swapped_scales),
    "nibbles swapped": changed("h.1.mlp.c_fc.weight.codes", lambda codes: codes << 4 | codes >> 4),
    "one code off by one": changed("h.1.mlp.c_fc.weight.codes", one_code_off),
    "block size": block_size_off,
    "zero point 7": zero_point_of_7,
    "bias dropped": bias_dropped,
    "scales of another layer": scales_of_another_layer,
    "head with the scales of a layer": head_with_scales_of_a_layer,
    "embedding is not the head": embedding_is_not_the_head,
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_planted_bugs_fail(bug: Callable[[Any], None], tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "source", n_embd=48, n_inner=96, vocab_size=96, bos_token_id=95, eos_token_id=95)
    exports = plan(checkpoint, Options(quantize=("q4:plain",), no_base=True, block_size=16))
    write_planned(tmp_path, exports[0].files)
    path = tmp_path / exports[0].path
    edit(path, bug)
    assert not verify_exports(exports, str(tmp_path)).passed
    assert not report_on(checkpoint, path).passed


def test_the_graph_records_its_recipe(tmp_path: Path) -> None:
    _, path = exported(tmp_path, tiny(tmp_path / "source"), "q4")
    file = open_onnx(str(path))
    metadata = {entry.key: entry.value for entry in file.model.metadata_props}
    assert metadata == {"gptconvert.quantize": "q4", "gptconvert.block_size": "16"}
    assert {o.domain: o.version for o in file.model.opset_import} == {"": 21, "com.microsoft": 1}
    levels = {a.i for n in file.model.graph.node for a in n.attribute if a.name == "accuracy_level"}
    assert levels == {4}


def test_embedding_and_head_share_their_bytes(tmp_path: Path) -> None:
    _, path = exported(tmp_path, tiny(tmp_path / "source"), "q8")
    graph = onnx.load(path).graph
    assert [t.name for t in graph.initializer if t.name.startswith("wte")] == [
        "wte.weight.codes",
        "wte.weight.scales",
    ]
    assert node(onnx.load(path), "logits_2d").input[1] == node(onnx.load(path), "tokens.codes").input[0]


@pytest.mark.parametrize("bad", [97, 2**40])
def test_ids_outside_the_vocabulary_fail(bad: int, tmp_path: Path) -> None:
    import onnxruntime

    _, path = exported(tmp_path, tiny(tmp_path / "source"), "q8", kv_cache=False)
    ids = np.array([[1, bad]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(2)[None]}
    with pytest.raises(Exception, match="indices element out of data bounds"):
        onnxruntime.InferenceSession(path).run(None, feeds)


@pytest.mark.parametrize("quantize", ["q8", "q4", "q4:plain"])
def test_rows_of_a_batch_do_not_affect_each_other(quantize: str, tmp_path: Path) -> None:
    """As shipped, and exactly. Dynamic quantisation scales all activations by the largest in the batch."""
    import onnxruntime

    _, path = exported(tmp_path, tiny(tmp_path / "source", n_embd=48), quantize, kv_cache=False)
    session, random = onnxruntime.InferenceSession(path), np.random.default_rng(0)
    ids = random.integers(0, 97, (4, 11))
    mask = np.ones_like(ids)
    mask[1, :4] = 0

    def rows(ids: Any) -> Any:
        positions = (mask.cumsum(1) - 1).clip(0)
        (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        return logits[:2]

    expected, others = rows(ids), ids.copy()
    others[2:] = random.integers(0, 97, (2, 11))
    assert (others[2:] != ids[2:]).any()
    assert np.array_equal(rows(others), expected)


@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_float16_computes_in_float16(case: Case, directory: Path, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(case, directory)
    report, path = exported(tmp_path, checkpoint, "fp16", block_size=32)
    assert report.passed, report.table()
    graph = onnx.load(path, load_external_data=False).graph
    assert {value.type.tensor_type.elem_type for value in graph.output} == {onnx.TensorProto.FLOAT16}
    assert report_on(checkpoint, path).passed
