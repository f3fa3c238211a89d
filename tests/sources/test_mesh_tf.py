"""GPT-Neo's own checkpoints, written with TensorFlow and compared with transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import GptConvertError, InputError, UnsupportedError, UsageError
from gptconvert.families.registry import family_named, understand
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.generation import SpecialIds
from gptconvert.model.options import Options
from gptconvert.model.schemes import Row, write_names
from gptconvert.sources import mesh_tf, openai_tf
from tests.containers import bundle_bytes as made
from tests.helpers import REAL_GPT2
from tests.sources.detection import claims
from tests.sources.originals import BUG, NOISE, ORIGINALS, copied, difference, opened, plant, understood

FOLDER = ORIGINALS / "mesh-tf"
NAMES = ("mesh-tf", "mesh-tf-bf16")

pytestmark = pytest.mark.usefixtures("no_hang")


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_match_transformers(name: str) -> None:
    checkpoint = understood(ORIGINALS / name)
    assert difference(checkpoint, ORIGINALS / name) < NOISE
    assert {w.dtype for w in checkpoint.weights.values()} == {BFLOAT16 if "bf16" in name else np.dtype("<f4")}


def test_only_slots_and_counters_are_dropped() -> None:
    checkpoint = understood(FOLDER)
    assert len(checkpoint.dropped) == 7
    assert all("adam_" in name or name == "global_step" for name in checkpoint.dropped)
    assert checkpoint.config.attn_window == (None, 5, 5)
    assert checkpoint.special_ids == SpecialIds(96, (96,))
    assert not checkpoint.notes


def test_names_written_back_equal_the_trainers() -> None:
    checkpoint = understood(FOLDER)
    written = write_names(family_named("gpt_neo").scheme("mesh-tf"), checkpoint.config, checkpoint.weights)
    kept = [name for name in checkpoint.source.tensors if name not in checkpoint.dropped]
    assert sorted(written) == sorted(kept)
    assert all(np.array_equal(written[n].read(), checkpoint.source.tensors[n].read()) for n in kept)


@pytest.mark.parametrize("inside", ["", "model.ckpt", "model.ckpt.index", "checkpoint"])
def test_paths(inside: str) -> None:
    path = str(FOLDER / inside) if inside else str(FOLDER)
    assert claims(mesh_tf.FORMAT, path)
    assert opened(path).scheme == "mesh-tf"


def test_other_tensorflow_checkpoints_are_not_claimed() -> None:
    assert not claims(mesh_tf.FORMAT, ORIGINALS.parent / "tiny-gpt2" / "openai-tf")
    assert not claims(mesh_tf.FORMAT, ORIGINALS / "gpt1")
    if REAL_GPT2.exists():
        assert opened(REAL_GPT2).scheme == "openai-tf"
    with pytest.raises(UsageError, match="GPT-Neo"):
        openai_tf.FORMAT.open(str(FOLDER), Options())


def with_config(tmp_path: Path, **changes: Any) -> Path:
    """A copy of the fixture with keys of its config.json changed, or removed by ``...``."""
    folder = copied(tmp_path, "mesh-tf")
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"moe_layers": [1]}, UnsupportedError, "moe_layers"),
        ({"rotary_emb": True}, UnsupportedError, "rotary_emb"),
        ({"mlp_glu": True}, UnsupportedError, "mlp_glu"),
        ({"axial_pos_emb": [8, 5]}, UnsupportedError, "axial_pos_emb"),
        ({"rezero": True}, UnsupportedError, "rezero"),
        ({"scalenorm": True}, UnsupportedError, "scalenorm"),
        ({"num_mem_kv": 4}, UnsupportedError, "num_mem_kv"),
        ({"no_weight_tie": True}, UnsupportedError, "no_weight_tie"),
        ({"mlm_training": True}, UnsupportedError, "mlm_training"),
        ({"activation_fn": "selu"}, UnsupportedError, "'selu' is not implemented"),
        ({"attention_types": [[["global", "linear", "none"], 1]]}, UnsupportedError, "of kind linear, none"),
        ({"attention_types": [[["global"], 2]]}, InputError, "wrong attention pattern"),
        ({"attention_types": ...}, InputError, "attention_types: required key is missing"),
        ({"n_head": ...}, InputError, "n_head: required key is missing"),
        ({"n_positions": 41}, InputError, "keys with the same meaning disagree"),
        ({"n_layer": 2, "attention_types": [[["global"], 2]]}, InputError, "unexpected"),
        ({"n_layer": 4, "attention_types": [[["global"], 4]]}, InputError, "missing"),
        ({"something_new": 1}, UnsupportedError, "something_new"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[GptConvertError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        understood(with_config(tmp_path, **changes))


@pytest.mark.parametrize(("name", "formula"), [("id", "linear"), ("lrelu001", "leaky_relu"), ("mish", "mish")])
def test_activations(tmp_path: Path, name: str, formula: str) -> None:
    assert understood(with_config(tmp_path, activation_fn=name)).config.activation == formula


def test_equivalent_configurations(tmp_path: Path) -> None:
    folder = with_config(tmp_path, n_ctx=..., n_positions=40, activation_fn="gelu", moe_layers=[], rotary_emb=None)
    assert difference(understood(folder), FOLDER) < NOISE
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        opened(folder)
    assert difference(understood(folder, Options(hparams=str(FOLDER / "config.json"))), FOLDER) < NOISE
    transformers = {
        "model_type": "gpt_neo",
        "vocab_size": 97,
        "max_position_embeddings": 40,
        "hidden_size": 24,
        "num_layers": 3,
        "num_heads": 3,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 5,
    }
    (folder / "config.json").write_text(json.dumps(transformers))
    source = mesh_tf.FORMAT.open(str(folder), Options())
    assert difference(understand(source, Options()), FOLDER) < NOISE


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2/h1/moe/gate", "mixture of experts"),
        ("gpt2/axial_wpe_1", "axial positions"),
        ("gpt2/h0/norm_rezero_1/g", "ReZero"),
        ("gpt2/h0/attn/memory_key_values/mem_k", "memory keys"),
        ("gpt2/wte_final_linear/conv1d_main/linear_out/kernel", "untied head"),
    ],
)
def test_variants_are_recognised_by_their_variables(tmp_path: Path, name: str, words: str) -> None:
    variables = {"gpt2/wte": np.ones((3, 2), np.float32), "gpt2/h0/norm_1/g": np.ones(2, np.float32)}
    made.write_bundle(tmp_path / "model.ckpt", {**variables, name: np.ones(2, np.float32)})
    with pytest.raises(UnsupportedError, match=words):
        opened(tmp_path)


def test_padded_vocabularies_are_kept_unless_trimmed(tmp_path: Path) -> None:
    folder = with_config(tmp_path, n_vocab=90, eos_id=89)
    checkpoint = understood(folder)
    assert checkpoint.config.vocab_size == 97
    assert "97 rows for a vocabulary of 90" in checkpoint.notes[0]
    trimmed = understood(folder, trim_vocab=90)
    assert trimmed.weights["wte.weight"].shape == (90, 24)


def test_several_steps(tmp_path: Path) -> None:
    folder = copied(tmp_path, "mesh-tf")
    for path in [p for p in folder.iterdir() if ".ckpt." in p.name]:
        shutil.copy(path, folder / path.name.replace("model.ckpt", "model.ckpt-7"))
    assert opened(folder, step=7).path == str(folder / "model.ckpt-7")


def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped tensors of equal shape, and a window off by one, change the logits."""

    def planted(change: Any) -> float:
        with monkeypatch.context() as patch:
            plant(patch, "mesh-tf", lambda scheme: replace(scheme, rows=tuple(change(row) for row in scheme.rows)))
            return difference(understood(FOLDER), FOLDER)

    assert planted(lambda row: row) < NOISE

    def exchanged(row: Row) -> Row:
        names = row.stored if isinstance(row.stored, str) else (row.stored[0], *row.stored[:0:-1])
        return Row(**{**vars(row), "stored": names})

    def untransposed(row: Row) -> Row:
        return Row(**{**vars(row), "steps": ()}) if row.canonical.endswith("attn.c_proj.weight") else row

    for bug in (exchanged, untransposed):
        assert planted(bug) > BUG, bug
    assert difference(understood_with_window(4), FOLDER) > BUG


def understood_with_window(window: int) -> Any:
    import dataclasses

    checkpoint = understood(FOLDER)
    windows = tuple(None if w is None else window for w in checkpoint.config.attn_window)
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, attn_window=windows))
