"""tf_model.h5: read with h5py alone, and refused if HDF5 would open other files, expand or load code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fixtures import foreign
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError
from gptconvert.model.tensors import Computed, Stored, Transposed
from gptconvert.sources.hf.keras import hf_name, read_keras_h5
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import checkpoint_of
from tests.sources.foreign import ORIGINALS, gap, opened, same_weights

FIXTURE = ORIGINALS / "h5-gpt2" / "tf_model.h5"
MODELS = {"gpt1": "tfopen_aigpt_lm_head_model", "gpt2": "tfgp_t2lm_head_model", "gptj": "tfgptj_for_causal_lm"}
NAME = "m/layer/w/kernel:0"


def test_gpt2_matches_the_golden_logits() -> None:
    checkpoint = opened(ORIGINALS / "h5-gpt2")
    assert checkpoint.source.format == "Hugging Face, TensorFlow (Keras HDF5)"
    assert gap(checkpoint, "h5-gpt2") < 1e-12
    assert all(weight.segments() or weight.base.segments() for weight in checkpoint.weights.values())  # type: ignore[attr-defined]


def test_the_fixture_has_split_attributes_and_biases_of_two_axes() -> None:
    """The cases that the fixture exists to cover."""
    with h5py.File(FIXTURE) as file:
        assert {"weight_names0", "weight_names1"} <= file["transformer"].attrs.keys()
        assert "weight_names" not in file["transformer"].attrs
        bias = file["transformer/tfgp_t2lm_head_model/transformer/h_._0/attn/c_attn/bias:0"]
        assert bias.shape == (1, 72)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    "how", [{}, {"chunks": True, "compression": "gzip", "shuffle": True, "fletcher32": True}], ids=["plain", "gzip"]
)
def test_weights_equal_those_of_pytorch(tmp_path: Path, family: str, how: dict[str, Any]) -> None:
    raw, arrays = witness.saved(Case(family), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    foreign.write_keras(tmp_path / "tf_model.h5", foreign.keras_weights(arrays, MODELS[family]), **how)
    checkpoint = opened(tmp_path)
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    assert isinstance(checkpoint.source.tensors["transformer.h.0.ln_1.weight"], Computed if how else Stored)


@pytest.mark.parametrize("task", ["text-classification", "multiple-choice"])
def test_heads(tmp_path: Path, task: str) -> None:
    raw, arrays = witness.saved(Case("gpt2", task), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    foreign.write_keras(tmp_path / "tf_model.h5", foreign.keras_weights(arrays, "m"))
    checkpoint = opened(tmp_path)
    assert checkpoint.config.task == task
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tfgp_t2lm_head_model/transformer/h_._0/attn/c_attn/weight:0", "transformer.h.0.attn.c_attn.weight"),
        ("tfgpt2_lm_head_model_1/transformer/wte/weight:0", "transformer.wte.weight"),
        ("m/transformer/wte/embeddings:0", "transformer.wte.weight"),
        ("m/transformer/h_._11/ln_2/beta:0", "transformer.h.11.ln_2.bias"),
        ("m/transformer/ln_f/gamma:0", "transformer.ln_f.weight"),
        ("m/multiple_choice_head/summary/kernel:0", "multiple_choice_head.summary.weight"),
        ("m/some___transformer/ln_f/gamma:0", "transformer.ln_f.weight"),
    ],
)
def test_names(given: str, expected: str) -> None:
    assert hf_name(given)[0] == expected


def test_only_kernels_are_transposed() -> None:
    square = Stored((), np.dtype("f4"), (4, 4))
    assert isinstance(hf_name("m/a/kernel:0")[1](square), Transposed)
    assert hf_name("m/a/weight:0")[1](square) is square
    bias = hf_name("m/a/bias:0")[1]
    assert bias(Stored((), np.dtype("f4"), (1, 4))).shape == (4,)
    assert bias(Stored((), np.dtype("f4"), (1,))).shape == (1,)  # a score of one label


def test_sharded(tmp_path: Path) -> None:
    """Shards store datasets at the root without the model's name; only the index has full names."""
    raw, arrays = witness.saved(Case("gpt2"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    weights = foreign.keras_weights(arrays, MODELS["gpt2"])
    weight_map = {}
    for number, some in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        shard = f"tf_model-0000{number + 1}-of-00002.h5"
        with h5py.File(tmp_path / shard, "w") as file:
            places = [name.split("/", 1)[1] for name in some]
            file.attrs["layer_names"] = [place.encode() for place in places]
            for name, place in zip(some, places, strict=True):
                file[place] = weights[name]
        weight_map |= dict.fromkeys(some, shard)
    (tmp_path / "tf_model.h5.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = opened(tmp_path)
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))


def file_with(path: Path, make: Any) -> str:
    """A file with one layer whose weight :data:`NAME` is created or changed by ``make(group)``."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"layer"]
        group = file.create_group("layer")
        group.attrs["weight_names"] = [NAME.encode()]
        make(group)
    return str(path)


def climbs(group: Any) -> None:
    group.attrs["weight_names"] = [b"../../m:0"]


def twice(group: Any) -> None:
    group.create_dataset(NAME, data=np.ones((2, 2), "f4"))
    group.create_dataset("n/layer/w/kernel:0", data=np.ones((2, 2), "f4"))
    group.attrs["weight_names"] = [NAME.encode(), b"n/layer/w/kernel:0"]


def numbers_for_names(group: Any) -> None:
    group.attrs["weight_names"] = [1, 2]


def long_name(group: Any) -> None:
    group.attrs["weight_names"] = np.array([b"x" * 20_000])


def deep(group: Any) -> None:
    group.attrs["weight_names"] = [b"x/" * 200 + b"kernel:0"]


def no_names(group: Any) -> None:
    del group.attrs["weight_names"]


BAD: Sequence[tuple[Any, type[GptConvertError], str]] = [
    (climbs, InputError, "missing from the file"),
    (twice, InputError, "two weights have the same name"),
    (numbers_for_names, InputError, "does not hold names"),
    (long_name, UnsafeInputError, "too large"),
    (deep, UnsafeInputError, "nested too deep"),
    (no_names, InputError, "attribute weight_names is missing"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[make.__name__ for make, _, _ in BAD])
def test_38_39_bad_files(tmp_path: Path, make: Any, error: type[GptConvertError], message: str) -> None:
    with pytest.raises(error, match=message):
        read_keras_h5(file_with(tmp_path / "w.h5", make))


@pytest.mark.parametrize("length", [0, 7, 100, 2000, 50_000, -1])
def test_39_truncated(tmp_path: Path, length: int) -> None:
    (tmp_path / "w.h5").write_bytes(FIXTURE.read_bytes()[:length])
    with pytest.raises(InputError):
        read_keras_h5(str(tmp_path / "w.h5"))


@pytest.mark.parametrize("seed", range(40))
def test_39_any_damage_raises_our_errors_only(tmp_path: Path, seed: int) -> None:
    random, data = np.random.default_rng(seed), bytearray(FIXTURE.read_bytes())
    for at in random.integers(0, 12_000, 20):
        data[at] = random.integers(0, 256)
    (tmp_path / "w.h5").write_bytes(data)
    try:
        for tensor in read_keras_h5(str(tmp_path / "w.h5")).values():
            tensor.read()
    except GptConvertError:
        pass


def test_40_programs_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    path.write_bytes(FIXTURE.read_bytes())
    with h5py.File(path, "a") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Lambda", "config": {"function": "evil"}})
    found = read_keras_h5(str(path))
    assert len(found) == 28
    assert any("model_config" in note for note in found.notes)


def test_whole_models_store_their_weights_in_a_group(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "w.h5", "w") as file, h5py.File(FIXTURE) as original:
        file.create_group("model_weights")
        for name in original:
            original.copy(name, file["model_weights"])
        for name, value in original.attrs.items():
            file["model_weights"].attrs[name] = value
    assert read_keras_h5(str(tmp_path / "w.h5")).keys() == read_keras_h5(str(FIXTURE)).keys()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.h5").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(InputError, match="git lfs pull"):
        read_keras_h5(str(tmp_path / "w.h5"))
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match="saved by Keras"):
        read_keras_h5(str(tmp_path / "v.h5"))


def test_preference_and_choice(tmp_path: Path) -> None:
    """safetensors, then .bin, then .h5, then .msgpack, unless --weights-file chooses."""
    for name in ("h5-gpt2/tf_model.h5", "h5-gpt2/config.json", "flax-gpt2/flax_model.msgpack"):
        (tmp_path / Path(name).name).write_bytes((ORIGINALS / name).read_bytes())
    checkpoint = opened(tmp_path)
    assert gap(checkpoint, "h5-gpt2") < 1e-12
    assert any("other weights were not: flax_model.msgpack" in note for note in checkpoint.notes)
    assert gap(opened(tmp_path, weights_file="flax_model.msgpack"), "flax-gpt2") < 1e-12
