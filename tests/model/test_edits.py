"""The user's changes to a source: ``--ignore-key``, ``--set`` and ``--ignore-tensor``."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.inspection import open_checkpoint
from gptconvert.model.edits import IGNORED, edited_config
from gptconvert.model.options import Options
from reference_model.config import GPTConfig
from tests.commands import ORIGINALS, TINY, command
from tests.helpers import checkpoint_of, tiny_gpt2

HF = TINY / "hf-safetensors"
#: Format → (checkpoint, a harmless key of its configuration, a key to set, the field that shows its value).
CONFIGURED: dict[str, tuple[Path, str, str, Callable[[GPTConfig], object]]] = {
    "hf": (HF, "use_cache", "layer_norm_epsilon=0.5", lambda config: config.norm_eps == 0.5),
    "openai-tf": (TINY / "openai-tf", "n_head", "n_head=4", lambda config: config.n_head == 4),
    "mesh-tf": (ORIGINALS / "mesh-tf", "lr", "local_attention_radius=3", lambda config: 3 in config.attn_window),
    "mesh-jax": (ORIGINALS / "mesh-jax", "lr", "pe_rotary_dims=2", lambda config: config.rotary.dim == 2),
    "neox": (ORIGINALS / "neox-pipeline", "fp16", "rotary_emb_base=99", lambda config: config.rotary.base == 99),
    "nanogpt": (ORIGINALS / "nanogpt", "dropout", "n_head=4", lambda config: config.n_head == 4),
    "megatron": (ORIGINALS / "megatron", "lr", "layernorm_epsilon=0.5", lambda config: config.norm_eps == 0.5),
}


def gpt2(request: Options, extra: tuple[str, ...] = (), **keys: object) -> Any:
    """A tiny GPT-2 with further keys in its configuration and further tensors."""
    raw, arrays = tiny_gpt2(**keys)
    arrays |= {name: np.ones((3, 5), np.float32) for name in extra}
    return checkpoint_of(raw, arrays, request=request)


# --- keys ----------------------------------------------------------------------------------------------------------


def test_unknown_keys_are_ignored_on_request_with_a_note() -> None:
    keys = {"logit_cap": 30, "mystery": {"a": 1}}
    with pytest.raises(UnsupportedError, match="logit_cap") as error:
        gpt2(Options(), **keys)
    assert error.value.hint is not None and error.value.hint.endswith(
        "pass --ignore-key logit_cap --ignore-key mystery"
    )
    found = gpt2(Options(ignore_key=("logit_cap", "mystery")), **keys)
    assert "logit_cap = 30 is ignored (--ignore-key)" in found.notes
    assert not {"logit_cap", "mystery"} & found.carried.keys()
    with pytest.raises(UnsupportedError, match="mystery"):
        gpt2(Options(ignore_key=("logit_cap",)), **keys)


def test_a_key_that_is_not_in_the_file_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no such key") as error:
        gpt2(Options(ignore_key=("logits_cap",)), logit_cap=30)
    assert error.value.hint == "did you mean logit_cap?"
    with pytest.raises(UsageError, match="no such key"):
        gpt2(Options(ignore_key=("zzzzzz",)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n_head=4", 4),
        ("n_head=null", None),
        ("a=x=y", "x=y"),
        ("a=", ""),
        ("a=[1, 2]", [1, 2]),
        ('a="4"', "4"),
        ("a=1e-3", 1e-3),
        ("a=NaN", "NaN"),
        ("a=false", False),
        ("a=gelu", "gelu"),
    ],
)
def test_values_are_json_or_text(text: str, value: object) -> None:
    edited = edited_config({"n_head": 3}, Options(set_key=(text,)))
    assert edited[text.partition("=")[0]] == value


def test_keys_of_nested_objects() -> None:
    config = {"rope": {"base": 1, "kind": "x"}, "transformers.js_config": {"a": 1}, "attention_config": 1}
    options = Options(
        ignore_key=("rope.kind", "transformers.js_config", "attention-config"), set_key=("rope.base=2",)
    )
    assert edited_config(config, options) == {"rope": {"base": 2}}
    assert config["rope"] == {"base": 1, "kind": "x"}
    assert edited_config({}, Options(set_key=("a.b=1",))) == {"a": {"b": 1}}


def test_a_set_key_overrides_the_file_with_a_note() -> None:
    found = gpt2(Options(set_key=("layer_norm_epsilon=0.5", "n_ctx=40")))
    assert found.config.norm_eps == 0.5
    assert "layer_norm_epsilon is set to 0.5 (--set)" in found.notes
    found = gpt2(Options(set_key=("bos_token_id=7",)))
    assert found.special_ids.bos == 7
    assert "bos_token_id is set to 7 instead of 96 (--set)" in found.notes
    with pytest.raises(InputError) as error:
        gpt2(Options(set_key=("n_head=many",)))
    assert error.value.item == "n_head"


@pytest.mark.parametrize(
    "fields",
    [
        {"ignore_key": "x"},
        {"ignore_key": (1,)},
        {"ignore_key": ("",)},
        {"set_key": ("x",)},
        {"set_key": ("=1",)},
        {"ignore_tensor": None},
    ],
    ids=str,
)
def test_invalid_values_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        Options(**fields)


def test_lists_become_tuples() -> None:
    assert Options(ignore_key=["a"]) == Options(ignore_key=("a",))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGURED)
def test_every_format_with_a_configuration(name: str) -> None:
    path, ignored, setting, is_set = CONFIGURED[name]
    assert not is_set(open_checkpoint(path, format=name).config)
    key = setting.partition("=")[0]
    found = open_checkpoint(path, Options(ignore_key=(ignored,), set_key=(setting,)), format=name)
    assert is_set(found.config)
    assert any(note.startswith(f"{key} is set to ") for note in found.notes)
    assert any(note.startswith(f"{ignored} = ") for note in found.notes)
    assert ignored == key or ignored not in found.source.config


def test_a_checkpoint_without_a_configuration(tmp_path: Path) -> None:
    shutil.copytree(TINY / "openai-tf", tmp_path / "bare")
    (tmp_path / "bare" / "hparams.json").unlink()
    for options in (Options(set_key=("n_head=3",)), Options(ignore_key=("n_head",))):
        with pytest.raises(UsageError, match="has none"):
            open_checkpoint(tmp_path / "bare", options)


def test_neox_model_parallel_size_may_be_corrected() -> None:
    path = ORIGINALS / "neox-pipeline"
    size = open_checkpoint(path).source.config["model_parallel_size"]
    with pytest.raises(InputError, match="ranks"):
        open_checkpoint(path, Options(set_key=("model_parallel_size=7",)))
    open_checkpoint(path, Options(set_key=(f"model_parallel_size={size}",)))


# --- tensors -------------------------------------------------------------------------------------------------------

HEADS = ("v_head.summary.weight", "v_head.summary.bias", "transformer.h.0.adapter")


def test_unexpected_tensors_are_ignored_on_request() -> None:
    with pytest.raises(InputError, match="unexpected"):
        gpt2(Options(), HEADS)
    found = gpt2(Options(ignore_tensor=("v_head.*", "*.adapter")), HEADS)
    assert {name: found.dropped[name] for name in HEADS} == dict.fromkeys(HEADS, IGNORED)
    assert not {*HEADS} & found.source.tensors.keys()
    assert any(re.match(r"3 tensors are ignored \(--ignore-tensor\): ", note) for note in found.notes)
    assert found.weights.keys() == gpt2(Options()).weights.keys()


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--ignore-tensor v_haed\.summary\.bias matches no tensor") as error:
        gpt2(Options(ignore_tensor=("v_head.*", "v_haed.summary.bias")), HEADS)
    assert "did you mean v_head.summary.bias" in str(error.value.hint)
    with pytest.raises(UsageError, match="matches no tensor"):
        gpt2(Options(ignore_tensor=("V_HEAD.*",)), HEADS)


@pytest.mark.parametrize("pattern", ["*.h.1.mlp.c_fc.weight", "transformer.wte.weight", "*"])
def test_ignoring_a_required_tensor_is_an_error(pattern: str) -> None:
    with pytest.raises(InputError):
        gpt2(Options(ignore_tensor=(pattern,)))


def test_neox_tensors_by_either_name() -> None:
    """The trainer numbers its layers from 2; messages number the blocks from 0."""
    for pattern in ("layers.0.mlp.dense_h_to_4h.bias", "sequential.2.mlp.dense_h_to_4h.bias"):
        with pytest.raises(InputError, match="missing"):
            open_checkpoint(ORIGINALS / "neox-pipeline", Options(ignore_tensor=(pattern,)))


# --- command line --------------------------------------------------------------------------------------------------


def test_the_command_line(capsys: Any, tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "logit_cap": 30, "line": 1}))
    words = ("convert", tmp_path / "hf", "--to", "safetensors", "--no-verify", "-o", tmp_path / "out")
    done = command(capsys, *words)
    assert done.code == 4
    flags = re.findall(r"--ignore-key (\w+)", done.err)
    assert flags == ["logit_cap", "line"]
    hinted = [word for flag in flags for word in ("--ignore-key", flag)]
    done = command(capsys, *words, *hinted, "--set", "bos_token_id=7")
    assert done.code == 0, done.err
    assert "logit_cap = 30 is ignored" in done.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"]["ignore_key"] == ["logit_cap", "line"]
    assert manifest["options"]["set_key"] == ["bos_token_id=7"]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["bos_token_id"] == 7
    assert "logit_cap" not in written
    done = command(capsys, *words, *hinted, "--strict", "--force")
    assert done.code == 3
    assert command(capsys, *words, *hinted, "--set", "x").code == 2


@pytest.mark.parametrize("flag", ["--ignore-key", "--ignore-tensor", "--set"])
def test_formats_without_a_configuration_refuse_the_options(capsys: Any, flag: str) -> None:
    done = command(capsys, "inspect", ORIGINALS / "llmc" / "gpt2_fp32.bin", flag, "a=1")
    assert done.code == 2
    assert f"{flag} does not apply" in done.err
