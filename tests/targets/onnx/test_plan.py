"""The ONNX target: every family, head and option, run by onnxruntime and compared with transformers.

The yardstick is the reference model in float32: a graph may have a few times its rounding error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import UnsupportedError, UsageError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import OPSETS, Options
from gptconvert.model.transforms import cast
from gptconvert.targets.onnx.plan import IR_VERSIONS, plan
from gptconvert.targets.onnx.target import TARGET
from gptconvert.targets.onnx.variants import has_cache
from reference_model.config import CACHED_TASKS, INPUTS, OUTPUTS
from tests.families import witness
from tests.families.bugs import BUGS, Bug
from tests.families.witness import BY_TASK, CASES, PAD, Case, gap, hf_outputs, inputs_of, our_outputs
from tests.helpers import content, openai_checkpoint, write_planned

FAMILIES = tuple(witness.TINY)
#: Allowed error of a graph: this many times the float32 reference model's, plus this many units in the last place.
TIMES, ULPS = 8, 8 * 2.0**-23


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def understood(case: Case, directory: Path) -> Checkpoint:
    return witness.checkpoint(case, directory, Options(task=case.task))


def session(checkpoint: Checkpoint, directory: Path, **options: Any) -> Any:
    """An onnxruntime session with default optimisations on the planned files."""
    import onnxruntime

    files = plan(checkpoint, Options(**options))[0].files
    write_planned(directory, files)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(directory / files[0].path, settings, providers=["CPUExecutionProvider"])


def run(opened: Any, inputs: Mapping[str, Any], past: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All outputs by name. Only the graph's own inputs are fed; without ``past``, an empty one."""
    feeds = {}
    for value in opened.get_inputs():
        if value.name in inputs:
            feeds[value.name] = np.ascontiguousarray(inputs[value.name])
        elif value.name == "position_ids":  # transformers' default
            feeds[value.name] = np.broadcast_to(np.arange(inputs["input_ids"].shape[1]), inputs["input_ids"].shape)
        elif past is not None:
            feeds[value.name] = past[value.name]
        else:
            _, heads, _, width = value.shape
            feeds[value.name] = np.zeros((len(inputs["input_ids"]), heads, 0, width), np.float32)
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(None, feeds), strict=True))


def as_past(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The keys and values of a run, named as inputs of the next."""
    return {n.replace("present", "past_key_values"): v for n, v in outputs.items() if n.startswith("present.")}


def shared(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """The expected outputs that the graph returns (without a cache, no keys and values)."""
    assert {name for name in expected if not name.startswith("present.")} <= set(actual)
    return {name: value for name, value in expected.items() if name in actual}


def noise(checkpoint: Checkpoint, inputs: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The float32 reference model's rounding error."""
    import torch

    actual = our_outputs(witness.reference(checkpoint, torch.float32), inputs)
    return gap(actual, expected, inputs["attention_mask"])


@pytest.mark.parametrize(
    ("case", "kv_cache"),
    # Other tasks never have a cache.
    [(case, cached) for case in CASES for cached in ((True, False) if case.task in CACHED_TASKS else (False,))],
    ids=str,
)
def test_equals_transformers(case: Case, kv_cache: bool, directory: Path, tmp_path: Path) -> None:
    """All outputs, keys and values, with padding on either side and holes in the mask."""
    inputs, checkpoint = inputs_of(case.task), understood(case, directory)
    actual = run(session(checkpoint, tmp_path, kv_cache=kv_cache), inputs)
    assert any(name.startswith("present.") for name in actual) == kv_cache
    expected = shared(actual, hf_outputs(case, inputs))
    allowed = TIMES * noise(checkpoint, inputs, expected) + ULPS
    assert gap(actual, expected, inputs["attention_mask"]) < allowed < 1e-4


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_detected(bug: Bug, directory: Path, tmp_path: Path) -> None:
    inputs, right = inputs_of(bug.case.task), understood(bug.case, directory)
    actual = run(session(bug.plant(right), tmp_path), inputs)
    expected = shared(actual, hf_outputs(bug.case, inputs))
    allowed = TIMES * noise(right, inputs, expected) + ULPS
    assert gap(actual, expected, inputs["attention_mask"]) > 4 * allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_bug_in_the_graph_is_detected(
    family: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a wrong node instead of a wrong configuration: each query sees one key too many."""
    from gptconvert.targets.onnx import graph

    class Later(graph.Builder):
        def op(self, kind: str, *inputs: Any, name: str, **attributes: Any) -> Any:
            if name.endswith(".causal"):
                inputs = (inputs[0], super().op("Add", inputs[1], self.constant(1), name=f"{name}.later"))
            return super().op(kind, *inputs, name=name, **attributes)

    inputs, checkpoint = inputs_of("text-generation"), understood(Case(family), directory)
    monkeypatch.setattr(graph, "Builder", Later)
    actual = run(session(checkpoint, tmp_path), inputs)
    expected = shared(actual, hf_outputs(Case(family), inputs))
    assert gap(actual, expected, inputs["attention_mask"]) > 1e-3


@pytest.mark.parametrize("cuts", [(1,), (5, 9), (1, 2, 3, 16)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_add_up(family: str, cuts: tuple[int, ...], directory: Path, tmp_path: Path) -> None:
    """A batch fed in chunks, each with the keys and values of the ones before, gives the logits of the whole."""
    inputs, checkpoint = inputs_of("text-generation"), understood(Case(family), directory)
    opened = session(checkpoint, tmp_path)
    logits, past = [], None
    for start, stop in zip((0, *cuts), (*cuts, 17), strict=True):
        chunk = {name: value[:, start:stop] for name, value in inputs.items()}
        outputs = run(opened, {**chunk, "attention_mask": inputs["attention_mask"][:, :stop]}, past)
        past = as_past(outputs)
        logits.append(outputs["logits"])
    expected = {"logits": hf_outputs(Case(family), inputs)["logits"]}
    allowed = TIMES * noise(checkpoint, inputs, expected) + ULPS
    assert gap({"logits": np.concatenate(logits, 1)}, expected, inputs["attention_mask"]) < allowed


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (1, 40)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_batch_and_length(family: str, shape: tuple[int, int], directory: Path, tmp_path: Path) -> None:
    """One token, one sequence, the whole context (longer than GPT-Neo's window)."""
    inputs, checkpoint = witness.batch(mask=np.ones(shape, np.int64)), understood(Case(family), directory)
    actual = run(session(checkpoint, tmp_path), inputs)
    expected = shared(actual, hf_outputs(Case(family), inputs))
    assert gap(actual, expected, inputs["attention_mask"]) < TIMES * noise(checkpoint, inputs, expected) + ULPS


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_half_precision_weights_are_computed_in_float32(
    case: Case, dtype: Any, directory: Path, tmp_path: Path
) -> None:
    whole = understood(case, directory)
    halved = dataclasses.replace(whole, weights={n: cast(w, dtype) for n, w in whole.weights.items()})
    inputs = inputs_of(case.task)
    actual = run(session(halved, tmp_path), inputs)
    expected = shared(actual, our_outputs(witness.reference(halved), inputs))
    assert gap(actual, expected, inputs["attention_mask"]) < TIMES * noise(halved, inputs, expected) + ULPS


@pytest.mark.parametrize("family", FAMILIES)
def test_casts_of_weights_come_first(family: str, directory: Path, tmp_path: Path) -> None:
    """So onnxruntime runs each just before its use; beside their uses, all would be in memory at once."""
    whole = understood(Case(family), directory)
    halved = dataclasses.replace(whole, weights={n: cast(w, BFLOAT16) for n, w in whole.weights.items()})
    write_planned(tmp_path, plan(halved, Options())[0].files)
    graph = onnx_model(tmp_path / "onnx/model.onnx").graph
    weights = {tensor.name for tensor in graph.initializer if tensor.name in halved.weights}
    casts = [node.op_type == "Cast" and node.input[0] in weights for node in graph.node]
    assert sum(casts) >= len(weights) - 2  # the embeddings are looked up first
    assert casts == sorted(casts, reverse=True)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(opset: int, directory: Path, tmp_path: Path) -> None:
    for case in (
        Case("gpt2"),
        Case("gpt_neox"),
        Case("gpt1", "multiple-choice"),
        Case("gptj", "text-classification"),
    ):
        inputs, checkpoint = inputs_of(case.task), understood(case, directory)
        where = tmp_path / str(case)
        actual = run(session(checkpoint, where, opset=opset), inputs)
        expected = shared(actual, hf_outputs(case, inputs))
        assert gap(actual, expected, inputs["attention_mask"]) < TIMES * noise(checkpoint, inputs, expected) + ULPS
        model = onnx_model(where / "onnx/model.onnx")
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
        assert model.ir_version == IR_VERSIONS[opset]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in BY_TASK or case.task in CACHED_TASKS], ids=str
)
def test_graph_computes_nothing_in_float64(case: Case, directory: Path, tmp_path: Path) -> None:
    """onnxruntime's default builds for browsers have no float64 kernels, and refuse the whole graph."""
    import onnx

    write_planned(tmp_path, plan(understood(case, directory), Options())[0].files)
    model = onnx.shape_inference.infer_shapes(onnx_model(tmp_path / "onnx/model.onnx"), strict_mode=True)
    values = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    values |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert len(values) > len(model.graph.node), "every value has a type"
    assert [name for name, kind in values.items() if kind == onnx.TensorProto.DOUBLE] == []


def onnx_model(path: Path) -> Any:
    import onnx

    return onnx.load(str(path), load_external_data=False)


def signature(values: Any) -> dict[str, tuple[str, list[object]]]:
    """Name → (element type, dimensions) of graph inputs or outputs, in order."""
    import onnx

    def described(value: Any) -> tuple[str, list[object]]:
        tensor = value.type.tensor_type
        dims = [d.dim_param or d.dim_value for d in tensor.shape.dim]
        return onnx.TensorProto.DataType.Name(tensor.elem_type), dims

    return {value.name: described(value) for value in values}


B, S, P = "batch_size", "sequence_length", "past_sequence_length"


@pytest.mark.parametrize("family", FAMILIES)
def test_language_model_contract(family: str, directory: Path, tmp_path: Path) -> None:
    """Names, order, types and symbols that onnxruntime-genai, optimum and transformers.js rely on."""
    checkpoint = understood(Case(family), directory)
    write_planned(tmp_path, plan(checkpoint, Options())[0].files)
    graph = onnx_model(tmp_path / "onnx/model.onnx").graph
    config = checkpoint.config
    layers, heads, width = range(config.n_layer), config.n_head, config.head_dim
    cache = {f"{i}.{part}": ("FLOAT", [B, heads, P, width]) for i in layers for part in ("key", "value")}
    inputs = {
        "input_ids": ("INT64", [B, S]),
        "attention_mask": ("INT64", [B, f"{P} + {S}"]),
        "position_ids": ("INT64", [B, S]),
        **{f"past_key_values.{name}": kind for name, kind in cache.items()},
    }
    present = ("FLOAT", [B, heads, f"{P} + {S}", width])
    outputs = {"logits": ("FLOAT", [B, S, 97]), **{f"present.{name}": present for name in cache}}
    assert list(signature(graph.input).items()) == list(inputs.items())
    assert list(signature(graph.output).items()) == list(outputs.items())
    assert {node.domain for node in graph.node} == {""}


@pytest.mark.parametrize(
    ("case", "inputs", "outputs"),
    [
        (Case("gpt_neo", "text-classification"), {}, {"logits": [B, 5]}),
        (Case("gpt_neox", "token-classification"), {}, {"logits": [B, S, 5]}),
        (Case("gptj", "question-answering"), {}, {"start_logits": [B, S], "end_logits": [B, S]}),
        (
            Case("gpt1", "multiple-choice"),
            {"mc_token_ids": [B, "num_choices"]},
            {"logits": [B, "num_choices", S, 97], "mc_logits": [B, "num_choices"]},
        ),
        (Case("gpt2", "feature-extraction"), {}, {"last_hidden_state": [B, S, 24]}),
    ],
    ids=str,
)
def test_head_contract(
    case: Case, inputs: dict[str, Any], outputs: dict[str, Any], directory: Path, tmp_path: Path
) -> None:
    """Names as in Hugging Face's exporter."""
    write_planned(tmp_path, plan(understood(case, directory), Options())[0].files)
    graph = onnx_model(tmp_path / "onnx/model.onnx").graph
    rows = [B, "num_choices", S] if case.task == "multiple-choice" else [B, S]
    expected = {"input_ids": rows, "attention_mask": rows, **inputs}
    assert {name: dims for name, (_, dims) in signature(graph.input).items()} == expected
    assert tuple(signature(graph.input)) == INPUTS[case.task]
    assert {name: dims for name, (_, dims) in signature(graph.output).items()} == outputs
    assert tuple(signature(graph.output)) == OUTPUTS[case.task]


@pytest.mark.parametrize("case", [c for c in BY_TASK if c.task != "text-generation"], ids=str)
def test_position_ids_on_request(case: Case, directory: Path, tmp_path: Path) -> None:
    """Positions that the caller chooses, such as those that count real tokens."""
    inputs, checkpoint = inputs_of(case.task), understood(case, directory)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clip(0)
    opened = session(checkpoint, tmp_path, position_ids=True)
    assert [value.name for value in opened.get_inputs()][:3] == ["input_ids", "attention_mask", "position_ids"]
    actual = run(opened, inputs)
    expected = shared(actual, hf_outputs(case, inputs))
    allowed = TIMES * noise(checkpoint, inputs, expected) + ULPS
    assert gap(actual, expected, inputs["attention_mask"]) < allowed < 1e-4


@pytest.mark.parametrize(
    ("task", "kv_cache", "has"),
    [
        ("text-generation", None, True),
        ("text-generation", False, False),
        ("feature-extraction", None, False),
        ("feature-extraction", True, True),
        ("text-classification", None, False),
        ("text-classification", False, False),
    ],
)
def test_cache_by_task(task: str, kv_cache: bool | None, has: bool, directory: Path) -> None:
    assert has_cache(understood(Case("gpt2", task), directory).config, Options(kv_cache=kv_cache)) == has


def test_cache_of_a_head_is_refused(directory: Path) -> None:
    with pytest.raises(UsageError, match="--kv-cache has no effect for question-answering"):
        plan(understood(Case("gpt2", "question-answering"), directory), Options(kv_cache=True))


@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_onnx_checker_passes(case: Case, directory: Path, tmp_path: Path) -> None:
    import onnx

    write_planned(tmp_path, plan(understood(case, directory), Options())[0].files)
    onnx.checker.check_model(str(tmp_path / "onnx/model.onnx"), full_check=True)


@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_every_weight_is_stored_once_in_the_sources_layout(case: Case, directory: Path) -> None:
    checkpoint = understood(case, directory)
    model, data = plan(checkpoint, Options())[0].files
    assert [placed.name for placed in data.tensors] == sorted(checkpoint.weights)
    assert all(placed.offset % 64 == 0 for placed in data.tensors)
    assert all(placed.tensor.segments() is not None for placed in data.tensors), "bytes could be copied"
    stored = sum(weight.nbytes for weight in checkpoint.weights.values())
    assert stored <= data.nbytes < stored + 64 * len(data.tensors)
    assert model.nbytes < 100_000


def test_openais_bytes_are_copied(tmp_path: Path) -> None:
    checkpoint = openai_checkpoint(tmp_path)
    _, data = plan(checkpoint, Options())[0].files
    assert all(placed.tensor.segments() is not None for placed in data.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_can_be_tapped(family: str, directory: Path, tmp_path: Path) -> None:
    """The verifier returns every block's output by name to find the first bad block."""
    import onnx
    import torch

    checkpoint, inputs = understood(Case(family), directory), inputs_of("text-generation")
    write_planned(tmp_path, plan(checkpoint, Options(single_file=True))[0].files)
    path = tmp_path / "onnx/model.onnx"
    model = onnx.load(str(path))
    blocks = [f"h.{i}" for i in range(checkpoint.config.n_layer)]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in blocks)
    import onnxruntime

    opened = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    actual = run(opened, inputs)
    reference, taps = witness.reference(checkpoint), []
    for block in reference.h:
        block.register_forward_hook(lambda _, __, output: taps.append(output[0].numpy()))
    with torch.no_grad():
        our_outputs(reference, inputs)
    found = {name: actual[name].reshape(4, 17, -1) for name in blocks}
    assert gap(found, dict(zip(blocks, taps, strict=True)), inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_gives_the_same_outputs(family: str, directory: Path, tmp_path: Path) -> None:
    checkpoint, inputs = understood(Case(family), directory), inputs_of("text-generation")
    (file,) = plan(checkpoint, Options(single_file=True))[0].files
    assert file.path == "onnx/model.onnx"
    alone = run(session(checkpoint, tmp_path / "alone", single_file=True), inputs)
    beside = run(session(checkpoint, tmp_path / "beside"), inputs)
    assert all(np.array_equal(alone[name], beside[name]) for name in beside)


def test_single_file_size_limit(directory: Path) -> None:
    checkpoint = understood(Case("gpt2"), directory)
    from gptconvert.model.tensors import filled

    huge = filled(0.0, np.dtype(np.float32), (30_000, 24_000))
    large = dataclasses.replace(checkpoint, weights={**checkpoint.weights, "wte.weight": huge})
    with pytest.raises(UnsupportedError, match="2 GiB"):
        plan(large, Options(single_file=True))


def test_bytes_depend_only_on_the_checkpoint(directory: Path) -> None:
    checkpoint = understood(Case("gpt_neox"), directory)
    first, second = ([content(file) for file in plan(checkpoint, Options())[0].files] for _ in range(2))
    assert first == second
    assert str(directory).encode() not in first[0]


@pytest.mark.parametrize(("dtype", "path"), [(None, "model"), ("fp32", "model"), ("fp16", "model_fp16")])
def test_file_names(dtype: str | None, path: str, directory: Path) -> None:
    files = plan(understood(Case("gpt2"), directory), Options(dtype=dtype))[0].files
    assert [file.path for file in files] == [f"onnx/{path}.onnx", f"onnx/{path}.onnx_data"]
    assert TARGET.name == "onnx"


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_outside_the_vocabulary(family: str, directory: Path, tmp_path: Path) -> None:
    """Too large fails; negative counts from the end, as ONNX defines."""
    opened = session(understood(Case(family), directory), tmp_path)
    inputs = witness.batch(mask=np.ones((1, 3), np.int64))
    inputs["input_ids"][0, 1] = 97
    with pytest.raises(Exception, match=r"(?i)out of.*bound"):
        run(opened, inputs)
    inputs["input_ids"][0, 1] = -1
    last = run(opened, inputs)
    inputs["input_ids"][0, 1] = 96
    assert np.array_equal(run(opened, inputs)["logits"], last["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_past_the_context(family: str, directory: Path, tmp_path: Path) -> None:
    """Learned positions fail; rotary ones continue, and only their distances matter."""
    checkpoint = understood(Case(family), directory)
    opened = session(checkpoint, tmp_path)
    near = {**witness.batch(mask=np.ones((1, 6), np.int64)), "position_ids": np.arange(6)[None]}
    if checkpoint.config.rotary is None:
        with pytest.raises(Exception, match=r"(?i)out of.*bound"):
            run(opened, {**near, "position_ids": near["position_ids"] + 35})
        return
    far = {**near, "position_ids": near["position_ids"] + 100_000}
    logits = [run(opened, inputs)["logits"] for inputs in (near, far)]
    assert np.allclose(*logits, rtol=0, atol=2e-5 * np.abs(logits[0]).max())


def test_without_a_padding_token_the_last_token_is_classified(directory: Path, tmp_path: Path) -> None:
    case = Case("gpt2", "text-classification")
    right = understood(case, directory)
    blind = dataclasses.replace(right, config=dataclasses.replace(right.config, pad_token_id=None))
    inputs = inputs_of(case.task)
    found = run(session(blind, tmp_path), inputs)["logits"]
    expected = our_outputs(witness.reference(blind), inputs)["logits"]
    assert np.allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - hf_outputs(case, inputs)["logits"])[2].max() > 1e-3, "row 2 ends in padding"


def test_sequence_of_padding_is_classified_at_its_first_token(directory: Path, tmp_path: Path) -> None:
    case = Case("gpt_neo", "text-classification")
    inputs = {**inputs_of(case.task), "input_ids": np.full((4, 17), PAD)}
    found = run(session(understood(case, directory), tmp_path), inputs)["logits"]
    assert np.allclose(found[0], hf_outputs(case, inputs)["logits"][0], rtol=0, atol=1e-5)
