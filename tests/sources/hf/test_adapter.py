"""LoRA adapters: merged weights against peft, and the errors and notes for adapters that cannot be merged."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptconvert.errors import GptConvertError, InputError, UnsupportedError, UsageError
from gptconvert.inspection import open_checkpoint
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from tests.commands import command, tree
from tests.families.witness import Case, gap, hf_model, hf_outputs, in_float64, inputs_of, our_outputs, reference

ALL = ["c_attn", "c_proj", "c_fc"]
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@dataclass(frozen=True)
class Lora:
    """A base model, and the settings of an adapter trained on it.

    Attributes:
        name: of the test case.
        case: the model that peft wraps.
        settings: of ``LoraConfig``.
        saved: the base as saved, if it differs: an adapter may add a head.
        merges: whether peft's merged model equals its unmerged one, which is not so for half of a tied pair.
    """

    name: str
    case: Case
    settings: Mapping[str, Any] = field(hash=False)
    saved: Case | None = None
    merges: bool = True


def gpt2(name: str, merges: bool = True, targets: list[str] = ALL, **settings: Any) -> Lora:
    return Lora(name, Case("gpt2"), {"target_modules": targets, **settings}, merges=merges)


LORAS = (
    gpt2("plain"),
    gpt2("patterns", rank_pattern={"h.1.attn.c_attn": 2, r"mlp\.c_.*": 4}, alpha_pattern={"^transformer.h.0.*": 3}),
    gpt2("rslora", use_rslora=True),
    gpt2("dora", use_dora=True),
    gpt2("dora-embedding", targets=["wpe", "c_attn"], use_dora=True),
    gpt2("biases", bias="all"),
    gpt2("own-biases", bias="lora_only"),
    gpt2("lora-bias", lora_bias=True),
    gpt2("norms", modules_to_save=["ln_f", "ln_1"]),
    gpt2("embedding", targets=["wte", "c_attn"], merges=False),
    gpt2("head", targets=["lm_head", "c_attn"], merges=False),
    gpt2("embedding-and-head", targets=["lm_head", "wte"], merges=False),
    gpt2("saved-head", modules_to_save=["lm_head"]),
    gpt2("saved-embedding", modules_to_save=["wte"]),
    gpt2("saved-both", modules_to_save=["wte", "lm_head"]),
    gpt2("one-layer", layers_to_transform=[1]),
    gpt2("all-linear", targets="all-linear"),  # type: ignore[arg-type]
    Lora("gpt1", Case("gpt1"), {"target_modules": ALL}),
    Lora("gpt1-head", Case("gpt1"), {"target_modules": ["lm_head", "c_attn"]}, merges=False),
    Lora("neo", Case("gpt_neo"), {"target_modules": ["q_proj", "v_proj", "out_proj", "c_fc", "c_proj"]}),
    Lora("neo-dora", Case("gpt_neo"), {"target_modules": ["q_proj", "c_fc"], "use_dora": True}),
    Lora("gptj", Case("gptj"), {"target_modules": ["q_proj", "k_proj", "v_proj", "fc_in", "fc_out", "lm_head"]}),
    Lora("neox", Case("gpt_neox"), {"target_modules": NEOX, "bias": "all"}),
    Lora("neox-ends", Case("gpt_neox"), {"target_modules": NEOX, "modules_to_save": ["embed_in", "lm_head"]}),
    Lora("codegen", Case("codegen"), {"target_modules": ["qkv_proj", "out_proj"]}),
    Lora(
        "new-head",
        Case("gpt2", "text-classification"),
        {"target_modules": ALL, "task_type": "SEQ_CLS"},
        saved=Case("gpt2"),
    ),
    Lora(
        "own-head",
        Case("gpt2", "token-classification"),
        {"target_modules": ALL, "task_type": "TOKEN_CLS", "modules_to_save": ["classifier"]},
    ),
)


def trained(lora: Lora, directory: Path) -> Any:
    """The peft model of a case with random parameters; base and adapter are saved as ``base`` and ``adapter``."""
    import peft
    import torch

    with in_float64():  # keeps the merged weights of both sides from being rounded
        hf_model(lora.saved or lora.case).save_pretrained(directory / "base")
        base = hf_model(lora.case)
        base.name_or_path = str(directory / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, **lora.settings)).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.2
            parameter.data = parameter.data + noise.to(parameter.dtype)
        model.save_pretrained(directory / "adapter")
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", LORAS, ids=lambda lora: lora.name)
def test_equals_peft(lora: Lora, tmp_path: Path) -> None:
    model, inputs = trained(lora, tmp_path), inputs_of(lora.case.task)
    found = opened(tmp_path)
    assert found.config.task == lora.case.task
    ours = our_outputs(reference(found), inputs)
    mask = inputs["attention_mask"]
    assert gap(ours, hf_outputs(lora.case, inputs, model), mask) < 1e-10, "unmerged"
    base = our_outputs(reference(opened(tmp_path, adapter=None)), inputs)
    if "logits" in base and base["logits"].shape == ours["logits"].shape:
        assert gap({"logits": base["logits"]}, {"logits": ours["logits"]}, mask) > 1e-3
    if lora.merges:
        assert gap(ours, hf_outputs(lora.case, inputs, model.merge_and_unload()), mask) < 1e-10, "merged"


def opened(directory: Path, **changed: Any) -> Checkpoint:
    return open_checkpoint(directory / "base", Options(**{"adapter": str(directory / "adapter"), **changed}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the base ``base`` and the plain LoRA adapter ``adapter``, both in float32."""
    directory = tmp_path_factory.mktemp("plain")
    trained(LORAS[0], directory)
    for path in (directory / "base" / "model.safetensors", directory / "adapter" / "adapter_model.safetensors"):
        save_file({name: array.astype(np.float32) for name, array in load_file(path).items()}, path)
    return directory


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(plain, tmp_path / "copy")
    return tmp_path / "copy"


def settings(directory: Path, **changed: object) -> None:
    """Change keys of ``adapter_config.json``."""
    path = directory / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def arrays(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of the adapter."""
    path = directory / "adapter" / "adapter_model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounds_once_to_the_type_of_the_base(copy: Path, dtype: str) -> None:
    import ml_dtypes  # noqa: F401  registers bfloat16

    path = copy / "base" / "model.safetensors"
    base = {name: array.astype(dtype) for name, array in load_file(path).items()}
    save_file(base, path)
    adapter = {k: v.astype(np.float64) for k, v in load_file(copy / "adapter" / "adapter_model.safetensors").items()}
    merged, name = opened(copy).source.tensors, "transformer.h.1.mlp.c_fc"
    module = f"base_model.model.{name}"
    delta = (adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]).T * (5 / 3)
    found = merged[f"{name}.weight"]
    expected = (base[f"{name}.weight"].astype(np.float64) + delta).astype(dtype)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found.read(), expected)
    np.testing.assert_array_equal(found.read((slice(3, 9), slice(5, 17))), expected[3:9, 5:17])


def test_bin_adapter_is_read_alike(copy: Path) -> None:
    import torch

    path = copy / "adapter" / "adapter_model.safetensors"
    expected = {name: weight.read() for name, weight in opened(copy).weights.items()}
    torch.save({k: torch.from_numpy(v) for k, v in load_file(path).items()}, path.with_suffix(".bin"))
    path.unlink()
    found = opened(copy)
    assert all(np.array_equal(weight.read(), expected[name]) for name, weight in found.weights.items())
    assert {str(path.with_suffix(".bin")), str(path.parent / "adapter_config.json")} <= set(found.source.files)


def test_base_without_the_prefix_and_adapter_with_it(copy: Path) -> None:
    expected = opened(copy).weights["h.0.attn.c_attn.weight"].read()
    path = copy / "base" / "model.safetensors"
    save_file({name.removeprefix("transformer."): array for name, array in load_file(path).items()}, path)
    np.testing.assert_array_equal(opened(copy).weights["h.0.attn.c_attn.weight"].read(), expected)


def test_resized_vocabulary(copy: Path) -> None:
    bigger = np.random.default_rng(0).normal(size=(99, 24)).astype(np.float32)
    arrays(copy, lambda found: found.update({"base_model.model.transformer.wte.weight": bigger}))
    found = opened(copy)
    assert (found.config.vocab_size, found.config.tied_head) == (99, True)
    assert any("from 97 to 99 ids" in note for note in found.notes)
    np.testing.assert_array_equal(found.weights["wte.weight"].read(), bigger)


def test_verified_conversion(copy: Path, tmp_path: Path, capsys: Any) -> None:
    words = ("--to", "onnx", "--to", "safetensors")
    done = command(capsys, "hf", copy / "base", "--adapter", copy / "adapter", *words, "-o", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    assert done.json["verification"]["passed"]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["options"]["adapter"] == "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f["name"] for f in manifest["source"]["files"]}
    card = (tmp_path / "a" / "README.md").read_text()
    assert "--adapter ADAPTER" in card
    assert "with the adapter merged" in card
    for n, form in enumerate(("hf", "convert")):
        again = command(capsys, form, copy / "adapter", "--base", copy / "base", *words, "-o", tmp_path / f"b{n}")
        assert again.code == 0, again.err
        assert tree(tmp_path / f"b{n}") == tree(tmp_path / "a")
    logits = load_file(tmp_path / "a" / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    np.testing.assert_array_equal(logits, opened(copy).source.tensors["transformer.h.0.attn.c_attn.weight"].read())


def test_adapter_beside_the_model(copy: Path, capsys: Any) -> None:
    for path in (copy / "adapter").iterdir():
        if path.name.startswith("adapter"):
            shutil.copy(path, copy / "base")
    ignored = open_checkpoint(copy / "base")
    assert "left behind: the LoRA adapter next to the weights" in ignored.notes[0]
    strict = command(capsys, "hf", copy / "base", "--to", "safetensors", "--strict", "--dry-run")
    assert strict.code == 3
    assert "left behind" in strict.err
    merged = opened(copy, adapter=str(copy / "base"))
    assert not any("left behind" in note for note in merged.notes)
    expected = opened(copy).weights["h.0.attn.c_attn.weight"].read()
    np.testing.assert_array_equal(merged.weights["h.0.attn.c_attn.weight"].read(), expected)


@pytest.mark.parametrize("config", [False, True], ids=["without config.json", "with config.json"])
@pytest.mark.parametrize("form", ["hf", "convert"])
def test_adapter_alone(copy: Path, capsys: Any, form: str, config: bool) -> None:
    settings(copy, base_model_name_or_path="org/base-model")
    if config:
        shutil.copy(copy / "base" / "config.json", copy / "adapter")
    (copy / "adapter" / "training_args.bin").write_bytes(b"PK")
    for path in (copy / "adapter", copy / "adapter" / "adapter_model.safetensors"):
        done = command(capsys, form, path, "--to", "safetensors", "--dry-run")
        assert done.code == 3
        assert "LoRA adapter" in done.err
        assert "--base org/base-model" in done.err


@pytest.mark.parametrize("own", [False, True])
def test_tokenizer_of_the_adapter_replaces_the_bases(copy: Path, own: bool) -> None:
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "generation_config.json"):
        (copy / "base" / name).write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json") if own else ("tokenizer_config.json",):
        (copy / "adapter" / name).write_text("{}")
    found = opened(copy).source.tokenizer
    base = {n: str(copy / "base" / n) for n in ("vocab.json", "merges.txt", "added_tokens.json")}
    mine = {n: str(copy / "adapter" / n) for n in ("tokenizer.json", "tokenizer_config.json")}
    assert found == {
        **(mine if own else base),
        "generation_config.json": str(copy / "base" / "generation_config.json"),
    }


REFUSED = {
    "kind": ({"peft_type": "IA3"}, UnsupportedError, "IA3 adapters are not supported"),
    "no kind": ({"peft_type": None}, UnsupportedError, "does not state its kind"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "init_lora_weights = 'pissa_niter_4'"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, UnsupportedError, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1, 5]}, UnsupportedError, "trainable_token_indices = [1, 5]"),
    "unknown key": ({"use_new_trick": True}, UnsupportedError, "use_new_trick = True"),
    "rank": ({"r": 4}, InputError, "expected rank 4"),
    "no rank": ({"r": 0}, InputError, "r: wrong value"),
    "alpha": ({"lora_alpha": "big"}, InputError, "lora_alpha"),
    "flag": ({"use_rslora": "no"}, InputError, "use_rslora: wrong value; expected true or false"),
    "names": ({"modules_to_save": "lm_head"}, InputError, "modules_to_save: wrong value"),
    "slow pattern": ({"rank_pattern": {"(a+)+$": 3}}, UnsupportedError, "too complex"),
    "broken pattern": ({"alpha_pattern": {"(": 3}}, UnsupportedError, "too complex"),
    "dora": ({"use_dora": True}, InputError, "missing     transformer.h.0.attn.c_attn.lora_magnitude_vector"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_setting(copy: Path, name: str) -> None:
    changed, kind, words = REFUSED[name]
    settings(copy, **changed)
    with pytest.raises(kind) as caught:
        opened(copy)
    assert words in str(caught.value)


def test_unset_and_unknown_keys_are_accepted(copy: Path) -> None:
    settings(copy, use_new_trick=None, another_trick=False, third_trick={})
    opened(copy)


def test_tied_training_is_refused(copy: Path) -> None:
    settings(copy, ensure_weight_tying=True, modules_to_save=["wte"])
    embedding = np.ones((97, 24), np.float32)
    arrays(copy, lambda found: found.update({"base_model.model.transformer.wte.weight": embedding}))
    with pytest.raises(UnsupportedError, match="ensure_weight_tying"):
        opened(copy)


def test_all_misfits_are_listed_at_once(copy: Path) -> None:
    start = "base_model.model.transformer.h"

    def change(found: dict[str, Any]) -> None:
        del found[f"{start}.1.mlp.c_fc.lora_A.weight"], found[f"{start}.1.mlp.c_fc.lora_B.weight"]
        found[f"{start}.0.attn.c_attn.lora_A.weight"] = np.ones((3, 25), np.float32)
        found[f"{start}.7.attn.c_attn.lora_A.weight"] = np.ones((3, 24), np.float32)
        found[f"{start}.7.attn.c_attn.lora_B.weight"] = np.ones((72, 3), np.float32)
        found["base_model.model.strange.weight"] = np.ones(3, np.float32)

    arrays(copy, change)
    with pytest.raises(InputError) as caught:
        opened(copy)
    text = str(caught.value)
    assert "missing     LoRA tensors of h.1.mlp.c_fc" in text
    assert "wrong shape transformer.h.0.attn.c_attn.lora_A: expected [3, 24], found [3, 25]" in text
    assert "unexpected  LoRA tensors of transformer.h.7.attn.c_attn" in text
    assert "unexpected  strange.weight" in text
    assert "base" in str(caught.value.hint)


def test_half_a_pair_is_refused(copy: Path) -> None:
    arrays(copy, lambda found: found.pop("base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"))
    with pytest.raises(InputError, match=r"missing     transformer\.h\.0\.attn\.c_attn\.lora_B\.weight"):
        opened(copy)


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(copy: Path, lost: str) -> None:
    (copy / "adapter" / lost).unlink()
    with pytest.raises(InputError, match=f"the adapter's {lost} is missing"):
        opened(copy)


def test_not_an_adapter(copy: Path) -> None:
    with pytest.raises(InputError, match="no LoRA adapter in this directory"):
        opened(copy, adapter=str(copy / "base"))
    with pytest.raises(InputError, match="no such file or directory"):
        opened(copy, adapter=str(copy / "nothing" / "here" / "at" / "all"))
    with pytest.raises(InputError, match="no LoRA adapter in this directory"):
        open_checkpoint(copy / "base", Options(base=str(copy / "base")))


def test_adapter_and_base_exclude_each_other(copy: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        opened(copy, base="x")


def test_every_error_is_ours(copy: Path) -> None:
    """Damaged files end in an error of this program, whichever byte is wrong."""
    path = copy / "adapter" / "adapter_config.json"
    good = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(good)
        bad[random.integers(len(bad))] = random.integers(256)
        path.write_bytes(bad)
        with contextlib.suppress(GptConvertError):
            opened(copy)
