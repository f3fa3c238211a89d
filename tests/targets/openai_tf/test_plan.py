"""The openai-tf target: TensorFlow restores its files, they read back bit for bit, and losses are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert import pipeline
from gptconvert.errors import UnsupportedError, VerificationError
from gptconvert.families.registry import FAMILIES
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.encodings import cast_to
from gptconvert.model.options import Options
from gptconvert.pipeline import open_checkpoint
from gptconvert.targets.openai_tf.plan import FOLDER, plan, why_not
from tests.commands import command
from tests.helpers import FIXTURES, NO_RELEASED_FILES, REAL_GPT2, checkpoint_of, tiny_gpt2, write_planned
from tests.sources.foreign import ORIGINALS, same_weights
from tests.verify.exports import report_on

TINY = FIXTURES / "tiny-gpt2"
REAL_GPT1 = REAL_GPT2.parent / "openai-gpt1"
OPENAI = Options(targets=("openai-tf",))


def gpt2(**config: object) -> Checkpoint:
    raw, arrays = tiny_gpt2(n_inner=None, **config)
    return checkpoint_of(raw, arrays)


def gpt1(**config: object) -> Checkpoint:
    """A tiny GPT-1 with random weights, in Hugging Face's layout."""
    raw = {"model_type": "openai-gpt", "vocab_size": 97, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}
    shapes: dict[str, tuple[int, ...]] = {"tokens_embed.weight": (97, 24), "positions_embed.weight": (40, 24)}
    for i in range(2):
        matrices = {"attn.c_attn": (24, 72), "attn.c_proj": (24, 24), "mlp.c_fc": (24, 96), "mlp.c_proj": (96, 24)}
        for name, shape in matrices.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        shapes |= {f"h.{i}.{norm}.{part}": (24,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    random = np.random.default_rng(0)
    arrays = {f"transformer.{n}": random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return checkpoint_of({**raw, **config}, arrays)


def published(source: Path | str, output: Path, targets: tuple[str, ...] = ("openai-tf",), **request: Any) -> Path:
    """Convert, verify and publish a source; return its folder of OpenAI's files."""
    checkpoint = open_checkpoint(str(source), Options(**request))
    pipeline.convert(checkpoint, str(output), Options(targets=targets))
    return output / FOLDER


@pytest.mark.skipif(not REAL_GPT2.exists(), reason=NO_RELEASED_FILES)
def test_real_gpt2_round_trips_byte_for_byte(tmp_path: Path) -> None:
    folder = published(REAL_GPT2, tmp_path / "back")
    names = ["checkpoint", "encoder.json", "model.ckpt.data-00000-of-00001", "model.ckpt.index", "vocab.bpe"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "hparams.json"])
    for name in names:
        assert (folder / name).read_bytes() == (REAL_GPT2 / name).read_bytes(), name
    assert json.loads((folder / "hparams.json").read_text()) == json.loads((REAL_GPT2 / "hparams.json").read_text())


@pytest.mark.skipif(not REAL_GPT1.exists(), reason=NO_RELEASED_FILES)
def test_real_gpt1_round_trips_byte_for_byte(tmp_path: Path) -> None:
    folder = published(REAL_GPT1, tmp_path / "back", n_head=4)
    for path in REAL_GPT1.glob("[!o]*.*"):
        if path.name != "README.md":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((folder / "hparams.json").read_text())["n_head"] == 4  # the default, 32 / 64, would be wrong


@pytest.mark.parametrize(
    "name", ["openai-tf", "openai-tf-sharded", "openai-tf-bf16", "openai-tf-f16", "openai-tf-adam"]
)
def test_tensorflows_files_round_trip(tmp_path: Path, name: str) -> None:
    """Any layout is converted to the plain one, as the Saver writes these weights."""
    folder = published(TINY / name, tmp_path / "back")
    if name in ("openai-tf", "openai-tf-sharded"):
        for part in ("model.ckpt.data-00000-of-00001", "model.ckpt.index", "checkpoint"):
            assert (folder / part).read_bytes() == (TINY / "openai-tf" / part).read_bytes(), part
    assert same_weights(open_checkpoint(str(folder)), open_checkpoint(str(TINY / name)))


@pytest.mark.parametrize("source", ["hf-safetensors", "hf-bin", "hf-bf16"])
def test_round_trip_through_openais_layout(tmp_path: Path, source: str) -> None:
    """Hugging Face → OpenAI → Hugging Face gives the same file."""
    folder = published(TINY / source, tmp_path / "first", ("openai-tf", "safetensors"))
    pipeline.convert(open_checkpoint(str(folder)), str(tmp_path / "back"), Options(targets=("safetensors",)))
    first, back = (tmp_path / where / "model.safetensors" for where in ("first", "back"))
    assert first.read_bytes() == back.read_bytes()


@pytest.mark.parametrize(
    ("source", "request_"),
    [
        ("llmc/gpt2_bf16.bin", {}),
        ("h5-gpt2", {}),
        ("flax-gpt2", {}),
        ("megatron", {}),
        ("nanogpt", {"activation": "tanh"}),
    ],
)
def test_from_every_trainer(tmp_path: Path, source: str, request_: dict[str, Any]) -> None:
    """Linear layers are transposed, so checksums cover computed bytes."""
    folder = published(ORIGINALS / source, tmp_path / "back", **request_)
    original = open_checkpoint(str(ORIGINALS / source), Options(**request_))
    assert same_weights(open_checkpoint(str(folder), Options(n_head=3)), original)


def test_tensorflow_restores_it(tmp_path: Path, tf: Any) -> None:
    """With tf.train.load_checkpoint and with the Saver, from a transposed source."""
    folder = published(ORIGINALS / "llmc" / "gpt2_fp32.bin", tmp_path / "back")
    assert tf.train.latest_checkpoint(str(folder)) == str(folder / "model.ckpt")
    reader = tf.train.load_checkpoint(str(folder))
    shapes = reader.get_variable_to_shape_map()
    assert shapes["model/h1/mlp/c_fc/w"] == [1, 24, 96]
    checkpoint = open_checkpoint(str(ORIGINALS / "llmc" / "gpt2_fp32.bin"))
    weight = checkpoint.weights["h.1.mlp.c_fc.weight"].read()
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        made = {n: v1.get_variable(n, shape, tf.float32, use_resource=False) for n, shape in shapes.items()}
        v1.train.Saver().restore(session, str(folder / "model.ckpt"))
        restored = {name: session.run(variable) for name, variable in made.items()}
    assert np.array_equal(restored["model/h1/mlp/c_fc/w"][0].T, weight)
    assert all(np.array_equal(restored[name], reader.get_tensor(name)) for name in shapes)
    assert len(shapes) == 28


def test_gpt1_is_stored_as_numpy_arrays(tmp_path: Path) -> None:
    """Read as by the original program: load, concatenate, split by shapes."""
    checkpoint = gpt1()
    write_planned(tmp_path, plan_without_tokenizer(checkpoint))
    parts = [np.load(tmp_path / FOLDER / f"params_{i}.npy") for i in range(10)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    shapes = json.loads((tmp_path / FOLDER / "params_shapes.json").read_text())
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    arrays = [a.reshape(s) for a, s in zip(np.split(np.concatenate(parts), ends)[:-1], shapes, strict=True)]
    assert arrays[0].shape == (40, 24) and arrays[1].shape == (97, 24)  # positions first
    assert np.array_equal(arrays[2][0].T, checkpoint.weights["h.0.attn.c_attn.weight"].read())
    assert np.array_equal(arrays[14 + 6][0].T, checkpoint.weights["h.1.mlp.c_fc.weight"].read())
    assert np.array_equal(arrays[-1], checkpoint.weights["h.1.ln_2.bias"].read())


def plan_without_tokenizer(checkpoint: Checkpoint, **options: Any) -> Any:
    return plan(checkpoint, Options(**options))[0].files


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_gpt1_of_another_type_reads_back(tmp_path: Path, dtype: str) -> None:
    """Cast tensors are computed, including those that straddle two files."""
    checkpoint = cast_to(gpt1(), dtype)
    write_planned(tmp_path, plan_without_tokenizer(checkpoint))
    found = open_checkpoint(str(tmp_path / FOLDER))
    assert found.config.n_head == 3  # from hparams.json, since 24 / 64 heads is invalid
    assert same_weights(found, checkpoint)


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [
        (lambda: checkpoint_of(*tiny_gpt2()), "n_inner is 56, not 96"),
        (lambda: gpt2(activation_function="gelu"), "activation is 'gelu_erf'"),
        (lambda: gpt2(layer_norm_epsilon=1e-6), "norm_eps is 1e-06"),
        (lambda: gpt2(tie_word_embeddings=False), "tied_head is False"),
        (lambda: gpt2(scale_attn_weights=False), "scores are not scaled"),
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "scores are not scaled"),
        (lambda: gpt1(afn="relu"), "activation is 'relu'"),
        (lambda: cast_to(gpt1(), "bf16"), "bfloat16"),
    ],
)
def test_configurations_the_format_cannot_express_are_rejected(checkpoint: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan(checkpoint(), Options())
    assert reason in str(caught.value)


def test_all_reasons_at_once() -> None:
    checkpoint = gpt2(activation_function="relu", layer_norm_epsilon=1e-6, tie_word_embeddings=False)
    task = dataclasses.replace(checkpoint.config, task="text-classification", n_labels=2)
    assert len(why_not(dataclasses.replace(checkpoint, config=task))) == 4


def test_other_families_are_rejected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = command(capsys, "hf", ORIGINALS / "flax-gpt-neo", "--to", "openai-tf", "-o", tmp_path / "out", "--json")
    assert done.code == 4
    assert "gpt_neo cannot be written" in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_nanogpt_with_erf_is_rejected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = command(capsys, "nanogpt", ORIGINALS / "nanogpt", "--to", "openai-tf", "-o", tmp_path / "out", "--json")
    assert (done.code, (tmp_path / "out").exists()) == (4, False)
    assert "gelu_erf" in done.json["error"]["message"]


def damage_shape(folder: Path) -> None:
    hparams = json.loads((folder / "hparams.json").read_text())
    (folder / "hparams.json").write_text(json.dumps({**hparams, "n_head": 4}))


def damage_bytes(folder: Path) -> None:
    data = folder / "model.ckpt.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)


def swap_layers(folder: Path) -> None:
    """Swap the bytes of a weight in h0 and h1."""
    data = folder / "model.ckpt.index"
    content = data.read_bytes()
    data.write_bytes(content)
    found = open_checkpoint(str(folder))
    a, b = (found.source.tensors[f"model/h{i}/mlp/c_fc/w"].segments()[0] for i in (0, 1))  # type: ignore[index]
    path = folder / "model.ckpt.data-00000-of-00001"
    weights = bytearray(path.read_bytes())
    first, second = bytes(weights[a.offset : a.end]), bytes(weights[b.offset : b.end])
    weights[a.offset : a.end], weights[b.offset : b.end] = second, first
    path.write_bytes(weights)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(damage_shape, "n_head is 4"), (damage_bytes, "differs from its source"), (swap_layers, "h.1.mlp.c_fc.weight")],
)
def test_planted_damage_is_found(tmp_path: Path, damage: Any, words: str) -> None:
    folder = published(TINY / "hf-safetensors", tmp_path / "out")
    checkpoint = open_checkpoint(str(TINY / "hf-safetensors"))
    assert report_on(checkpoint, tmp_path / "out").passed
    assert report_on(checkpoint, folder).passed
    damage(folder)
    report = report_on(checkpoint, folder)
    assert not report.passed
    assert words in report.table()


@pytest.mark.parametrize("bug", ["order", "transpose"])
def test_writer_bug_prevents_publication(tmp_path: Path, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Square projections written untransposed, or two swapped tensors, fail verification."""
    from gptconvert.targets.openai_tf import plan as openai_tf

    original = openai_tf._stored

    def wrong(bound: Any, checkpoint: Checkpoint) -> Any:
        name, tensor, canonical = original(bound, checkpoint)
        if bug == "transpose" and "c_proj/w" in name and tensor.shape[1] == tensor.shape[2]:
            from gptconvert.model.tensors import LeadingAxis
            from gptconvert.model.transforms import transpose

            tensor = LeadingAxis(transpose(tensor.base))  # type: ignore[attr-defined]
        if bug == "order" and name.endswith("ln_1/g"):
            name = name.replace("ln_1", "ln_2")
        elif bug == "order" and name.endswith("ln_2/g"):
            name = name.replace("ln_2", "ln_1")
        return name, tensor, canonical

    monkeypatch.setattr(openai_tf, "_stored", wrong)
    with pytest.raises(VerificationError):
        pipeline.convert(open_checkpoint(str(TINY / "hf-safetensors")), str(tmp_path / "out"), OPENAI)
    assert not (tmp_path / "out").exists()


def test_formats_lists_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    found = command(capsys, "formats", "--json").json
    able = {f["name"]: "openai-tf" in f["targets"] for f in found["families"]}
    assert able == {family.name: family.name in ("gpt1", "gpt2") for family in FAMILIES}
    sources = next(f["sources"] for f in found["families"] if f["name"] == "gpt2")
    assert {"nanogpt", "llmc", "megatron"} <= set(sources)


def tokenizer_with(tmp_path: Path, added: dict[str, int]) -> dict[str, str]:
    """GPT-2's byte alphabet and end token, with tokens added in fine-tuning."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = [*bytes_to_unicode().values(), "th", "<|endoftext|>"]
    files = {
        "vocab.json": json.dumps({symbol: number for number, symbol in enumerate(symbols)}),
        "merges.txt": "#version: 0.2\nt h\n",
        "added_tokens.json": json.dumps(added),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return {name: str(tmp_path / name) for name in files}


def test_added_tokens_are_decoded_by_openais_code(tmp_path: Path) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    added = {"<name> é": 258, "你": 259}
    raw, arrays = tiny_gpt2(n_inner=None, vocab_size=260, bos_token_id=257, eos_token_id=257)
    checkpoint = checkpoint_of(raw, arrays, tokenizer=tokenizer_with(tmp_path, added))
    [export] = plan(checkpoint, OPENAI)
    files = {file.path: file.head for file in export.files}
    decoder = {number: symbol for symbol, number in json.loads(files["openai-tf/encoder.json"]).items()}
    back = {character: byte for byte, character in bytes_to_unicode().items()}  # as in OpenAI's src/encoder.py
    for content, number in added.items():
        assert bytearray(back[character] for character in decoder[number]).decode() == content
    assert len(decoder) == 260
    assert [note for note in export.notes if "2 added tokens are in encoder.json" in note] == list(export.notes)
    assert set(export.notes) <= set(pipeline.plan(checkpoint, OPENAI).notes)


def test_without_added_tokens_the_vocabulary_is_copied(tmp_path: Path) -> None:
    found = tokenizer_with(tmp_path, {})
    raw, arrays = tiny_gpt2(n_inner=None, vocab_size=258, bos_token_id=257, eos_token_id=257)
    [export] = plan(checkpoint_of(raw, arrays, tokenizer=found), OPENAI)
    files = {file.path: file.head for file in export.files}
    assert files["openai-tf/encoder.json"] == Path(found["vocab.json"]).read_bytes()
    assert export.notes == ()


def test_a_tokenizer_that_openais_code_cannot_read_is_noted(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    raw, arrays = tiny_gpt2(n_inner=None, tokenizer_class="BertTokenizer")
    checkpoint = checkpoint_of(raw, arrays, tokenizer={"vocab.txt": str(tmp_path / "vocab.txt")})
    [export] = plan(checkpoint, OPENAI)
    assert export.notes == ("OpenAI's format has no files for this tokenizer (tokenizer.json, vocab.txt)",)
