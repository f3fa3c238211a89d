"""GPT-1's ten files: split and named correctly, and refused if the set is incomplete or damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.options import Options
from gptconvert.model.schemes import Scheme
from gptconvert.model.tensors import Stored
from gptconvert.sources import openai_gpt1 as gpt1_npy
from gptconvert.sources import openai_tf
from tests.families import witness
from tests.helpers import NO_RELEASED_FILES, ROOT
from tests.sources.originals import BUG, NOISE, ORIGINALS, copied, difference, opened, plant, understood

FOLDER = ORIGINALS / "gpt1"
REAL = ROOT.parent / "shared" / "data" / "openai-gpt1"

pytestmark = pytest.mark.usefixtures("no_hang")


def test_the_logits_match_transformers() -> None:
    assert difference(understood(FOLDER, n_head=3), FOLDER) < NOISE


@pytest.mark.skipif(not REAL.exists(), reason=NO_RELEASED_FILES)
def test_the_logits_match_openais() -> None:
    checkpoint = understood(REAL, n_head=4)
    oracle = np.load(REAL / "oracle.npz")
    found = witness.our_outputs(witness.reference(checkpoint), {"input_ids": oracle["ids"].astype(np.int64)})
    expected = oracle["logits_last"]
    assert np.abs(found["logits"][:, -4:] - expected).max() < NOISE * np.abs(expected).max()
    assert sorted(checkpoint.source.tokenizer) == ["encoder_bpe_40000.json", "vocab_40000.bpe"]


@pytest.mark.parametrize("inside", ["", "params_3.npy", "params_shapes.json"])
def test_paths(inside: str) -> None:
    path = str(FOLDER / inside) if inside else str(FOLDER)
    assert gpt1_npy.recognises(path)
    assert opened(path).path == str(FOLDER)
    assert openai_tf.FORMAT.open(path, Options()).scheme == "openai-gpt1"


def test_paths_relative_to_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    for path in (".", "params_0.npy"):
        assert len(opened(path).unnamed) == 26


def test_tensors_straddle_files_and_are_copied_raw() -> None:
    source = opened(FOLDER)
    flat = np.concatenate([np.load(FOLDER / f"params_{i}.npy") for i in range(10)])
    position = 0
    assert not source.tensors
    for tensor in source.unnamed:
        assert isinstance(tensor, Stored)
        assert tensor.segments() is not None
        assert np.array_equal(tensor.read().reshape(-1), flat[position : position + tensor.size])
        position += tensor.size
    assert position == flat.size
    several = [t for t in source.unnamed if isinstance(t, Stored) and len({p.path for p in t.parts}) > 1]
    assert len(several) >= 9
    assert len(source.files) == 11


def test_big_endian_and_fortran_order_work(tmp_path: Path) -> None:
    folder = copied(tmp_path, "gpt1")
    for i in range(10):
        np.save(folder / f"params_{i}.npy", np.asfortranarray(np.load(folder / f"params_{i}.npy").astype(">f4")))
    assert difference(understood(folder, n_head=3), FOLDER) < NOISE


def test_sizes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text('{"n_head": 3, "n_embd": 24}')
    checkpoint = understood(FOLDER, Options(hparams=str(tmp_path / "sizes.json")))
    assert (checkpoint.config.n_head, checkpoint.config.n_inner) == (3, 96)


def damage_npy(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def damage(folder: Path) -> None:
        array = change(np.load(folder / name))
        np.save(folder / name, array, allow_pickle=True)

    return damage


def shapes(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "params_shapes.json").write_text(text)

    return damage


def cut(folder: Path) -> None:
    path = folder / "params_4.npy"
    path.write_bytes(path.read_bytes()[:-10])


def pipe(folder: Path) -> None:
    (folder / "params_4.npy").unlink()
    os.mkfifo(folder / "params_4.npy")


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda f: (f / "params_7.npy").unlink(), InputError, r"missing: params_7\.npy"),
        (lambda f: (f / "params_shapes.json").unlink(), InputError, r"missing: params_shapes\.json"),
        (lambda f: np.save(f / "params_10.npy", np.ones(3)), InputError, r"unknown: params_10\.npy"),
        (damage_npy("params_2.npy", lambda a: a[:-1]), InputError, r"expected \d+ values, found \d+ values \("),
        (damage_npy("params_2.npy", lambda a: np.tile(a, 2)), InputError, "total length"),
        (damage_npy("params_2.npy", lambda a: a.astype(object)), UnsafeInputError, "nothing executed"),
        (damage_npy("params_2.npy", lambda a: a.astype("<f8")), InputError, "different element types"),
        (damage_npy("params_2.npy", lambda a: a.astype("<i4")), UnsupportedError, "not floating point"),
        (damage_npy("params_2.npy", lambda a: a.reshape(-1, 1)), InputError, "expected one axis"),
        (cut, InputError, "file is truncated"),
        (pipe, UnsafeInputError, "named pipe"),
        (shapes("[[40, 24], [97, 24]]"), InputError, "total length .* does not match"),
        (shapes("[[17736]]"), InputError, "does not match any number of layers"),
        (shapes('{"a": 1}'), InputError, "a list of shapes"),
        (shapes("[[1.5]]"), InputError, "entry 0"),
        (shapes("[[0]]"), InputError, "entry 0"),
        (shapes("[[4294967296]]"), InputError, "entry 0"),
        (shapes("[["), InputError, "not JSON"),
        (shapes(json.dumps([[99999, 24]] * 26)), InputError, "total length .* does not match"),
    ],
)
def test_36_37_bad_sets(
    tmp_path: Path, damage: Callable[[Path], object], kind: type[GptConvertError], words: str
) -> None:
    folder = copied(tmp_path, "gpt1")
    damage(folder)
    with pytest.raises(kind, match=words):
        understood(folder, n_head=3)


def test_36_all_missing_files_are_listed(tmp_path: Path) -> None:
    folder = copied(tmp_path, "gpt1")
    for i in (0, 4, 9):
        (folder / f"params_{i}.npy").unlink()
    with pytest.raises(InputError, match=r"params_0\.npy, params_4\.npy, params_9\.npy") as caught:
        opened(folder)
    assert "10 files" in str(caught.value.expected)


def test_fine_tuned_models_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "best_params.jl").write_bytes(b"\x80\x03cos\nsystem\n(S'true'\ntR.")
    for path in (tmp_path, tmp_path / "best_params.jl"):
        with pytest.raises(UnsupportedError, match=r"fine-tuned OpenAI GPT-1.*pickle") as caught:
            opened(path)
        assert "params_0.npy" in str(caught.value.hint)


def test_the_hint_for_fine_tuned_models_works(tmp_path: Path) -> None:
    """Following the hint turns the list that the fine-tuning script saves into a readable set of files."""
    positions, tokens, *blocks = [tensor.read() for tensor in opened(FOLDER).unnamed]
    special = np.zeros((3, 24), np.float32)
    saved = [np.concatenate([tokens, special, positions]), *blocks, np.ones((24, 1)), np.ones(1)]
    n_ctx = 40
    we, *rest = saved
    arrays = [we[-n_ctx:], we[:-n_ctx], *rest[:-2]]
    (tmp_path / "params_shapes.json").write_text(json.dumps([a.shape for a in arrays]))
    for i, part in enumerate(np.array_split(np.concatenate([a.ravel() for a in arrays]), 10)):
        np.save(tmp_path / f"params_{i}.npy", part)
    checkpoint = understood(tmp_path, n_head=3, trim_vocab=97)
    assert difference(checkpoint, FOLDER) < NOISE


def test_names_follow_the_order_of_the_arrays() -> None:
    tensors = understood(FOLDER, n_head=3).source.tensors
    assert [*tensors][:4] == ["positions_embed", "tokens_embed", "h0/attn/c_attn/w", "h0/attn/c_attn/b"]
    assert [*tensors][-2:] == ["h1/ln_2/g", "h1/ln_2/b"]
    assert [*tensors.values()] == [*opened(FOLDER).unnamed]


def plant_order(monkeypatch: pytest.MonkeyPatch, exchanged: Mapping[str, str]) -> None:
    """Swap rows of the name table."""

    def planted(table: Scheme) -> Scheme:
        rows = {row.names[0]: row for row in table.rows}
        return replace(table, rows=tuple(rows[exchanged.get(name, name)] for name in rows))

    plant(monkeypatch, "openai-gpt1", planted)


def test_planted_bug_of_swapped_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ([f"h{{i}}/ln_{n}/{kind}" for kind in "gb"] for n in (1, 2))
    plant_order(monkeypatch, dict(zip([*first, *second], [*second, *first], strict=True)))
    assert difference(understood(FOLDER, n_head=3), FOLDER) > BUG


def test_planted_bug_of_swapped_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_order(monkeypatch, {"positions_embed": "tokens_embed", "tokens_embed": "positions_embed"})
    config = understood(FOLDER, n_head=3).config
    assert (config.vocab_size, config.n_ctx) == (40, 97)  # the golden logits have 97 columns
