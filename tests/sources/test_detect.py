"""Detection of a path's format, and the errors for paths that are not readable checkpoints."""

from __future__ import annotations

import builtins
import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError, UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources.detect import FILES, FORMATS, LOOKALIKES, open_source
from gptconvert.sources.hf import format as hf
from tests.helpers import FIXTURES, NO_RELEASED_FILES, REAL_GPT2
from tests.sources.detection import claimants

PLAIN = Options()
TINY = FIXTURES / "tiny-gpt2"
CHECKPOINTS = {
    **dict.fromkeys(("hf-bare", "hf-bin", "hf-bin-legacy", "hf-bin-sharded", "hf-safetensors-sharded"), "hf"),
    **dict.fromkeys(("openai-tf", "openai-tf-sharded", "openai-tf-partitioned", "openai-tf-adam"), "openai-tf"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_directories_are_distinguished(name: str) -> None:
    source = open_source(TINY / name, PLAIN)
    assert source.scheme == CHECKPOINTS[name]
    assert len(source.tensors) >= 28


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_exactly_one_format_claims_a_checkpoint(name: str) -> None:
    claims = claimants(TINY / name)
    assert claims == [CHECKPOINTS[name]]


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """File name → how often it was opened."""
    counted: Counter[str] = Counter()
    for module, name in ((os, "open"), (builtins, "open")):
        real = getattr(module, name)

        def spy(path: Any, *args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            counted[os.path.basename(os.fspath(path))] += 1
            return real(path, *args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    return counted


@pytest.mark.parametrize(
    ("path", "form", "index"),
    [
        ("tiny-gpt2/openai-tf", "openai-tf", "model.ckpt.index"),
        ("tiny-gpt2/openai-tf/model.ckpt", "openai-tf", "model.ckpt.index"),
        ("tiny-gpt2/openai-tf-adam", "openai-tf", "model-20.index"),
        ("originals/mesh-tf", "mesh-tf", "model.ckpt.index"),
    ],
)
def test_a_detected_tensorflow_checkpoint_has_its_index_read_once(
    path: str, form: str, index: str, opens: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stats: Counter[str] = Counter()
    real = os.stat

    def spy(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        stats[os.path.basename(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else ""] += 1
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", spy)
    assert open_source(FIXTURES / path, PLAIN).scheme == form
    assert {name: count for name, count in opens.items() if name.endswith(".index")} == {index: 1}
    assert stats[index] == 1
    assert stats.total() <= 15


def test_only_the_requested_step_is_opened(opens: Counter[str]) -> None:
    source = open_source(TINY / "openai-tf-adam", Options(step=10))
    assert source.path.endswith("model-10")
    assert opens["model-10.index"] == 1
    assert opens["model-20.index"] == 0


@pytest.mark.parametrize("name", ["nanogpt/ckpt.pt", "nanogpt", "nanogpt as x.pt", "megatron"])
def test_a_pickle_is_parsed_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptconvert.containers import torch as container

    parsed: list[str] = []
    real = container.load_pickle

    def spy(file: Any, rules: Any, path: str) -> object:
        parsed.append(path)
        return real(file, rules, path)

    monkeypatch.setattr(container, "load_pickle", spy)
    path = FIXTURES / "originals" / name.partition(" ")[0]
    if name.endswith("x.pt"):
        (tmp_path / "x.pt").write_bytes((path / "ckpt.pt").read_bytes())
        path = tmp_path / "x.pt"
    open_source(path, PLAIN)
    assert len(parsed) == 1


@pytest.mark.parametrize("name", ["hf-bin/pytorch_model.bin", "hf-bare/model.safetensors", "hf-bare/config.json"])
def test_files(name: str) -> None:
    assert open_source(TINY / name, PLAIN).scheme == "hf"


@pytest.mark.skipif(not REAL_GPT2.exists(), reason=NO_RELEASED_FILES)
@pytest.mark.parametrize("name", ["", "model.ckpt", "model.ckpt.index", "checkpoint"])
def test_real_gpt2(name: str) -> None:
    assert open_source(REAL_GPT2 / name, PLAIN).scheme == "openai-tf"


def test_format_given(tmp_path: Path) -> None:
    assert open_source(TINY / "hf-bare", PLAIN, "hf").scheme == "hf"
    with pytest.raises(UsageError, match=r"expected one of hf, .*openai-tf.*, found keras"):
        open_source(TINY / "hf-bare", PLAIN, "keras")
    with pytest.raises(GptConvertError):
        open_source(TINY / "hf-bare", PLAIN, "openai-tf")


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Repositories that would be requested from the hub."""
    names: list[str] = []

    def fetch(repo: str, options: Options) -> Source:
        names.append(repo)
        raise InputError("requested", path=repo)

    monkeypatch.setattr(hf.hub, "fetch", fetch)
    return names


def test_a_missing_path_is_tried_as_a_repository(
    tmp_path: Path, requested: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "openai-community/gpt2"):
        with pytest.raises(InputError, match="requested"):
            open_source(name, PLAIN)
    assert requested == ["gpt2", "openai-community/gpt2"]


def test_mistyped_paths_are_not_tried_as_repositories(
    tmp_path: Path, requested: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "gpt2-small").mkdir(parents=True)
    for name in (
        "models/gpt2-smal",
        "./models/gpt2-smal",
        str(tmp_path / "models" / "gpt2-smal"),
        "models/gpt2-smal/",
    ):
        with pytest.raises(InputError, match="no such file or directory") as caught:
            open_source(name, PLAIN)
        assert "models/gpt2-small?" in str(caught.value.hint)
    for name in ("model.safetensors", "a/b/c", "", "no such thing"):
        with pytest.raises(InputError, match="no such file or directory"):
            open_source(name, PLAIN)
    assert requested == []


#: File name → (content, title in the error).
STRANGERS = {
    "weights.npy": (b"\x93NUMPY", "NumPy"),
    "renamed": (b"lmgg\3\0\0\0", "ggml"),
    "weights": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "model.onnx": (b"x", "ONNX"),
    "rust_model.ot": (b"x", "rust-bert"),
    "weights.npz": (b"PK\3\4", "NumPy"),
    "ggml-model-f16.bin": (b"lmgg\1\0\0\0", "ggml"),
    "vocabulary.json": (b"[]", "CTranslate2"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_unsupported_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    content, title = STRANGERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedError, match="this version does not support") as caught:
        open_source(tmp_path / name, PLAIN)
    assert title in str(caught.value)
    assert "the nearest formats: " in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("entry", "title"),
    [
        ("step_383500", "mesh-transformer-jax"),
        ("global_step150000", "DeepSpeed"),
        ("model.onnx", "ONNX"),
        ("ggml-model-f16.bin", "ggml"),
        ("vocabulary.txt", "CTranslate2"),
    ],
)
def test_unsupported_directories_are_refused_by_name(tmp_path: Path, entry: str, title: str) -> None:
    (tmp_path / entry).mkdir()
    (tmp_path / "README.md").write_text("")
    with pytest.raises(UnsupportedError) as caught:
        open_source(tmp_path, PLAIN)
    assert title in str(caught.value)


#: Name of a file or directory entry → (the only format with that name, content; None for a directory).
CLAIMED = {
    "ckpt.pt": ("nanogpt", b"\x80\x02x"),
    "model_optim_rng.pt": ("megatron", b"x"),
    "latest_checkpointed_iteration.txt": ("megatron", b"7"),
    "iter_0500000": ("megatron", None),
    "mp_rank_00": ("megatron", None),
    "tf_model.h5": ("hf", b"x"),
    "flax_model.msgpack": ("hf", b"x"),
}


@pytest.mark.parametrize("name", CLAIMED)
def test_damaged_files_are_refused_by_their_format(tmp_path: Path, name: str) -> None:
    """The error must report the damage, not an unknown format."""
    form, content = CLAIMED[name]
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    assert claimants(tmp_path) == [form]
    with pytest.raises(InputError) as caught:
        open_source(tmp_path, PLAIN)
    assert "known format" not in str(caught.value)


def test_files_recognised_by_their_content(tmp_path: Path) -> None:
    import torch

    saved = {
        "nanogpt": {"model": {"w": torch.ones(2)}, "model_args": {"n_layer": 1}},
        "megatron": {"model": {"language_model": {"embedding": {"w": torch.ones(2)}}}},
        None: {"w": torch.ones(2)},
    }
    for number, (form, content) in enumerate(saved.items()):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        assert claimants(path) == ([form] if form else [])
    (tmp_path / "model.bin").write_bytes(struct.pack("<3i", 20240326, 3, 1024))
    assert claimants(tmp_path / "model.bin") == ["llmc"]


def test_every_lookalike_is_tested() -> None:
    titles = {title for _, title in STRANGERS.values()} | {"mesh-transformer-jax", "DeepSpeed", "SavedModel"}
    untested = [kind.title for kind in LOOKALIKES if not any(title in kind.title for title in titles)]
    assert untested == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", b"hello\n", "a text file that begins with 'hello'"),
        ("model.bin", b"", "empty"),
        ("model", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model", b"<!doctype html>", "HTML page"),
        ("noise", b"\x01\x02\x03\xff" * 9, "begins with b'"),
    ],
)
def test_unknown_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="not a checkpoint of a known format") as caught:
        open_source(tmp_path / name, PLAIN)
    assert words in str(caught.value)
    assert "config.json" in (caught.value.hint or "")


def test_directories_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an empty directory"):
        open_source(tmp_path, PLAIN)
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"holiday\.jpg"):
        open_source(tmp_path, PLAIN)


def test_torch_file_without_config(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes((TINY / "hf-bin" / "pytorch_model.bin").read_bytes())
    with pytest.raises(InputError) as caught:
        open_source(path, PLAIN)
    assert "config.json" in str(caught.value.hint)


def test_pytorch_weights_under_any_name_without_a_config(tmp_path: Path) -> None:
    import torch

    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "best.ckpt")
    for path in (tmp_path, tmp_path / "best.ckpt"):
        with pytest.raises(InputError, match=r"best\.ckpt: .* without their configuration; found w") as caught:
            open_source(path, PLAIN)
        assert "config.json" in (caught.value.hint or "")


def test_a_lone_pytorch_file_that_is_refused(tmp_path: Path) -> None:
    """The reason is shown, not that the directory holds no known format."""
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UnsafeInputError, match="whole pickled model"):
        open_source(tmp_path, PLAIN)


def test_checkpoints_of_nanogpt_under_other_names(tmp_path: Path) -> None:
    import torch

    for step in (900, 1000):
        torch.save({"model": {"w": torch.ones(2)}, "model_args": {"n_layer": 1}}, tmp_path / f"ckpt_{step}.pt")
    with pytest.raises(InputError, match=r"found ckpt_1000\.pt, ckpt_900\.pt") as caught:
        open_source(tmp_path, PLAIN)
    assert caught.value.hint == f"pass one of the files: {tmp_path / 'ckpt_1000.pt'}"
    with pytest.raises(InputError, match="the checkpoint is missing") as caught:
        open_source(tmp_path, PLAIN, "nanogpt")
    assert caught.value.hint == "choose one: --weights-file ckpt_1000.pt"
    assert open_source(tmp_path, Options(weights_file="ckpt_1000.pt"), "nanogpt").scheme == "nanogpt"


def test_54_special_files_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UnsafeInputError):
            open_source(path, PLAIN)
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(InputError):
        open_source(tmp_path / "dangling", PLAIN)


def test_54_names_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\n\x1b[31mb"
    path.write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        open_source(path, PLAIN)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    for name in ("x" * 300, "a\0b", os.fsdecode(b"\xff")):
        with pytest.raises(InputError):
            open_source(f"{tmp_path}/{name}", PLAIN)


@pytest.mark.parametrize(
    ("source", "options", "first"),
    [("gpt2-stdlib", {}, "model/h0/attn/c_attn/b"), ("openai/gpt1-small", {"n_head": 3}, None)],
)
@pytest.mark.parametrize("form", [None, "openai-tf"])
def test_output_in_openai_format_is_a_source(
    tmp_path: Path, source: str, options: dict[str, Any], first: str | None, form: str | None
) -> None:
    from gptconvert.pipeline import convert

    chosen = Options(targets=("onnx", "openai-tf"), verify=None, **options)
    convert(FIXTURES / source, tmp_path / "out", chosen)
    back = open_source(tmp_path / "out", PLAIN, form)
    assert back.path.startswith(str(tmp_path / "out" / "openai-tf"))
    assert first is None or first in back.tensors


def test_output_with_safetensors_is_read_from_them(tmp_path: Path) -> None:
    from gptconvert.pipeline import convert

    convert(FIXTURES / "gpt2-stdlib", tmp_path / "out", Options(targets=("safetensors", "openai-tf"), verify=None))
    assert open_source(tmp_path / "out", PLAIN).scheme == "hf"


def test_every_format_can_be_suggested() -> None:
    assert {form.name for form in FORMATS} == set(FILES)
