"""Types of stored weights: unlike q, k and v are joined without loss; other than float types are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gptconvert.errors import UnsupportedError
from gptconvert.families import registry
from gptconvert.inspection import open_checkpoint
from gptconvert.model.options import Options
from gptconvert.model.quantised import QUANTISERS
from gptconvert.pipeline import convert
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import checkpoint_of, tiny_gpt2
from tests.sources.foreign import logits

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FAMILIES = {"gptj": "h.{i}.attn.{part}_proj.weight", "gpt_neo": "h.{i}.attn.attention.{part}_proj.weight"}


def saved(case: Case, directory: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    raw, arrays = witness.saved(case, directory)
    return raw, {name: torch.tensor(np.array(array)) for name, array in arrays.items()}


def write(directory: Path, raw: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("types", [(F32, F16, F32), (F16, F32, F32), (F16, BF16, F32), (F16, BF16, BF16)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_unlike_q_k_v_keep_their_values(family: str, types: tuple[Any, ...], tmp_path: Path) -> None:
    import transformers

    raw, tensors = saved(Case(family), tmp_path)
    for i in range(2):
        for part, dtype in zip("qkv", types, strict=True):
            name = "transformer." + FAMILIES[family].format(i=i, part=part)
            tensors[name] = tensors[name].to(dtype)
    source = write(tmp_path / "source", raw, tensors)
    output = tmp_path / "out"
    options = Options(targets=("onnx", "safetensors"))
    result = convert(open_checkpoint(source, options), output, options)
    note = next(note for note in result.notes if "parts of different types" in note)
    assert "float32: transformer.h.{0-1}.attn." in note
    assert result.report is not None
    assert result.report.passed

    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    models = []
    with witness.in_float64():
        for directory in (source, output):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
            )
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            models.append(model.eval()(ids).logits)
    assert torch.equal(*models)
    assert np.abs(logits(open_checkpoint(source), ids.numpy()) - models[0].numpy()).max() < 1e-12


BODY = "transformer.h.0.attn.c_attn"


def integers(tensors: dict[str, torch.Tensor], dtype: Any = torch.int8) -> None:
    tensors[f"{BODY}.weight"] = (tensors[f"{BODY}.weight"] * 50).to(dtype)


def bnb8(tensors: dict[str, torch.Tensor]) -> None:
    integers(tensors)
    tensors[f"{BODY}.SCB"] = torch.ones(72)
    tensors[f"{BODY}.weight_format"] = torch.tensor(0, dtype=torch.uint8)


def bnb4(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{BODY}.weight"] = torch.zeros(24 * 72 // 2, 1, dtype=torch.uint8)
    for name, size in {"absmax": 27, "quant_map": 16, "quant_state.bitsandbytes__nf4": 9}.items():
        tensors[f"{BODY}.weight.{name}"] = torch.zeros(size, dtype=torch.uint8)


def packed(tensors: dict[str, torch.Tensor], *more: str) -> None:
    del tensors[f"{BODY}.weight"]
    for name in ("qweight", "qzeros", *more):
        tensors[f"{BODY}.{name}"] = torch.zeros(3, 72, dtype=torch.int32)
    tensors[f"{BODY}.scales"] = torch.ones(1, 72, dtype=F16)


def float8(tensors: dict[str, torch.Tensor], scale: bool) -> None:
    integers(tensors, torch.float8_e4m3fn)
    if scale:
        tensors[f"{BODY}.weight_scale"] = torch.ones(1)


def blocks(tensors: dict[str, torch.Tensor]) -> None:
    """The 8-bit GPT-J and GPT-Neo of early bitsandbytes: codes beside uint8 weights."""
    integers(tensors, torch.uint8)
    tensors[f"{BODY}.absmax"], tensors[f"{BODY}.code"] = torch.ones(3), torch.ones(256)


QUANTISED: dict[str, tuple[Any, str]] = {
    "int8": (integers, "integers without scales"),
    "uint8": (lambda t: integers(t, torch.uint8), "integers without scales"),
    "int32": (lambda t: integers(t, torch.int32), "integers without scales"),
    "bool": (lambda t: integers(t, torch.bool), "booleans"),
    "float8": (lambda t: float8(t, scale=False), "8-bit floats without scales"),
    "float8 scaled": (lambda t: float8(t, scale=True), "compressed-tensors or float8"),
    "bitsandbytes 8": (bnb8, "bitsandbytes, 8 bits"),
    "bitsandbytes 4": (bnb4, "bitsandbytes, 4 bits"),
    "bitsandbytes blocks": (blocks, "bitsandbytes, 8 bits in blocks"),
    "GPTQ": (lambda t: packed(t, "g_idx"), "(GPTQ)"),
    "AWQ": (packed, "(AWQ or GPTQ)"),
}


@pytest.mark.parametrize("options", [Options(), Options(dtype="fp32")], ids=["as stored", "fp32"])
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_weights_of_other_types_are_refused(kind: str, container: str, options: Options, tmp_path: Path) -> None:
    raw, tensors = saved(Case("gpt2"), tmp_path)
    quantise, words = QUANTISED[kind]
    quantise(tensors)
    source = write(tmp_path / "source", raw, tensors if container == "safetensors" else {})
    if container == "torch":
        (source / "model.safetensors").unlink()
        torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(source, options)
    assert words in str(caught.value)
    assert BODY in str(caught.value)
    assert caught.value.exit_code == 4
    assert "quantised" in (caught.value.hint or "")


def test_the_kind_is_named_before_the_configuration_is_judged(tmp_path: Path) -> None:
    raw, tensors = saved(Case("gpt2"), tmp_path)
    bnb8(tensors)
    source = write(tmp_path / "source", {**raw, "quantization_config": {"load_in_8bit": True}}, tensors)
    with pytest.raises(UnsupportedError, match="bitsandbytes, 8 bits"):
        open_checkpoint(source)


def test_a_tied_head_of_another_type_is_refused(tmp_path: Path) -> None:
    raw, tensors = saved(Case("gpt2"), tmp_path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].to(torch.int8)
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight"):
        open_checkpoint(write(tmp_path / "source", raw, tensors))


def test_buffers_of_any_type_are_dropped(tmp_path: Path) -> None:
    raw, tensors = saved(Case("gpt2"), tmp_path)
    mask = torch.tril(torch.ones(1, 1, 40, 40))
    tensors["transformer.h.0.attn.bias"] = mask.to(torch.uint8)
    tensors["transformer.h.1.attn.bias"] = mask.to(torch.bool)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-10000, dtype=torch.int32)
    checkpoint = open_checkpoint(write(tmp_path / "source", raw, tensors))
    assert len(checkpoint.dropped) == 3
    raw, tensors = saved(Case("gpt1"), tmp_path)
    tensors["transformer.position_ids"] = torch.arange(40)
    assert len(open_checkpoint(write(tmp_path / "gpt1", raw, tensors)).dropped) == 1


def test_every_quantiser_is_recognised_by_its_names() -> None:
    shown = {words.strip("()") for _, words in QUANTISED.values()}
    untested = {quantiser.title for quantiser in QUANTISERS} - shown
    assert untested == {"HQQ", "quanto", "AQLM"}


def test_float_weights_with_a_quantization_config() -> None:
    """transformers quantises such weights when it loads them; the key must not be removed without a word."""
    raw, arrays = tiny_gpt2(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UnsupportedError) as caught:
        checkpoint_of(raw, arrays)
    assert "quantization_config" in caught.value.message
    assert "--ignore-key quantization_config" in str(caught.value.hint)
    ignored = checkpoint_of(raw, arrays, request=Options(ignore_key=("quantization_config",)))
    assert any("quantization_config" in note for note in ignored.notes)


@pytest.mark.parametrize("family", [family.name for family in registry.FAMILIES])
def test_matrices_stored_in_columns(family: str, tmp_path: Path) -> None:
    """torch.save keeps the strides of transposed tensors, which converters from other frameworks leave behind."""
    raw, tensors = saved(Case(family), tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    torch.save(
        {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in tensors.items()}, source / "pytorch_model.bin"
    )
    checkpoint = open_checkpoint(source)
    result = convert(checkpoint, tmp_path / "out", Options(targets=("onnx", "safetensors")))
    assert result.report is not None
    assert result.report.passed
    plain = open_checkpoint(write(tmp_path / "plain", raw, tensors))
    # Matrices with other strides may be multiplied in another order, which on some processors rounds differently.
    expected = logits(plain)
    np.testing.assert_allclose(logits(checkpoint), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
