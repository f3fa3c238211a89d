"""Names that training and fine-tuning tools give the tensors of a family: found by rule, and announced."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptconvert.errors import InputError, UsageError
from gptconvert.families.registry import FAMILIES, family_named, understand
from gptconvert.inspection import open_checkpoint
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.pipeline import convert
from tests.commands import command
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import checkpoint_of, computed_tensors, openai_hparams, openai_layout, source_of, tiny_gpt2
from tests.sources.foreign import same_weights

NAMES = [family.name for family in FAMILIES]
TIED = {"tie_word_embeddings": True}


def saved(case: Case, directory: Path) -> tuple[dict[str, object], dict[str, Any]]:
    raw, arrays = witness.saved(case, directory)
    return dict(raw), {name: np.array(array) for name, array in arrays.items()}


@pytest.mark.parametrize("family", NAMES)
def test_a_tied_embedding_stored_as_the_head(family: str, tmp_path: Path) -> None:
    """safetensors' save_model keeps the first name, in alphabetical order, of tensors that share memory."""
    from safetensors.torch import save_model

    case = Case(family, keys={} if family in ("gpt1", "gpt2", "gpt_neo") else TIED, name="tied")
    model = witness.hf_model(case)
    raw, arrays = saved(case, tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    save_model(model, source / "model.safetensors")
    embedding = next(name for name in arrays if re.search(r"(wte|tokens_embed|embed_in)\.weight$", name))
    checkpoint = open_checkpoint(source)
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    assert (embedding in checkpoint.source.tensors) == (family == "gpt_neox")  # gpt_neox sorts before lm_head
    converted = convert(checkpoint, tmp_path / "out", Options(targets=("safetensors",), verify=None))
    assert converted.checkpoint.weights["wte.weight"].read().tobytes() == arrays[embedding].tobytes()


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_neox_embedding_under_the_names_of_its_head(head: str, tmp_path: Path) -> None:
    raw, arrays = saved(Case("gpt_neox", keys=TIED, name="tied"), tmp_path)
    renamed = {name.replace("gpt_neox.embed_in.weight", head): array for name, array in arrays.items()}
    assert same_weights(checkpoint_of(raw, renamed), checkpoint_of(raw, arrays))


@pytest.mark.parametrize("family", NAMES)
def test_without_an_untied_embedding_the_head_does_not_stand_in(family: str, tmp_path: Path) -> None:
    raw, arrays = saved(Case(family, keys={"tie_word_embeddings": False}, name="own"), tmp_path)
    embedding = next(name for name in arrays if re.search(r"(wte|tokens_embed|embed_in)\.weight$", name))
    lost = {name: array for name, array in arrays.items() if name != embedding}
    with pytest.raises(InputError, match=re.escape(f"missing     {embedding}")):
        checkpoint_of(raw, lost)


def test_dialogpt_files(tmp_path: Path) -> None:
    raw, arrays = saved(Case("gpt2"), tmp_path)
    state = {name: torch.tensor(array).half() for name, array in arrays.items()}
    state["lm_head.decoder.weight"] = state["transformer.wte.weight"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.save(state, tmp_path / "small_ft.pkl")
    for source, options in ((tmp_path, Options(weights_file="small_ft.pkl")), (tmp_path / "small_ft.pkl", Options())):
        checkpoint = open_checkpoint(source, options)
        assert checkpoint.weights["wte.weight"].read().dtype == np.float16
        assert checkpoint.config.tied_head
    untied, arrays = saved(Case("gpt2", keys={"tie_word_embeddings": False}, name="own"), tmp_path)
    renamed = {name.replace("lm_head", "lm_head.decoder"): array for name, array in arrays.items()}
    assert same_weights(checkpoint_of(untied, renamed), checkpoint_of(untied, arrays))


@pytest.mark.parametrize("suffix", [".pkl", ".ckpt", ".pth", ".pt", ".bin"])
def test_suffixes_of_pytorch_files(suffix: str, tmp_path: Path, capsys: Any) -> None:
    raw, arrays = saved(Case("gpt2"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, tmp_path / f"weights{suffix}")
    for form in ("hf", "convert"):
        done = command(capsys, form, tmp_path / f"weights{suffix}", "--dry-run", "--to", "safetensors")
        assert done.code == 0, done.err
    assert open_checkpoint(tmp_path, Options(weights_file=f"weights{suffix}")).source.format.endswith("PyTorch")


@pytest.mark.parametrize("key", ["state", "state_dict", "model_state_dict", "model", "module"])
def test_state_dicts_under_a_key(key: str, tmp_path: Path) -> None:
    raw, arrays = saved(Case("gpt2"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    torch.save({"step": 3, key: state, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}, tmp_path / "policy.pt")
    checkpoint = open_checkpoint(tmp_path / "policy.pt")
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    assert any(f"stored under '{key}'" in note for note in checkpoint.notes)


PREFIXES = ("gpt.", "model.", "_orig_mod.", "base_model.model.", "module.", "_orig_mod.module.", "pretrained_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", NAMES)
def test_a_common_prefix_is_removed_and_announced(family: str, prefix: str, tmp_path: Path) -> None:
    raw, arrays = saved(Case(family), tmp_path)
    for body in (True, False):
        given = (
            arrays if body else {n.removeprefix(family_named(family).scheme("hf").body): a for n, a in arrays.items()}
        )
        checkpoint = checkpoint_of(raw, {prefix + name: array for name, array in given.items()})
        assert same_weights(checkpoint, checkpoint_of(raw, arrays))
        assert f"removed the prefix '{prefix}' from the tensor names" in checkpoint.notes
    assert not any("prefix" in note for note in checkpoint_of(raw, arrays).notes)


WRAPPED = {
    "FSDP": ("_fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
    "checkpointed layers": ("", "_checkpoint_wrapped_module."),
    "compiled layers": ("", "_orig_mod."),
    "DDP around compiled layers": ("module.", "_orig_mod."),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("family", NAMES)
def test_wrappers_inside_names_are_removed_and_announced(family: str, kind: str, tmp_path: Path) -> None:
    raw, arrays = saved(Case(family), tmp_path)
    outer, inner = WRAPPED[kind]
    given = {outer + re.sub(r"(\.\d+\.)", rf"\1{inner}", name): array for name, array in arrays.items()}
    checkpoint = checkpoint_of(raw, given)
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))
    note = next(note for note in checkpoint.notes if "wrappers" in note)
    assert inner.split(".")[-2] in note


def test_a_compiled_body(tmp_path: Path) -> None:
    raw, arrays = saved(Case("gpt2"), tmp_path)
    given = {name.replace("transformer.", "transformer._orig_mod."): array for name, array in arrays.items()}
    given["lm_head.weight"] = arrays["transformer.wte.weight"]
    assert same_weights(checkpoint_of(raw, given), checkpoint_of(raw, arrays))


def test_a_head_unlike_the_embedding_to_which_it_is_tied(tmp_path: Path) -> None:
    """transformers 4 and 5 disagree, so the user chooses; both ways work."""
    raw, arrays = saved(Case("gpt2"), tmp_path)
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"] + 1
    with pytest.raises(InputError, match="the weights differ") as caught:
        convert(checkpoint_of(raw, arrays), tmp_path / "out", Options(targets=("safetensors",), verify=None))
    hint = caught.value.hint or ""
    assert "--set tie_word_embeddings=false" in hint
    assert "--ignore-tensor lm_head.weight" in hint
    for options, tied in (
        (Options(set_key=("tie_word_embeddings=false",)), False),
        (Options(ignore_tensor=("lm_head.weight",)), True),
    ):
        assert checkpoint_of(raw, arrays, request=options).config.tied_head == tied


def test_names_that_differ_in_wrappers_only(tmp_path: Path) -> None:
    raw, arrays = saved(Case("gpt2"), tmp_path)
    twice = {**arrays, "transformer.h.0._orig_mod.ln_1.weight": arrays["transformer.h.0.ln_1.weight"]}
    with pytest.raises(InputError, match=r"two tensors are named transformer\.h\.0\.ln_1\.weight"):
        checkpoint_of(raw, twice)


def test_tensors_outside_the_prefix_are_not_dropped(tmp_path: Path) -> None:
    raw, arrays = saved(Case("gpt2"), tmp_path)
    given = {"decoder." + name: array for name, array in arrays.items()} | {"encoder.conv.weight": np.ones((3, 3))}
    with pytest.raises(InputError, match=r"unexpected +encoder\.conv\.weight"):
        checkpoint_of(raw, given)


@pytest.mark.parametrize(
    "head",
    [
        {"v_head.summary.weight": (1, 24), "v_head.summary.bias": (1,)},
        {"v_head.0.weight": (48, 24), "v_head.2.bias": (1,)},
    ],
)
def test_value_heads_are_left_out_with_a_note(head: Mapping[str, Any], tmp_path: Path) -> None:
    raw, arrays = saved(Case("gpt2"), tmp_path)
    extra = {name: np.ones(shape, "f4") for name, shape in head.items()}
    checkpoint = checkpoint_of(raw, {**arrays, **extra})
    assert set(checkpoint.dropped) == set(head)
    assert any("value head" in note and next(iter(head)) in note for note in checkpoint.notes)


def several(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The models of one file as OpenAI's lm-human-preferences saves it."""
    variables = openai_layout(arrays)
    found = {f"policy/{name}": array for name, array in variables.items()}
    found |= {f"ref_policy/{name}": array + 1 for name, array in variables.items()}
    found |= {f"reward_model/{name}": array + 2 for name, array in variables.items()}
    value = {"policy/model/heads/value/w": np.ones((24, 1), "f4"), "policy/model/heads/value/b": np.ones(1, "f4")}
    return {**found, **value, "reward_model/reward_norm/gain": np.ones((), "f4"), "global_step": np.ones((), "i8")}


def test_several_models_in_one_tensorflow_checkpoint() -> None:
    raw, arrays = tiny_gpt2(n_inner=None)
    found = several(arrays)

    def opened(scope: str | None = None) -> Checkpoint:
        return checkpoint_of(openai_hparams(raw), found, scheme="openai-tf", request=Options(scope=scope))

    with pytest.raises(UsageError, match="several models") as caught:
        opened()
    assert caught.value.found == "policy, ref_policy, reward_model"
    assert "--scope NAME" in (caught.value.hint or "")
    for scope, more in {"policy": 0, "ref_policy": 1, "reward_model": 2}.items():
        checkpoint = opened(scope)
        table = next(name for name in arrays if name.endswith("wte.weight"))
        assert np.array_equal(checkpoint.weights["wte.weight"].read(), arrays[table] + more)
        assert any("other models in the file are left out" in note for note in checkpoint.notes)
        assert any("value head" in note for note in checkpoint.notes) == (scope == "policy")
        assert set(checkpoint.dropped) | set(checkpoint.source.tensors) == set(found)
    with pytest.raises(UsageError, match="no model under --scope 'critic'"):
        opened("critic")


def test_several_models_in_one_pytorch_file(tmp_path: Path) -> None:
    raw, arrays = saved(Case("gpt2"), tmp_path)
    both = {f"actor.{n}": a for n, a in arrays.items()} | {f"critic.{n}": a + 1 for n, a in arrays.items()}
    with pytest.raises(UsageError) as caught:
        checkpoint_of(raw, both)
    assert caught.value.found == "actor, critic"
    checkpoint = checkpoint_of(raw, both, request=Options(scope="actor"))
    assert same_weights(checkpoint, checkpoint_of(raw, arrays))


def test_one_model_needs_no_scope(tmp_path: Path) -> None:
    raw, arrays = saved(Case("gpt2"), tmp_path)
    one = {f"policy.{name}": array for name, array in arrays.items()}
    assert same_weights(checkpoint_of(raw, one, request=Options(scope="policy")), checkpoint_of(raw, one))
    with pytest.raises(UsageError, match="no model under --scope 'critic'"):
        checkpoint_of(raw, one, request=Options(scope="critic"))


def damaged(change: Callable[[dict[str, Any]], None], arrays: Mapping[str, Any]) -> dict[str, Any]:
    copy = dict(arrays)
    change(copy)
    return copy


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_the_hint_of_an_error_is_not_replaced(family: str, tmp_path: Path) -> None:
    """GPT-2's and GPT-Neo's names are so alike that more than half of one family's fit the other."""
    raw, arrays = saved(Case(family), tmp_path)
    lost = damaged(lambda a: a.pop("transformer.h.0.mlp.c_fc.bias"), arrays)
    with pytest.raises(InputError) as caught:
        checkpoint_of(raw, lost)
    assert "look like" not in (caught.value.hint or "")
    with pytest.raises(InputError) as caught:
        checkpoint_of({**raw, "vocab_size": -3}, arrays)
    assert "look like" not in (caught.value.hint or "")


@pytest.mark.parametrize(("family", "other"), [("gpt2", "gpt_neo"), ("gpt_neo", "gpt2"), ("gptj", "gpt_neox")])
def test_another_family_is_named_if_it_fits_better(family: str, other: str, tmp_path: Path) -> None:
    raw, _ = saved(Case(family), tmp_path)
    _, arrays = saved(Case(other), tmp_path)
    with pytest.raises(InputError) as caught:
        understand(source_of(raw, computed_tensors(arrays)), Options())
    assert f"look like {other}" in (caught.value.hint or "")


def test_the_directory_of_mingpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Running the code of the hint, then its command, converts minGPT's weights, which are not tied."""
    raw, arrays = tiny_gpt2(n_inner=None, tie_word_embeddings=False)
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {n: torch.tensor(a.T.copy() if n.endswith(linear) else a) for n, a in arrays.items()}
    state["transformer.h.0.attn.bias"] = torch.tril(torch.ones(1, 1, 40, 40))
    torch.save(state, tmp_path / "model.pt")
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 40, "vocab_size": 97}
    settings = {"system": {"seed": 3}, "model": {"model_type": None, **sizes}, "trainer": {"device": "auto"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"config\.json of minGPT") as caught:
        open_checkpoint(tmp_path / "model.pt")
    hint = caught.value.hint or ""
    code = re.search(r"torch\.save\(.+'ckpt\.pt'\)", hint)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(code[0], {"torch": torch})
    assert command(capsys, *hint.split("`")[1].split()[1:], "--to", "safetensors", "--dry-run").code == 0
    found = open_checkpoint("ckpt.pt", Options(activation="tanh"), format="nanogpt")
    assert same_weights(found, checkpoint_of(raw, arrays))
    assert found.config.activation == "gelu_tanh"
