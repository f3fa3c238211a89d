"""GGUF files as written: read by the gguf package, in llama.cpp's names and layout, streamed and reproducible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gptconvert import pipeline
from gptconvert.errors import UnsupportedError, UsageError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import GGUF_TYPES, Options
from gptconvert.pipeline import open_checkpoint
from gptconvert.targets.gguf.plan import file_name, plan
from tests.commands import command, tree
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import FIXTURES, checkpoint_of, content, tiny_gpt2, write_planned

TINY, TRAINED = FIXTURES / "tiny-gpt2" / "openai-tf", FIXTURES / "gpt2-stdlib"
F32 = Options(targets=("gguf",), gguf_type=("f32",))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def written(checkpoint: Checkpoint, directory: Path, options: Options = F32) -> Any:
    """The gguf package's reading of the only file."""
    (export,) = plan(checkpoint, options)
    write_planned(directory, export.files)
    return gguf.GGUFReader(directory / export.path)


def values(reader: Any) -> dict[str, Any]:
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and len(field.data) < 1000
    }


def tensors(reader: Any) -> dict[str, Any]:
    return {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}


def test_gpt2(directory: Path, tmp_path: Path) -> None:
    """Names and orientation, beside transformers' own weights."""
    case = Case("gpt2")
    model = witness.witness(case).transformer
    reader = written(witness.checkpoint(case, directory), tmp_path)
    found, keys = tensors(reader), values(reader)
    assert np.array_equal(found["token_embd.weight"], model.wte.weight.detach().numpy())
    assert np.array_equal(found["position_embd.weight"], model.wpe.weight.detach().numpy())
    for i, block in enumerate(model.h):
        pairs = {
            "attn_qkv": block.attn.c_attn,
            "attn_output": block.attn.c_proj,
            "ffn_up": block.mlp.c_fc,
            "ffn_down": block.mlp.c_proj,
        }
        for name, layer in pairs.items():
            assert np.array_equal(found[f"blk.{i}.{name}.weight"], layer.weight.detach().numpy().T), name
            assert np.array_equal(found[f"blk.{i}.{name}.bias"], layer.bias.detach().numpy()), name
        for name, norm in (("attn_norm", block.ln_1), ("ffn_norm", block.ln_2)):
            assert np.array_equal(found[f"blk.{i}.{name}.weight"], norm.weight.detach().numpy())
    assert "output.weight" not in found and len(found) == 2 + 12 * 2 + 2
    assert keys["general.architecture"] == "gpt2" and keys["general.file_type"] == 0
    sizes = {"context_length": 40, "embedding_length": 24, "block_count": 2, "feed_forward_length": 56}
    assert {name: keys[f"gpt2.{name}"] for name in sizes} == sizes
    assert keys["gpt2.attention.head_count"] == 3
    assert keys["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["serial", "tied", "no-bias"])
def test_neox(name: str, directory: Path, tmp_path: Path) -> None:
    """The head is always written, biases too, and q, k and v are three blocks."""
    case = next(case for case in witness.VARIANTS if str(case) == f"gpt_neox-text-generation-{name}")
    model = witness.witness(case)
    reader = written(witness.checkpoint(case, directory), tmp_path)
    found, keys = tensors(reader), values(reader)
    head = model.get_output_embeddings().weight.detach().numpy()
    assert np.array_equal(found["output.weight"], head)
    for i, layer in enumerate(model.gpt_neox.layers):
        fused = layer.attention.query_key_value.weight.detach().numpy().reshape(3, 3, 8, 24)  # heads, parts
        assert np.array_equal(found[f"blk.{i}.attn_qkv.weight"], fused.transpose(1, 0, 2, 3).reshape(72, 24))
        if name == "no-bias":
            assert not found[f"blk.{i}.attn_qkv.bias"].any() and found[f"blk.{i}.attn_output.bias"].shape == (24,)
    assert keys["gptneox.use_parallel_residual"] is (name != "serial")
    assert keys["gptneox.rope.dimension_count"] == 4 and keys["gptneox.rope.freq_base"] == 1000


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_gptj_as_phi2(family: str, directory: Path, tmp_path: Path) -> None:
    """Rotated pairs (0, 1), (2, 3) of each head become (0, 2), (1, 3); biases are zeros."""
    checkpoint = witness.checkpoint(Case(family), directory)
    reader = written(checkpoint, tmp_path)
    found, keys = tensors(reader), values(reader)
    assert keys["general.architecture"] == "phi2" and family[:4].upper() in keys[
        "general.description"
    ].upper().replace("-", "")
    fused, heads = checkpoint.weights["h.1.attn.c_attn.weight"].read(), checkpoint.config.n_head
    width = 24 // heads
    order = [0, 2, 1, 3, *range(4, width)]
    expected = fused.reshape(3, heads, width, 24).copy()
    expected[:2] = expected[:2][:, :, order]
    assert np.array_equal(found["blk.1.attn_qkv.weight"], expected.reshape(72, 24))
    assert not found["blk.0.attn_qkv.bias"].any() and not found["blk.0.attn_output.bias"].any()
    assert np.array_equal(found["output.bias"], checkpoint.weights["lm_head.bias"].read())
    assert "blk.0.ffn_norm.weight" not in found and keys["phi2.rope.dimension_count"] == 4


@pytest.mark.parametrize("keys", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}], ids=str)
def test_other_scales_of_attention_scores_become_query_weights(keys: dict[str, object], tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2(**keys)
    checkpoint = checkpoint_of(raw, arrays)
    (export,) = plan(checkpoint, F32)
    assert any("scaling of attention scores" in note for note in export.notes)
    found = tensors(written(checkpoint, tmp_path))
    for i in range(2):
        factor = 1 / (i + 1) if "scale_attn_by_inverse_layer_idx" in keys else np.sqrt(8)
        weight = arrays[f"transformer.h.{i}.attn.c_attn.weight"].T.copy()
        weight[:24] = (weight[:24].astype(np.float64) * factor).astype(np.float32)
        assert np.array_equal(found[f"blk.{i}.attn_qkv.weight"], weight)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_types(kind: str, tmp_path: Path) -> None:
    """Norms, biases and positions stay float32; in files with fewer bits, the embedding has 8."""
    raw, arrays = tiny_gpt2(n_embd=64, n_head=2, n_inner=96)
    checkpoint = checkpoint_of(raw, arrays)
    reader = written(checkpoint, tmp_path, Options(targets=("gguf",), gguf_type=(kind,)))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    vocabulary = "Q8_0" if kind in ("q5_0", "q4_0") else kind.upper()
    for name, found in types.items():
        small = name.endswith("bias") or "norm" in name or name == "position_embd.weight"
        assert found == ("F32" if small else vocabulary if name == "token_embd.weight" else kind.upper()), name
    found = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    weight = arrays["transformer.h.0.mlp.c_fc.weight"].T
    expected = gguf.quants.quantize(np.ascontiguousarray(weight), gguf.GGMLQuantizationType[kind.upper()])
    assert found.data.tobytes() == expected.tobytes()
    assert reader.fields["general.file_type"].contents() == {
        "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_0": 8, "q4_0": 2
    }[kind]  # fmt: skip


def test_rows_without_a_block_form_are_float16() -> None:
    raw, arrays = tiny_gpt2(n_embd=64, n_head=2, n_inner=56)
    (export,) = plan(checkpoint_of(raw, arrays), Options(targets=("gguf",), gguf_type=("q4_0",)))
    assert [note for note in export.notes if "2 matrices are stored as F16, h.0.mlp.c_proj.weight among" in note]
    assert export.checkpoint.weights["h.0.mlp.c_proj.weight"].dtype == np.float16


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("option", [None, "fp32", "bf16"])
def test_the_type_follows_dtype(dtype: Any, option: str | None) -> None:
    raw, arrays = tiny_gpt2()
    checkpoint = checkpoint_of(raw, {name: array.astype(dtype) for name, array in arrays.items()})
    (export,) = plan(checkpoint, Options(targets=("gguf",), dtype=option))
    assert export.path == {None: "gpt2-F16.gguf", "fp32": "gpt2-F32.gguf", "bf16": "gpt2-BF16.gguf"}[option]


@pytest.mark.parametrize(
    ("repo", "expected"),
    [("openai-community/gpt2-xl", "gpt2-xl"), ("a/..", "gpt2"), ("a/x y/é z", "z"), (None, "gpt2")],
)
def test_file_names(repo: str | None, expected: str) -> None:
    raw, arrays = tiny_gpt2()
    assert file_name(checkpoint_of(raw, arrays, repo=repo)) == expected


def test_split_files(tmp_path: Path) -> None:
    """Names and keys of llama.cpp's gguf-split; the first file has the metadata."""
    options = Options(targets=("gguf",), gguf_type=("f32",), max_shard_size=30_000)
    (export,) = plan(open_checkpoint(str(TINY)), options)
    write_planned(tmp_path, export.files)
    count = len(export.files)
    assert count > 2 and export.path == f"gpt2-F32-00001-of-{count:05d}.gguf"
    names = []
    for i, file in enumerate(export.files):
        reader = gguf.GGUFReader(tmp_path / file.path)
        assert reader.fields["split.no"].contents() == i and reader.fields["split.count"].contents() == count
        assert ("gpt2.block_count" in reader.fields) == (i == 0)
        assert sum(tensor.n_bytes for tensor in reader.tensors) <= 30_000
        names += [tensor.name for tensor in reader.tensors]
    assert len(names) == len({*names}) == 28 == reader.fields["split.tensors.count"].contents()


def test_tokenizer(tmp_path: Path) -> None:
    """Tokens, types and merges as in the checkpoint's files."""
    keys = {
        key: field.contents()
        for key, field in written(open_checkpoint(str(TRAINED)), tmp_path).fields.items()
        if key.startswith("tokenizer.")
    }
    vocabulary = json.loads((TRAINED / "encoder.json").read_text())
    merges = (TRAINED / "vocab.bpe").read_text().splitlines()[1:]
    assert keys["tokenizer.ggml.tokens"] == [token for token, _ in sorted(vocabulary.items(), key=lambda t: t[1])]
    assert keys["tokenizer.ggml.merges"] == [merge for merge in merges if merge]
    assert keys["tokenizer.ggml.token_type"] == [1] * 2002 + [3]
    assert keys["tokenizer.ggml.bos_token_id"] == keys["tokenizer.ggml.eos_token_id"] == 2002
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert keys["tokenizer.ggml.add_bos_token"] is False


def with_tokenizer(tmp_path: Path, raw: dict[str, Any], vocabulary: int = 97) -> Checkpoint:
    """A tiny model with this tokenizer.json."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    config, arrays = tiny_gpt2(vocab_size=vocabulary)
    return checkpoint_of(config, arrays, tokenizer={"tokenizer.json": str(path)})


def bpe(**fields: Any) -> dict[str, Any]:
    vocabulary = {chr(33 + i): i for i in range(60)} | {"AB": 60}
    raw: dict[str, Any] = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["A B"]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "added_tokens": [
            {"id": 61, "content": "  ", "special": False},
            {"id": 62, "content": "<|end|>", "special": True},
        ],
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] = [{**token, **flags} for token in raw["added_tokens"]]
    return {**raw, **fields}


def test_added_tokens_and_padding(tmp_path: Path) -> None:
    reader = written(with_tokenizer(tmp_path, bpe()), tmp_path)
    tokens, types = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[58:65] == ["[", "\\", "AB", "  ", "<|end|>", "[PAD63]", "[PAD64]"] and len(tokens) == 97
    assert types[58:65] == [1, 1, 1, 4, 3, 5, 5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer is Whitespace"),
        ({"pre_tokenizer": {**bpe()["pre_tokenizer"], "add_prefix_space": True}}, "GPT-2"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "WordLevel"),
    ],
)  # fmt: skip
def test_other_tokenizers_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        plan(with_tokenizer(tmp_path, bpe(**fields)), F32)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="tokens that the model lacks") as caught:
        plan(with_tokenizer(tmp_path, bpe(), vocabulary=62), F32)
    assert "1 tokens from id 62" in str(caught.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("gpt2", "text-classification"), "text-classification"),
        (Case("gpt2", keys={"activation_function": "relu"}), "relu"),
        (Case("gpt_neox", keys=witness.rope(1000.0, 0.375)), "3, not even"),
        (Case("gpt_neox", keys=witness.rope(1000.0, 0.0)), "is 0"),
        (
            Case(
                "gpt_neox",
                keys=witness.rope(40.0, 1.0, "yarn", factor=4.0, original_max_position_embeddings=10),
                name="yarn",
            ),
            "yarn",
        ),
    ],
    ids=str,
)
def test_models_that_llama_cpp_does_not_compute(case: Case, message: str, directory: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        plan(witness.checkpoint(case, directory), F32)


@pytest.mark.parametrize(("family", "reason"), [("gpt1", "normalises after"), ("gpt_neo", "nearby tokens")])
def test_families_that_llama_cpp_does_not_compute(family: str, reason: str, directory: Path, capsys: Any) -> None:
    witness.checkpoint(Case(family), directory)
    done = command(capsys, "hf", directory / str(Case(family)), "--to", "gguf", "-o", directory / "out")
    assert done.code == 4 and reason in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.1}, "--max-kl has no effect"),
        ({"max_kl": 0.1, "gguf_type": ("q4_0",), "verify": None}, "contradicts --no-verify"),
        ({"allow_nonfinite": True, "gguf_type": ("q8_0",)}, "--allow-nonfinite"),
    ],
)
def test_options_without_effect(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(open_checkpoint(str(TINY)), Options(targets=("gguf",), **options))


def test_options_of_both_quantised_targets() -> None:
    """--max-kl of a quantised GGUF file is no error of an ONNX graph beside it."""
    options = Options(targets=("onnx", "gguf"), gguf_type=("q4_0",), max_kl=0.5)
    assert len(pipeline.plan(str(TINY), options).exports) == 2
    with pytest.raises(UsageError, match="--block-size"):
        pipeline.plan(str(TINY), Options(targets=("onnx", "gguf"), gguf_type=("q4_0",), block_size=16))


def test_deterministic_and_streamed(tmp_path: Path) -> None:
    options = Options(targets=("gguf",), gguf_type=("f16", "q8_0"), verify=None)
    trees = [tree(Path(pipeline.convert(str(TRAINED), tmp_path / name, options).output)) for name in "ab"]
    assert trees[0] == trees[1]
    for export in plan(open_checkpoint(str(TRAINED)), options):
        assert trees[0][export.path] == content(export.files[0])
