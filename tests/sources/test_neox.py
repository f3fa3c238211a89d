"""GPT-NeoX's layers and ranks, written with torch.save and compared with transformers."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixtures import make_originals as make
from fixtures import originals as writers
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError, UsageError
from gptconvert.families.trainers.neox import BIASES
from gptconvert.model.shards import COLUMNS, FIRST, ROWS, SUM, Parts, Shards, Sum
from gptconvert.model.tensors import Stored, total
from gptconvert.sources import neox
from tests.sources.detection import claims
from tests.sources.originals import BUG, NOISE, ORIGINALS, copied, difference, opened, plant, understood

NAMES = ("neox-pipeline", "neox-sequential")
PIPELINE, SEQUENTIAL = (ORIGINALS / name for name in NAMES)
STEPS = {"neox-pipeline": "global_step150", "neox-sequential": "global_step20"}
YML = {"neox-pipeline": "configs/tiny.yml", "neox-sequential": "global_step20/configs/tiny.yml"}

pytestmark = pytest.mark.usefixtures("no_hang")


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_match_transformers(name: str) -> None:
    checkpoint = understood(ORIGINALS / name)
    assert difference(checkpoint, ORIGINALS / name) < NOISE
    assert checkpoint.config.vocab_size == 99
    assert set(checkpoint.dropped.values()) == {"table of rotary angles"}


def test_configurations_are_understood() -> None:
    pipeline, sequential = understood(PIPELINE).config, understood(SEQUENTIAL).config
    assert (pipeline.residual, pipeline.activation, pipeline.tied_head) == ("parallel", "gelu_tanh", False)
    assert (sequential.residual, sequential.activation, sequential.tied_head) == ("serial", "gelu_erf", True)
    assert pipeline.rotary == sequential.rotary
    assert [understood(path).special_ids.eos for path in (PIPELINE, SEQUENTIAL)] == [(0,), ()]
    assert "tanh GELU" in understood(PIPELINE).notes[-1]


def test_a_box_equals_a_slice_of_the_whole() -> None:
    for name, tensor in [t for path in (PIPELINE, SEQUENTIAL) for t in understood(path).source.tensors.items()]:
        whole = tensor.read()
        box = tuple(slice(n // 3, n) for n in tensor.shape)
        assert np.array_equal(tensor.read(box), whole[box]), name


@pytest.mark.parametrize("name", NAMES)
def test_paths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = ORIGINALS / name / STEPS[name]
    file = next(path for path in sorted(step.iterdir()) if path.suffix == ".pt")
    for path in (ORIGINALS / name, step, file):
        assert claims(neox.FORMAT, path)
        assert opened(path).path == str(step)
    monkeypatch.chdir(step)
    assert len(opened(".").tensors) == len(opened(step).tensors)


def test_which_step(tmp_path: Path) -> None:
    folder = copied(tmp_path, "neox-pipeline")
    shutil.copytree(folder / "global_step150", folder / "global_step9")
    (folder / "global_step900").mkdir()
    assert opened(folder).path.endswith("global_step150")
    (folder / "latest").write_text("global_step9")
    assert opened(folder).path.endswith("global_step9")
    assert opened(folder, step=150).path.endswith("global_step150")
    for latest in ("global_step900", "../elsewhere", ""):
        (folder / "latest").write_text(latest)
        source = opened(folder)
        assert source.path.endswith("global_step150")
        assert "missing" in source.notes[0]
    with pytest.raises(InputError, match="no checkpoint of step 900"):
        opened(folder, step=900)
    with pytest.raises(UsageError):
        opened(folder / "global_step9", step=150)


def test_tokenizer_files_are_found(tmp_path: Path) -> None:
    folder = copied(tmp_path, "neox-pipeline")
    (folder / "20B_tokenizer.json").write_text("{}")
    assert opened(folder).tokenizer == {"tokenizer.json": str(folder / "20B_tokenizer.json")}
    folder = copied(tmp_path, "neox-sequential")
    (folder / "gpt2-vocab.json").write_text("{}")
    (folder / "gpt2-merges.txt").write_text("")
    assert sorted(opened(folder).tokenizer) == ["merges.txt", "vocab.json"]


def reconfigured(tmp_path: Path, name: str, **changes: object) -> Path:
    """A copy of the fixture with keys of its YAML file changed."""
    folder = copied(tmp_path, name)
    path = folder / YML[name]
    text = path.read_text()
    for key, value in changes.items():
        text = re.sub(rf'(?m)^\s*"?{key.replace("_", "[-_]")}"?:.*\n', "", text)
        line = f'  "{key}": {value},\n' if text.rstrip().endswith("}") and "{\n" in text else f"{key}: {value}\n"
        text = text.rstrip().removesuffix("}") + line + "}\n" if line.startswith("  ") else text + line
    path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"pos_emb": "alibi"}, UnsupportedError, "pos_emb 'alibi' is not implemented"),
        ({"pos_emb": "learned"}, UnsupportedError, "pos_emb 'learned'"),
        ({"norm": "rmsnorm"}, UnsupportedError, "norm 'rmsnorm'"),
        ({"norm": "te_layernorm"}, UnsupportedError, "norm 'te_layernorm'"),
        ({"activation": "geglu"}, UnsupportedError, "activation 'geglu'"),
        ({"gpt_j_tied": "true"}, UnsupportedError, "gpt_j_tied"),
        ({"num_kv_heads": 1}, UnsupportedError, "grouped-query"),
        ({"attention_config": '[[["sparse_fixed"], 2]]'}, UnsupportedError, "of kind sparse_fixed"),
        ({"attention_config": "[1]"}, InputError, "wrong attention pattern"),
        ({"moe_num_experts": 8}, UnsupportedError, "moe_num_experts"),
        ({"use_mup": "true"}, UnsupportedError, "use_mup"),
        ({"use_qk_layernorm": "true"}, UnsupportedError, "use_qk_layernorm"),
        ({"te_columnparallel": "true"}, UnsupportedError, "te_columnparallel"),
        ({"something_new": 1}, UnsupportedError, "something_new"),
        ({"num_layers": 3}, InputError, r"missing +layers\.2\."),
        ({"num_layers": 1}, InputError, r"unexpected +layers\.1\."),
        ({"num_attention_heads": 5}, InputError, "does not divide"),
        ({"rotary_pct": 0.4}, InputError, "an even number of features"),
        ({"model_parallel_size": 2}, InputError, "expected 2, found 3 ranks"),
        ({"hidden_size": "wide"}, InputError, "hidden_size: wrong value"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, changes: dict[str, object], kind: type[GptConvertError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        understood(reconfigured(tmp_path, "neox-sequential", **changes))


def test_equivalent_configurations(tmp_path: Path) -> None:
    folder = reconfigured(tmp_path, "neox-sequential", num_kv_heads=3, attention_config='[[["flash"], 2]]')
    assert difference(understood(folder), SEQUENTIAL) < NOISE
    shutil.rmtree(folder / "global_step20" / "configs")
    with pytest.raises(InputError, match="the configuration is missing"):
        opened(folder)
    shutil.copy(SEQUENTIAL / YML["neox-sequential"], folder / "mine.yml")
    assert difference(understood(folder), SEQUENTIAL) < NOISE


def test_mish(tmp_path: Path) -> None:
    assert understood(reconfigured(tmp_path, "neox-sequential", activation='"mish"')).config.activation == "mish"


def test_harmless_keys_are_harmless() -> None:
    """No key is in both lists, and no key that affects the model is called harmless."""
    from gptconvert.families.trainers.neox import HARMLESS, UNUSED

    assert not HARMLESS & set(UNUSED)
    decisive = {"rotary_pct", "gpt_j_residual", "no_weight_tying", "norm", "pos_emb", "activation", "num_layers"}
    assert not HARMLESS & decisive


def layer(folder: Path, number: int, rank: int) -> Path:
    return folder / "global_step150" / f"layer_{number:02}-model_{rank:02}-model_states.pt"


def resave(path: Path, change: Any) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def unsafe(folder: Path) -> None:
    import pickle

    layer(folder, 2, 0).write_bytes(pickle.dumps(os.system, 2))


DAMAGES: list[tuple[Any, type[GptConvertError], str]] = [
    (lambda f: layer(f, 3, 1).unlink(), InputError, "layer_03-model_01-model_states.pt"),
    (lambda f: [layer(f, 2, r).unlink() for r in range(3)], InputError, "layers are missing: 02"),
    (lambda f: [layer(f, 0, r).unlink() for r in range(3)], InputError, "layers are missing: 00"),
    (lambda f: [layer(f, 6, r).unlink() for r in range(3)], InputError, r"missing +final_linear"),
    (lambda f: [p.unlink() for p in f.glob("*/layer_*-model_02-*")], InputError, "expected 3, found 2 ranks"),
    (lambda f: [p.unlink() for p in f.glob("*/layer_*")], InputError, "no named weights"),
    (
        lambda f: resave(layer(f, 2, 1), lambda s: s.pop("mlp.dense_h_to_4h.bias")),
        InputError,
        "tensor is missing on rank",
    ),
    (
        lambda f: resave(layer(f, 2, 1), lambda s: s.update({"mlp.dense_h_to_4h.bias": s["attention.dense.bias"]})),
        InputError,
        "differ in shape",
    ),
    (
        lambda f: resave(layer(f, 2, 1), lambda s: s.update({"mlp.fc1_weight": s["attention.dense.bias"]})),
        UnsupportedError,
        "TransformerEngine",
    ),
    (
        lambda f: resave(layer(f, 2, 1), lambda s: s.update({"attention._extra_state": None})),
        UnsupportedError,
        "TransformerEngine",
    ),
    (
        lambda f: resave(
            layer(f, 0, 1), lambda s: s.update({"position_embeddings.weight": s["word_embeddings.weight"]})
        ),
        UnsupportedError,
        "learned positions",
    ),
    (
        lambda f: resave(layer(f, 2, 1), lambda s: s.update({"input_layernorm.scale": s["input_layernorm.weight"]})),
        UnsupportedError,
        "norm other than layernorm",
    ),
    (
        lambda f: resave(layer(f, 2, 1), lambda s: s.update({"mlp.new.weight": s["input_layernorm.weight"]})),
        UnsupportedError,
        "unknown tensors",
    ),
    (unsafe, UnsafeInputError, "refused global"),
    (lambda f: layer(f, 2, 0).write_bytes(b""), InputError, "empty"),
]


@pytest.mark.parametrize(("damage", "kind", "words"), DAMAGES)
def test_bad_files(tmp_path: Path, damage: Any, kind: type[GptConvertError], words: str) -> None:
    folder = copied(tmp_path, "neox-pipeline")
    damage(folder)
    with pytest.raises(kind, match=words):
        understood(folder)


def test_another_programs_deepspeed_checkpoint(tmp_path: Path) -> None:
    torch.save({"module": {"transformer.wte.weight": torch.ones(2)}}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UnsupportedError, match="another program wrote it"):
        opened(tmp_path)
    (tmp_path / "mp_rank_00_model_states.pt").rename(tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(UnsupportedError, match="ZeRO stage 3"):
        opened(tmp_path)


def test_the_hint_for_zero_stage_3_works(tmp_path: Path) -> None:
    config = make.neox_config(hidden_act="gelu", use_parallel_residual=False, tie_word_embeddings=True)
    state = make.random_state(config, 6)
    (held,) = writers.neox_layers(state, 2, 1, {})
    (tmp_path / "tiny.yml").write_text(
        make.SEQUENTIAL_YML.replace("model_parallel_size: 3", "model_parallel_size: 1")
    )
    step = tmp_path / "global_step5"
    step.mkdir()
    (step / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="ZeRO stage 3") as caught:
        opened(tmp_path)
    assert "torch.save({'module': weights}, 'mp_rank_00_model_states.pt')" in str(caught.value.hint)
    layers = ((f"sequential.{number}.{name}", value) for number, s in held.items() for name, value in s.items())
    torch.save(
        {"module": {name: torch.from_numpy(value) for name, value in layers}}, step / "mp_rank_00_model_states.pt"
    )
    make.write_golden(tmp_path, config, state)
    assert difference(understood(tmp_path), tmp_path) < NOISE


def test_newer_mlp_names(tmp_path: Path) -> None:
    folder = copied(tmp_path, "neox-pipeline")

    def renamed(state: dict[str, Any]) -> None:
        for name in [name for name in state if name.startswith("mlp.")]:
            new = name.replace("dense_h_to_4h", "linear1").replace("dense_4h_to_h", "linear2")
            state[new] = state.pop(name)

    for number in (2, 3):
        for rank in range(3):
            resave(layer(folder, number, rank), renamed)
    assert difference(understood(folder), PIPELINE) < NOISE


def test_a_head_split_over_its_columns(tmp_path: Path) -> None:
    """``output-layer-parallelism: row``, an option of older versions of the trainer."""
    folder = copied(tmp_path, "neox-pipeline")
    whole = torch.cat([torch.load(layer(folder, 6, rank))["final_linear.weight"] for rank in range(3)])
    for rank, part in enumerate(whole.chunk(3, 1)):
        torch.save({"final_linear.weight": part.clone()}, layer(folder, 6, rank))
    assert difference(understood(folder), PIPELINE) < NOISE


def test_a_tied_head_saved_twice_is_compared(tmp_path: Path) -> None:
    from gptconvert.pipeline import check_tied

    folder = reconfigured(tmp_path, "neox-pipeline", no_weight_tying="false")
    for rank in range(3):
        shutil.copy(layer(folder, 0, rank), layer(folder, 6, rank))
    check_tied(understood(folder))
    check_tied(understood(folder, trim_vocab=90))
    resave(layer(folder, 6, 1), lambda state: state["word_embeddings.weight"].add_(1))
    with pytest.raises(InputError, match="the weights differ"):
        check_tied(understood(folder))


def test_norms_that_differ_are_averaged_and_noted(tmp_path: Path) -> None:
    folder = copied(tmp_path, "neox-pipeline")
    resave(layer(folder, 2, 1), lambda state: state["input_layernorm.weight"].add_(3))
    checkpoint, before = understood(folder), understood(PIPELINE)
    name = "h.0.ln_1.weight"
    gain = checkpoint.weights[name].read().astype(np.float32) - before.weights[name].read().astype(np.float32)
    assert np.allclose(gain, 1, atol=2e-3)
    assert any("1 norms differ between ranks" in note and "mean" in note for note in checkpoint.notes)


def test_replicated_biases_that_differ_are_taken_from_rank_0(tmp_path: Path) -> None:
    folder = copied(tmp_path, "neox-sequential")
    path = folder / "global_step20" / "mp_rank_01_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["module"]["sequential.2.attention.dense.bias"] += 1
    torch.save(state, path)
    checkpoint = understood(folder)
    assert difference(checkpoint, SEQUENTIAL) < NOISE
    assert any("used the copies of rank 0" in note for note in checkpoint.notes)


@pytest.mark.parametrize("name", NAMES)
def test_trimmed_vocabularies(name: str) -> None:
    whole, trimmed = understood(ORIGINALS / name), understood(ORIGINALS / name, trim_vocab=90)
    assert trimmed.config.vocab_size == 90
    assert "cut from 99 ids to 90" in trimmed.notes[-1]
    for weight in trimmed.weights:
        expected = whole.weights[weight].read()
        expected = expected[:90] if weight in ("wte.weight", "lm_head.weight") else expected
        assert np.array_equal(trimmed.weights[weight].read(), expected)
    assert understood(ORIGINALS / name, trim_vocab=99).notes == whole.notes
    with pytest.raises(UsageError, match="1 to 99"):
        understood(ORIGINALS / name, trim_vocab=100)


def test_special_tokens_are_not_trimmed() -> None:
    with pytest.raises(UsageError, match="removes the special token 96"):
        understood(ORIGINALS / "mesh-tf", trim_vocab=96)


def plant_rule(monkeypatch: pytest.MonkeyPatch, right: Shards, wrong: Shards) -> None:
    """Replace one rule with another in every row that uses it."""
    plant(
        monkeypatch,
        "neox",
        lambda table: replace(
            table, rows=tuple(replace(row, shards=wrong) if row.shards == right else row for row in table.rows)
        ),
    )


class SummedTwice(Sum):
    def merge(self, parts: Any, shape: Any) -> Any:
        return total([*parts, *parts])


@pytest.mark.parametrize("bug", ["bias of one rank", "bias summed twice", "rows for columns", "ranks exchanged"])
def test_planted_bugs_in_the_parallel_model_are_caught(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    if bug == "ranks exchanged":
        order = neox._Held.parts
        monkeypatch.setattr(
            neox._Held,
            "parts",
            lambda held, ranks: {n: replace(p, parts=p.parts[::-1]) for n, p in order(held, ranks).items()},
        )
    else:
        rule = {"bias of one rank": (SUM, FIRST), "bias summed twice": (SUM, SummedTwice())}
        plant_rule(monkeypatch, *rule.get(bug, (COLUMNS, ROWS)))
    if bug == "rows for columns":
        with pytest.raises(InputError, match=r"layers\.0\.attention\.dense\.weight: some ranks are missing"):
            understood(PIPELINE)
        return
    assert difference(understood(PIPELINE), PIPELINE) > BUG


def test_planted_bug_of_summed_biases_in_the_serial_model(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_rule(monkeypatch, BIASES, SUM)
    assert difference(understood(SEQUENTIAL), SEQUENTIAL) > BUG


@pytest.mark.parametrize("name", NAMES)
def test_the_source_provides_unmerged_parts(name: str) -> None:
    """Names as in the files, one part per rank, nothing merged."""
    tensors = opened(ORIGINALS / name).tensors
    assert all(re.fullmatch(r"sequential\.\d+\.[a-z_0-9.]+", each) for each in tensors)
    for parts in tensors.values():
        assert isinstance(parts, Parts)
        assert len(parts.parts) == len(parts.held) == 3
        assert parts.axis is None


def test_tensors_split_by_rows_can_be_copied_raw() -> None:
    tensors = understood(PIPELINE).source.tensors
    merged = tensors["layers.0.attention.query_key_value.weight"]
    assert isinstance(merged, Stored)
    assert len(merged.parts) == 3
    assert tensors["layers.0.attention.dense.weight"].segments() is None
