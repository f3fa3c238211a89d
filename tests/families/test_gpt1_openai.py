"""GPT-1's released arrays: names in file order, and agreement with the outputs of OpenAI's code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gptconvert.families.registry import family_named, understand
from gptconvert.model.generation import SpecialIds
from gptconvert.model.options import Options
from gptconvert.model.schemes import expand, write_names
from gptconvert.targets.onnx.plan import plan
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import NO_RELEASED_FILES, ROOT, Arrays, checkpoint_of, computed_tensors, source_of, write_planned

REAL = ROOT.parent / "shared" / "data" / "openai-gpt1"
#: Names within a layer, in the order of params_shapes.json.
LAYER = (
    *("attn/c_attn/w", "attn/c_attn/b", "attn/c_proj/w", "attn/c_proj/b", "ln_1/g", "ln_1/b"),
    *("mlp/c_fc/w", "mlp/c_fc/b", "mlp/c_proj/w", "mlp/c_proj/b", "ln_2/g", "ln_2/b"),
)


def names(layers: int) -> list[str]:
    return ["positions_embed", "tokens_embed", *(f"h{i}/{name}" for i in range(layers) for name in LAYER)]


def released(directory: Path) -> Arrays:
    """The ten files, concatenated and cut by shape."""
    shapes = json.loads((directory / "params_shapes.json").read_text())
    flat = np.concatenate([np.load(directory / f"params_{i}.npy") for i in range(10)])
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    pieces = [piece.reshape(shape) for piece, shape in zip(np.split(flat, cuts), shapes, strict=True)]
    return dict(zip(names((len(shapes) - 2) // 12), pieces, strict=True))


def openai_layout(arrays: Arrays) -> Arrays:
    """Convert transformers' names and shapes to the released arrays'."""
    renamed = {}
    for name, array in arrays.items():
        *path, kind = name.removeprefix("transformer.").split(".")
        letter = {"weight": "g" if path[-1].startswith("ln_") else "w", "bias": "b"}[kind]
        if path[0] == "h":
            renamed["/".join([f"h{path[1]}", *path[2:], letter])] = array[None] if array.ndim == 2 else array
        else:
            renamed[path[0]] = array
    return {name: renamed[name] for name in names(len(renamed) // 12)}


def test_released_arrays_read_as_the_same_model_as_transformers_files(tmp_path: Path) -> None:
    raw, arrays = witness.saved(Case("gpt1"), tmp_path)
    expected = checkpoint_of(raw, arrays)
    found = checkpoint_of({}, openai_layout(arrays), scheme="openai-gpt1", request=Options(n_head=3))
    assert found.config == dataclasses.replace(expected.config, pad_token_id=None)
    assert found.special_ids == SpecialIds()
    assert all(np.array_equal(found.weights[n].read(), w.read()) for n, w in expected.weights.items())
    written = write_names(family_named("gpt1").scheme("openai-gpt1"), found.config, expected.weights)
    assert {n: a.read().tobytes() for n, a in written.items()} == {
        n: a.tobytes() for n, a in openai_layout(arrays).items()
    }


def test_rows_are_in_file_order(tmp_path: Path) -> None:
    """Assigning names in table order must name the arrays correctly."""
    raw, arrays = witness.saved(Case("gpt1"), tmp_path)
    config = checkpoint_of(raw, arrays).config
    rows = family_named("gpt1").scheme("openai-gpt1").rows
    tables = [row for row in rows if "{i}" not in row.canonical]
    layer = [row for row in rows if "{i}" in row.canonical]
    in_order = [row.names[0] for row in tables]
    in_order += [row.names[0].replace("{i}", str(i)) for i in range(config.n_layer) for row in layer]
    assert in_order == names(config.n_layer)
    assert sorted(in_order) == sorted(b.stored[0] for b in expand(rows, config))


@pytest.mark.skipif(not REAL.exists(), reason=NO_RELEASED_FILES)
def test_outputs_match_openais_code(tmp_path: Path) -> None:
    """The float64 reference and the ONNX graph differ from OpenAI's float32 outputs only by rounding."""
    import onnxruntime

    source = source_of({}, computed_tensors(released(REAL)), scheme="openai-gpt1")
    oracle = np.load(REAL / "oracle.npz")
    inputs = {"input_ids": oracle["ids"].astype(np.int64), "attention_mask": np.ones_like(oracle["ids"], np.int64)}
    inputs["position_ids"] = inputs["attention_mask"].cumsum(1) - 1
    for task, output in (("text-generation", "logits"), ("feature-extraction", "last_hidden_state")):
        checkpoint = understand(source, Options(n_head=4, task=task))
        expected = oracle["logits_last"] if output == "logits" else oracle["hidden"]
        found = witness.our_outputs(witness.reference(checkpoint), inputs)[output]
        assert np.abs(found[:, -expected.shape[1] :] - expected).max() < 2e-6 * np.abs(expected).max()
        files = plan(checkpoint, Options(kv_cache=False))[0].files
        write_planned(tmp_path / task, files)
        session = onnxruntime.InferenceSession(tmp_path / task / files[0].path, providers=["CPUExecutionProvider"])
        (found,) = session.run([output], {value.name: inputs[value.name] for value in session.get_inputs()})
        assert np.abs(found[:, -expected.shape[1] :] - expected).max() < 4e-6 * np.abs(expected).max()


@pytest.mark.skipif(not REAL.exists(), reason=NO_RELEASED_FILES)
def test_a_wrong_number_of_heads_changes_the_outputs() -> None:
    source = source_of({}, computed_tensors(released(REAL)), scheme="openai-gpt1")
    oracle = np.load(REAL / "oracle.npz")
    inputs = {"input_ids": oracle["ids"].astype(np.int64)}
    checkpoint = understand(source, Options(n_head=2))
    found = witness.our_outputs(witness.reference(checkpoint), inputs)["logits"][:, -4:]
    assert np.abs(found - oracle["logits_last"]).max() > 1e-4 * np.abs(oracle["logits_last"]).max()
