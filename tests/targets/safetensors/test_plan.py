"""The safetensors target compared with the safetensors library (bytes) and transformers (logits)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from gptconvert.errors import UnsupportedError
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.export import PlannedFile
from gptconvert.model.options import Options
from gptconvert.targets.package.sidecars import sidecar_files
from gptconvert.targets.safetensors.plan import INDEX_FILE, safetensors_file
from gptconvert.targets.safetensors.target import TARGET
from reference_model.model import GPT
from tests.helpers import (
    FIXTURES,
    NO_RELEASED_FILES,
    REAL_GPT2,
    checkpoint_of,
    computed_tensors,
    content,
    openai_checkpoint,
    tiny_gpt2,
    torch_weights,
    write_planned,
)

IDS = torch.tensor([[0, 96, 5, 17, 42, 3, 88], [96, 1, 2, 3, 50, 60, 70]])
#: Configuration changes of the tested models.
VARIANTS: dict[str, dict[str, object]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "variant": {
        "activation_function": "gelu",
        "scale_attn_by_inverse_layer_idx": True,
        "layer_norm_epsilon": 1e-3,
        "n_inner": None,
        "n_layer": 3,
    },
    "unscaled": {"scale_attn_weights": False, "n_layer": 12},
}


def export(checkpoint: Any, directory: Path, options: Options = Options()) -> Path:  # noqa: B008
    exports = TARGET.plan(checkpoint, options)
    files = [*exports[0].files, *sidecar_files(exports, options)]
    return write_planned(directory, files)


def load(directory: Path, **kwargs: Any) -> Any:
    """Load the exported model in transformers, with no missing, unexpected or mismatched key."""
    auto = kwargs.pop("auto", transformers.AutoModelForCausalLM)
    model, info = auto.from_pretrained(directory, output_loading_info=True, local_files_only=True, **kwargs)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def reference_logits(checkpoint: Any) -> Any:
    with torch.no_grad():
        return GPT.from_weights(checkpoint.config, torch_weights(checkpoint))(IDS)[0]


def saved_by_library(files: tuple[PlannedFile, ...], directory: Path) -> None:
    """Every planned safetensors file equals the one that ``save_file`` writes for the same tensors."""
    from safetensors.torch import load as parse
    from safetensors.torch import save_file

    for file in files:
        if file.path.endswith(".safetensors"):
            shuffled = dict(sorted(parse(content(file)).items(), key=lambda pair: hash(pair[0])))
            save_file(shuffled, directory / "witness", metadata={"format": "pt"})
            assert content(file) == (directory / "witness").read_bytes(), file.path


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_every_key_and_computes_the_same(variant: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(*tiny_gpt2(7, **VARIANTS[variant]), tmp_path)
    model = load(export(checkpoint, tmp_path / "out"), dtype=torch.float64)
    with torch.no_grad():
        logits = model(IDS).logits
    torch.testing.assert_close(logits, reference_logits(checkpoint), rtol=0, atol=1e-11)


def test_openai_and_hf_sources_give_the_same_bytes(tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2(3, n_inner=None)
    (tmp_path / "tf").mkdir()
    from_openai = TARGET.plan(openai_checkpoint(tmp_path / "tf", 3), Options())[0].files
    from_hf = TARGET.plan(checkpoint_of(raw, arrays, tmp_path), Options())[0].files
    assert [content(file) for file in from_openai] == [content(file) for file in from_hf]


def test_weights_of_an_openai_checkpoint_are_copied_raw(tmp_path: Path) -> None:
    checkpoint = openai_checkpoint(tmp_path)
    (file,) = TARGET.plan(checkpoint, Options())[0].files
    for placed in file.tensors:
        segments = placed.tensor.segments()
        assert segments is not None, placed.name
        assert sum(segment.nbytes for segment in segments) == placed.tensor.nbytes
        assert placed.weight == placed.name.removeprefix("transformer.")
    assert {placed.weight for placed in file.tensors} == set(checkpoint.weights)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("limit", [5_000_000_000, 12_000, 1])
def test_bytes_equal_those_of_the_library(variant: str, limit: int, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(*tiny_gpt2(1, **VARIANTS[variant]), tmp_path)
    saved_by_library(TARGET.plan(checkpoint, Options(max_shard_size=limit))[0].files, tmp_path)


@pytest.mark.parametrize("shards", ["hf-safetensors", "hf-safetensors-sharded", "hf-bf16", "hf-variant"])
def test_output_equals_files_saved_by_transformers(shards: str, tmp_path: Path) -> None:
    """Planning the tensors of transformers' files gives the same files, index included."""
    from safetensors.numpy import load_file

    directory = FIXTURES / "tiny-gpt2" / shards
    paths = sorted(directory.glob("*.safetensors"))
    arrays = {name: array for path in paths for name, array in load_file(path).items()}
    raw = json.loads((directory / "config.json").read_text())
    limit = 25_000 if len(paths) > 1 else 5_000_000_000
    files = TARGET.plan(checkpoint_of(raw, arrays, tmp_path), Options(max_shard_size=limit))[0].files
    witness = {path.name: path.read_bytes() for path in directory.glob("model*")}
    assert {file.path: content(file) for file in files} == witness


def test_mixed_types_are_laid_out_as_by_the_library(tmp_path: Path) -> None:
    kinds = [np.float32, ml_dtypes.bfloat16, np.float64, np.float16]
    arrays = {
        f"{letter}{n}": np.arange(n, dtype=np.float32).astype(kinds[n % 4])
        for n, letter in enumerate("badcéfghZ\n", 1)
    }
    arrays |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(1.5, np.float16)}
    entries = [(name, tensor, None) for name, tensor in computed_tensors(arrays).items()]
    file = safetensors_file("mixed.safetensors", entries)
    saved_by_library((file,), tmp_path)
    assert file.nbytes == len(content(file))


def test_big_endian_sources_are_swapped(tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2(5)
    swapped = {name: array.astype(">f4") for name, array in arrays.items()}
    big, little = tmp_path / "big", tmp_path / "little"
    big.mkdir()
    little.mkdir()
    plans = [TARGET.plan(checkpoint_of(raw, a, d), Options())[0].files for a, d in ((swapped, big), (arrays, little))]
    assert content(plans[0][0]) == content(plans[1][0])


def test_integer_weights_are_rejected() -> None:
    entries = [("wte.weight", computed_tensors({"x": np.zeros(3, np.int32)})["x"], None)]
    with pytest.raises(UnsupportedError) as caught:
        safetensors_file("model.safetensors", entries)
    assert caught.value.item == "wte.weight"
    assert caught.value.found == "int32"


def test_shards_load_and_their_index_is_complete(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(*tiny_gpt2(2, n_layer=11), tmp_path)
    out = export(checkpoint, tmp_path / "out", Options(max_shard_size=30_000))
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 5
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert not (out / "model.safetensors").exists()
    index = json.loads((out / INDEX_FILE).read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert index["metadata"]["total_size"] == checkpoint.nbytes
    with torch.no_grad():
        logits = load(out, dtype=torch.float64)(IDS).logits
    torch.testing.assert_close(logits, reference_logits(checkpoint), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layers", [2, 11])
def test_shards_are_split_as_by_transformers(layers: int, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(*tiny_gpt2(2, n_layer=layers), tmp_path)
    out = export(checkpoint, tmp_path / "out", Options(max_shard_size=30_000))
    loaded = load(out)
    fresh = transformers.GPT2LMHeadModel(loaded.config)  # a loaded model fills shards in another order
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(tmp_path / "again", max_shard_size=30_000)
    for path in (tmp_path / "again").glob("model*"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_and_recorded(dtype: str, tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2(4)
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    half = {name: array.astype(kind) for name, array in arrays.items()}
    checkpoint = checkpoint_of(raw, half, tmp_path)
    out = export(checkpoint, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert load(out).transformer.wte.weight.dtype == getattr(torch, dtype)
    with torch.no_grad():
        logits = load(out, dtype=torch.float64)(IDS).logits
    torch.testing.assert_close(logits, reference_logits(checkpoint), rtol=0, atol=1e-11)


def test_bare_model_has_bare_names(tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2(6, tie_word_embeddings=False)
    checkpoint = checkpoint_of(raw, arrays, tmp_path, request=Options(task="feature-extraction"))
    (file,) = TARGET.plan(checkpoint, Options())[0].files
    names = [placed.name for placed in file.tensors]
    assert "wte.weight" in names
    assert not [name for name in names if name.startswith("transformer.") or "lm_head" in name]
    out = export(checkpoint, tmp_path / "out")
    model = load(out, auto=transformers.AutoModel, dtype=torch.float64)
    assert type(model).__name__ == "GPT2Model"
    with torch.no_grad():
        hidden = model(IDS).last_hidden_state
    torch.testing.assert_close(hidden, reference_logits(checkpoint), rtol=0, atol=1e-11)
    model.to(torch.float32).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_offsets_are_dense_and_absolute(tmp_path: Path) -> None:
    (file,) = TARGET.plan(openai_checkpoint(tmp_path), Options())[0].files
    offset = len(file.head)
    for placed in file.tensors:
        assert placed.offset == offset
        offset += placed.tensor.nbytes
    assert offset == file.nbytes
    assert len(file.head) % 8 == 0


def test_planning_reads_no_weights(tmp_path: Path) -> None:
    checkpoint = openai_checkpoint(tmp_path)
    (tmp_path / "weights.raw").unlink()
    assert TARGET.plan(checkpoint, Options())[0].files[0].nbytes > checkpoint.nbytes


def test_real_files_match_openais_logits(tmp_path: Path) -> None:
    """A checkpoint in OpenAI's format, compared with logits computed by OpenAI's code."""
    if not REAL_GPT2.is_dir():
        pytest.skip(NO_RELEASED_FILES)
    from gptconvert.families.registry import understand
    from gptconvert.model.options import Options
    from gptconvert.sources.openai_tf import FORMAT

    source = FORMAT.open(str(REAL_GPT2), Options())
    checkpoint = understand(source, Options())
    assert all(p.tensor.segments() for f in TARGET.plan(checkpoint, Options())[0].files for p in f.tensors)
    model = load(export(checkpoint, tmp_path))
    oracle = np.load(REAL_GPT2 / "oracle.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(oracle["ids"]).long()).logits[:, -4:].numpy()
    np.testing.assert_allclose(logits, oracle["logits_last"], rtol=0, atol=2e-5 * np.abs(logits).max())
