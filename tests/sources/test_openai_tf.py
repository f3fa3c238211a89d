"""Resolving a path to a checkpoint, finding the files next to it, and refusing other formats by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError, UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources.openai_tf import FORMAT
from tests.containers import bundle_bytes as made
from tests.helpers import FIXTURES
from tests.sources.detection import claims

TINY = FIXTURES / "tiny-gpt2"


pytestmark = pytest.mark.usefixtures("no_hang")


def opened(path: str | Path, **options: Any) -> Source:
    return FORMAT.open(str(path), Options(**options))


def copied(tmp_path: Path, name: str = "openai-tf") -> Path:
    return Path(shutil.copytree(TINY / name, tmp_path / name))


def checkpoints(folder: Path, *names: str, state: str | None = None) -> Path:
    """A directory of one-tensor checkpoints; tensor ``x`` holds the position in ``names``."""
    for value, name in enumerate(names):
        made.write_bundle(folder / name, {"x": np.float32([value])})
    if state is not None:
        (folder / "checkpoint").write_text(state)
    return folder


def state_naming(path: str) -> str:
    return f'model_checkpoint_path: "{path}"\nall_model_checkpoint_paths: "{path}"\n'


def name_of(source: Source) -> str:
    return Path(source.path).name


# --- forms of paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside",
    ["", "checkpoint", "model.ckpt", "model.ckpt.index", "model.ckpt.data-00000-of-00001"],
    ids=lambda p: p or "dir",
)
def test_every_form_of_path_opens_the_same_checkpoint(inside: str) -> None:
    folder = TINY / "openai-tf"
    path = str(folder / inside) if inside else str(folder)
    assert claims(FORMAT, path)
    source = opened(path)
    assert (source.scheme, source.path) == ("openai-tf", str(folder / "model.ckpt"))
    assert len(source.tensors) == 28
    assert source.config == json.loads((folder / "hparams.json").read_text())
    assert source.config_path == str(folder / "hparams.json")
    data_file = [note for note in source.notes if "one data file of model.ckpt" in note]
    assert len(data_file) == (".data-" in inside)


def test_paths_relative_to_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY / "openai-tf")
    for path in ("model.ckpt", "checkpoint", "model.ckpt.index", ".", "./model.ckpt"):
        source = opened(path)
        assert source.config["n_vocab"] == 97
        assert len(source.tensors) == 28
        assert claims(FORMAT, path)


def test_files_lists_every_file_read(tmp_path: Path) -> None:
    folder = copied(tmp_path, "openai-tf-sharded")
    (folder / "encoder.json").write_text("{}")
    names = [os.path.basename(path) for path in opened(folder).files]
    shards = [f"model.ckpt.data-0000{i}-of-00002" for i in (0, 1)]
    assert names == ["model.ckpt.index", *shards, "hparams.json", "encoder.json"]


def test_one_shard_opens_the_whole_checkpoint() -> None:
    source = opened(TINY / "openai-tf-sharded/model.ckpt.data-00001-of-00002")
    assert len(source.tensors) == 28


def test_adams_slots_are_part_of_the_source() -> None:
    assert {"global_step", "beta1_power"} < set(opened(TINY / "openai-tf-adam").tensors)


def test_tokenizer_files_next_to_it(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    assert opened(folder).tokenizer == {}
    for name in ("encoder.json", "vocab.bpe", "merges.txt", "tokenizer.json", "other.json"):
        (folder / name).write_text("x")
    expected = {n: str(folder / n) for n in ("encoder.json", "vocab.bpe", "merges.txt", "tokenizer.json")}
    assert opened(folder / "checkpoint").tokenizer == expected


# --- several steps ------------------------------------------------------------------------------------------------


def test_the_checkpoint_file_names_the_latest(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path, "model-9", "model-10", "model-100", state=state_naming("model-10"))
    for path in (folder, folder / "checkpoint", folder / "model"):
        source = opened(path)
        assert name_of(source) == "model-10"
        assert "model-9" in source.notes[0]
        assert "named in the checkpoint file" in source.notes[0]


@pytest.mark.parametrize(
    "path",
    [
        "/home/someone/gpt-2/checkpoint/run1/model-10",
        "C:\\\\Users\\\\someone\\\\model-10",
        "../elsewhere/model-10",
        "\\155odel-10",
        "\\x6dodel-10",
    ],
)
def test_foreign_paths_are_resolved_next_to_the_file(tmp_path: Path, path: str) -> None:
    folder = checkpoints(tmp_path / "run", "model-10", "model-20", state=state_naming(path))
    checkpoints(tmp_path / "elsewhere", "model-10")
    source = opened(folder)
    assert source.path == str(folder / "model-10")
    assert opened(folder / "checkpoint").path == source.path


def test_relative_path_below_the_file(tmp_path: Path) -> None:
    checkpoints(tmp_path / "run1", "model-10", "model-20")
    (tmp_path / "checkpoint").write_text(state_naming("run1/model-10"))
    assert opened(tmp_path).path == str(tmp_path / "run1/model-10")
    assert opened(tmp_path / "checkpoint").path == str(tmp_path / "run1/model-10")


def test_names_that_tensorflow_escapes(tf: Any, tmp_path: Path) -> None:
    folder = checkpoints(tmp_path, "modèle'\"-1", "other-2")
    tf.compat.v1.train.update_checkpoint_state(str(folder), "modèle'\"-1")
    assert b"\\" in (folder / "checkpoint").read_bytes()
    assert name_of(opened(folder)) == "modèle'\"-1"


def test_without_a_checkpoint_file_the_highest_step(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path, "model-9", "model-10")
    source = opened(folder)
    assert name_of(source) == "model-10"
    assert "the highest step" in source.notes[0]


@pytest.mark.parametrize(
    "state", [state_naming("/old/model-7"), "", "garbage", "version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_checkpoint_file_without_a_usable_name(tmp_path: Path, state: str) -> None:
    folder = checkpoints(tmp_path, "model-9", "model-10", state=state)
    source = opened(folder)
    assert name_of(source) == "model-10"
    assert source.notes[0].startswith("checkpoint: ")
    with pytest.raises(InputError) as caught:  # an explicit checkpoint file must name a checkpoint
        opened(folder / "checkpoint")
    assert caught.value.found == "model-10, model-9"


@pytest.mark.parametrize("inside", ["", "checkpoint", "model"], ids=["dir", "file", "stem"])
def test_the_requested_step(tmp_path: Path, inside: str) -> None:
    folder = checkpoints(tmp_path, "model-9", "model-10", state=state_naming("model-10"))
    assert name_of(opened(folder / inside, step=9)) == "model-9"
    with pytest.raises(InputError, match="no checkpoint of step 11") as caught:
        opened(folder / inside, step=11)
    assert caught.value.found == "steps 9, 10"


def test_a_step_that_the_path_contradicts(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path, "model-9", "model.ckpt")
    assert name_of(opened(folder / "model-9.index", step=9)) == "model-9"
    for name in ("model-9", "model.ckpt"):
        with pytest.raises(UsageError, match="--step 10"):
            opened(folder / name, step=10)


def test_same_step_of_two_runs(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path, "best-10", "model-10", "model-20")
    with pytest.raises(InputError, match="several checkpoints of step 10: best-10, model-10"):
        opened(folder, step=10)
    with pytest.raises(InputError, match="several checkpoints in this directory"):
        opened(folder)
    (folder / "checkpoint").write_text(state_naming("model-20"))
    assert name_of(opened(folder, step=10)) == "model-10"
    assert name_of(opened(folder)) == "model-20"


def test_several_without_step(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path, "a.ckpt", "b.ckpt")
    with pytest.raises(InputError, match="several checkpoints") as caught:
        opened(folder)
    assert caught.value.found == "a.ckpt, b.ckpt"
    assert caught.value.hint == "pass the prefix of one of them"
    assert claims(FORMAT, folder)


def test_parent_of_one_run(tmp_path: Path) -> None:
    checkpoints(tmp_path / "checkpoint" / "run1", "model-9", "model-10", state=state_naming("model-9"))
    checkpoints(tmp_path / "checkpoint" / ".ipynb_checkpoints", "model-1")
    (tmp_path / "checkpoint" / "logs").mkdir()
    parent = tmp_path / "checkpoint"
    assert claims(FORMAT, parent)
    source = opened(parent)
    assert source.path == str(parent / "run1" / "model-9")
    assert source.notes[0] == "run1 was read, the only run in the directory"
    assert name_of(opened(parent, step=10)) == "model-10"
    checkpoints(parent / "run2", "model-1")
    with pytest.raises(InputError, match="several directories") as caught:
        opened(parent)
    assert caught.value.found == "run1, run2"


# --- hparams ------------------------------------------------------------------------------------------------------


def test_hparams_missing(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "hparams.json").unlink()
    source = opened(folder)
    assert (source.config, source.config_path) == ({}, None)


def test_hparams_given(tmp_path: Path) -> None:
    given_file = tmp_path / "mine.json"
    given_file.write_text('{"n_head": 5}')
    source = opened(copied(tmp_path), hparams=str(given_file))
    assert (source.config, source.config_path) == ({"n_head": 5}, str(given_file))
    with pytest.raises(InputError, match="missing"):
        opened(TINY / "openai-tf", hparams=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"{}", "empty"),
        (b"n_head = 12", "not JSON|text"),
        (b'{"n_head": 12', "not JSON"),
        (b'{"n_head": NaN}', "NaN"),
        (b'{"n_head": 1e999}', "out of range"),
        (b'{"n_head": 1' + b"0" * 5000 + b"}", "out of range"),
        (b'{"n_head": 1, "n_head": 2}', "n_head"),
        (b"[12]", "wrong kind"),
        (b"12", "wrong kind"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "deep"),
        (b'{"a": ' * 50_000 + b"1" + b"}" * 50_000, "deep"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "too large"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"<!doctype html>", "HTML"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_hparams(tmp_path: Path, content: bytes, words: str) -> None:
    folder = copied(tmp_path)
    (folder / "hparams.json").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        opened(folder)
    assert caught.value.path == str(folder / "hparams.json")


# --- other formats, refused by name -------------------------------------------------------------------------------


def test_object_checkpoint_of_tensorflow_2(tf: Any, tmp_path: Path) -> None:
    prefix = tf.train.Checkpoint(w=tf.Variable([1.0])).save(str(tmp_path / "ckpt"))
    for path in (prefix, tmp_path):
        with pytest.raises(UnsupportedError, match="TensorFlow 2 object checkpoint") as caught:
            opened(path)
    assert "w/.ATTRIBUTES/VARIABLE_VALUE" in (caught.value.found or "")


@pytest.mark.parametrize("name", ["_CHECKPOINTABLE_OBJECT_GRAPH", "w/.ATTRIBUTES/VARIABLE_VALUE"])
def test_either_sign_of_an_object_checkpoint(tmp_path: Path, name: str) -> None:
    made.write_bundle(tmp_path / "m", {name: np.float32([1])})
    with pytest.raises(UnsupportedError, match="object checkpoint"):
        opened(tmp_path / "m")


def test_version_1_checkpoint(tf: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt-5"
    tf.raw_ops.Save(filename=str(path), tensor_names=["x"], data=[tf.constant([1.0])])
    assert not os.path.exists(f"{path}.index")
    shutil.copytree(tmp_path, tmp_path.parent / "sharded", dirs_exist_ok=True)
    (tmp_path / "model.ckpt-5.meta").write_bytes(b"\n\0")
    (tmp_path / "checkpoint").write_text(state_naming("model.ckpt-5"))
    shard = tmp_path.parent / "sharded" / "model.ckpt-5"
    os.rename(shard, f"{shard}-00000-of-00001")
    for given_path in (path, tmp_path, shard):
        assert given_path == shard or claims(FORMAT, given_path)
        with pytest.raises(UnsupportedError, match="version 1"):
            opened(given_path)


def test_saved_model(tf: Any, tmp_path: Path) -> None:
    module = tf.Module()
    module.w = tf.Variable([1.0])
    tf.saved_model.save(module, str(tmp_path / "saved"))
    for path in (tmp_path / "saved", tmp_path / "saved" / "saved_model.pb"):
        assert claims(FORMAT, path)
        with pytest.raises(UnsupportedError, match="SavedModel"):
            opened(path)
    with pytest.raises(UnsupportedError, match="object checkpoint"):
        opened(tmp_path / "saved" / "variables")


def test_meta_alone(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt.meta").write_bytes(b"\n\0")
    for path in (tmp_path / "model.ckpt.meta", tmp_path / "model.ckpt", tmp_path):
        with pytest.raises(UnsupportedError, match="graph, not weights"):
            opened(path)
    made.write_bundle(tmp_path / "model.ckpt", {"x": np.float32([1])})
    with pytest.raises(UnsupportedError, match="graph, not weights") as caught:
        opened(tmp_path / "model.ckpt.meta")
    assert caught.value.hint == f"pass {tmp_path / 'model.ckpt'}"


def test_index_missing(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "model.ckpt.index").unlink()
    for inside in ("model.ckpt", "model.ckpt.index", "model.ckpt.data-00000-of-00001", ""):
        with pytest.raises(InputError, match="the index is missing") as caught:
            opened(folder / inside if inside else folder)
        assert caught.value.path == str(folder / "model.ckpt.index")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"), (b"<html>", "HTML page")],
    ids=["empty", "lfs", "html"],
)
@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_another_file_in_its_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    folder = copied(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        opened(folder)
    assert caught.value.path == str(folder / name)


def test_no_checkpoint(tmp_path: Path) -> None:
    checkpoints(tmp_path, "model-1")
    with pytest.raises(InputError, match="no such file") as caught:
        opened(tmp_path / "modle")
    assert caught.value.found == "checkpoints model-1"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found an empty directory"):
        opened(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"found notes\.txt"):
        opened(tmp_path / "empty")
    with pytest.raises(InputError, match="text file that begins with 'hello'"):
        opened(tmp_path / "empty" / "notes.txt")
    for path in ("", "nul\0byte", "/none/at/all", "x" * 5000):
        with pytest.raises(InputError):
            opened(path)


SPECIAL: dict[str, Callable[[str], None]] = {
    "fifo": os.mkfifo,
    "device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("name", ["checkpoint", "hparams.json", "encoder.json", "model.ckpt.index"])
def test_special_files_are_refused_unopened(tmp_path: Path, name: str, make: str) -> None:
    folder = copied(tmp_path)
    (folder / name).unlink(missing_ok=True)
    SPECIAL[make](str(folder / name))
    claims(FORMAT, folder)
    claims(FORMAT, folder / name)
    with pytest.raises(UnsafeInputError):
        opened(folder)
    if name == "checkpoint":
        with pytest.raises(UnsafeInputError):
            opened(folder / name)


@pytest.mark.parametrize("make", SPECIAL)
def test_special_file_as_the_path_itself(tmp_path: Path, make: str) -> None:
    SPECIAL[make](str(tmp_path / "model.ckpt"))
    assert not claims(FORMAT, tmp_path / "model.ckpt")
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        opened(tmp_path / "model.ckpt")


def test_unreadable_directory() -> None:
    import tempfile

    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.seteuid(65534)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0)
            with pytest.raises(InputError, match="cannot be read"):
                opened(folder)
            os.chmod(folder, 0o700)
    finally:
        os.seteuid(0)


# --- detection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["hf-bin", "hf-safetensors", "hf-safetensors-sharded", "hf-bin-sharded"])
def test_other_formats_are_not_claimed(folder: str) -> None:
    assert not claims(FORMAT, TINY / folder)
    for path in (TINY / folder).iterdir():
        assert not claims(FORMAT, path)


def test_a_checkpoint_file_of_another_program_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"\x82\xa4step\x01")  # Flax writes MessagePack under that name
    assert not claims(FORMAT, tmp_path)
    assert not claims(FORMAT, tmp_path / "checkpoint")
    (tmp_path / "checkpoint").write_text(state_naming("model-1"))
    assert claims(FORMAT, tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / "renamed")
    assert claims(FORMAT, tmp_path / "renamed")


def test_gpt1_is_left_to_its_own_reader(tmp_path: Path) -> None:
    for name in ("params_0.npy", "params_shapes.json", "encoder_bpe_40000.json"):
        (tmp_path / name).write_bytes(b"")
    assert not claims(FORMAT, tmp_path)
    assert not claims(FORMAT, tmp_path / "params_0.npy")


def test_a_file_named_index_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".index").write_bytes(b"")
    assert not claims(FORMAT, tmp_path)
    with pytest.raises(InputError, match="no TensorFlow checkpoint"):
        opened(tmp_path)


def test_missing_paths_are_not_claimed(tmp_path: Path) -> None:
    for name in ("", "gpt2", "openai/gpt2", "model.ckpt.index", "model.meta", "checkpoint", "nul\0byte"):
        assert not claims(FORMAT, tmp_path / name if name else tmp_path)
        assert not claims(FORMAT, name)


@given(st.binary(max_size=120).map(lambda tail: b"model_checkpoint_path: " + tail) | st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_checkpoint_file_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "state"
    if not folder.exists():
        checkpoints(folder, "model-1", "model-2")
    (folder / "checkpoint").write_bytes(content)
    assert name_of(opened(folder)) in ("model-1", "model-2")
    try:
        opened(folder / "checkpoint")
    except GptConvertError as error:
        assert str(error)
