"""Bad input through the command line: the right exit code, a message that names the fault, nothing written.

Test numbers refer to the project's list of bad inputs. The readers' own tests cover the same cases in more detail.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import TINY, TRAINED, command, tree

Make = Callable[[Path], object]


def copied(name: str, root: Path) -> Path:
    """A writable copy of a fixture."""
    shutil.copytree(TINY / name, root / "in")
    return root / "in"


def safetensors_bytes(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def weights(content: bytes) -> Make:
    """hf-safetensors with ``content`` as its weights file."""

    def make(root: Path) -> Path:
        directory = copied("hf-safetensors", root)
        (directory / "model.safetensors").write_bytes(content)
        return directory

    return make


def header(change: Callable[[dict[str, Any]], object], tail: bytes = b"", cut: int = 0) -> Make:
    """hf-safetensors with its header changed, ``tail`` appended to and ``cut`` bytes removed from the end."""

    def make(root: Path) -> Path:
        directory = copied("hf-safetensors", root)
        path = directory / "model.safetensors"
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        fields = json.loads(raw[8 : 8 + size])
        change(fields)
        body = raw[8 + size :]
        path.write_bytes(safetensors_bytes(fields, body[: len(body) - cut] + tail))
        return directory

    return make


def config(**changes: object) -> Make:
    """hf-safetensors with keys of config.json changed."""

    def make(root: Path) -> Path:
        directory = copied("hf-safetensors", root)
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return directory

    return make


def index(change: Callable[[Path, dict[str, Any]], object], name: str = "hf-safetensors-sharded") -> Make:
    """A sharded checkpoint with its index changed."""

    def make(root: Path) -> Path:
        directory = copied(name, root)
        (path,) = directory.glob("*.index.json")
        fields = json.loads(path.read_text())
        change(directory, fields)
        path.write_text(json.dumps(fields))
        return directory

    return make


def edited(name: str, file: str, edit: Callable[[bytes], bytes]) -> Make:
    """A fixture with one file's bytes edited."""

    def make(root: Path) -> Path:
        directory = copied(name, root)
        path = directory / file
        path.write_bytes(edit(path.read_bytes()))
        return directory

    return make


def without(name: str, *files: str) -> Make:
    def make(root: Path) -> Path:
        directory = copied(name, root)
        for file in files:
            (directory / file).unlink()
        return directory

    return make


def flip(offset: int, bit: int = 0x10) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:offset] + bytes([raw[offset] ^ bit]) + raw[offset + 1 :]


def pickled(payload: object) -> Make:
    """hf-bin with ``payload`` pickled as its data.pkl."""

    def make(root: Path) -> Path:
        directory = copied("hf-bin", root)
        with zipfile.ZipFile(directory / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(payload, 2))
            archive.writestr("archive/version", "3\n")
        return directory

    return make


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def rezipped(compression: int = zipfile.ZIP_STORED, rename: Callable[[str], str] = str, twice: bool = False) -> Make:
    """hf-bin with its archive rewritten."""

    def make(root: Path) -> Path:
        directory = copied("hf-bin", root)
        path = directory / "pytorch_model.bin"
        with zipfile.ZipFile(path) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members:
                for _ in range(1 + (twice and name.endswith("data/0"))):
                    archive.writestr(rename(name), content)
        return directory

    return make


def shard_to(value: str) -> Callable[[Path, dict[str, Any]], None]:
    def change(directory: Path, fields: dict[str, Any]) -> None:
        fields["weight_map"][next(iter(fields["weight_map"]))] = value

    return change


def special_shard(make: Callable[[Path], None]) -> Callable[[Path, dict[str, Any]], None]:
    def change(directory: Path, fields: dict[str, Any]) -> None:
        shard = directory / next(iter(fields["weight_map"].values()))
        shard.unlink()
        make(shard)

    return change


def float_bits(name: str, value: float) -> Make:
    """hf-safetensors with one element of a tensor set."""

    def make(root: Path) -> Path:
        import safetensors.numpy

        directory = copied("hf-safetensors", root)
        path = directory / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        tensors[name] = tensors[name].copy()
        tensors[name].flat[7] = value
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
        return directory

    return make


def retensored(change: Callable[[dict[str, Any]], object], **settings: object) -> Make:
    """hf-safetensors with tensors added, removed or replaced."""

    def make(root: Path) -> Path:
        import safetensors.numpy

        directory = config(**settings)(root)
        path = directory / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
        return directory

    return make


WTE = "transformer.wte.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"
HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"

CASES: list[tuple[str, Make, int, str]] = [
    ("1 LFS pointer", weights(LFS), 3, "LFS"),
    ("2 HTML", weights(HTML), 3, "HTML"),
    ("3 empty", weights(b""), 3, "empty"),
    ("4 header longer than file", weights(struct.pack("<Q", 1 << 20) + b"{}"), 3, "header"),
    ("4 header over limit", weights(struct.pack("<Q", 1 << 40) + b"{}"), 3, "header"),
    ("5 not UTF-8", weights(safetensors_bytes(b"{\xff\xfe}  ")), 3, "header"),
    ("5 not JSON", weights(safetensors_bytes(b"{hello}")), 3, "header"),
    ("5 not an object", weights(safetensors_bytes(b"[1]     ")), 3, "header"),
    (
        "6 duplicate key",
        weights(safetensors_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), bytes(8))),
        3,
        "a",
    ),
    ("7 overlap", header(lambda h: h[WTE]["data_offsets"].__setitem__(0, h[WTE]["data_offsets"][0] - 4)), 3, ""),
    ("8 trailing bytes", header(lambda h: None, tail=b"PK\3\4"), 3, "4"),
    ("9 truncated", header(lambda h: None, cut=100), 3, "truncated"),
    ("10 overflow", header(lambda h: h[WTE].update(shape=[1 << 40, 1 << 40])), 3, WTE),
    ("10 negative", header(lambda h: h[WTE].update(shape=[-97, 24])), 3, ""),
    ("11 unknown dtype", header(lambda h: h[WTE].update(dtype="F33")), 3, "F33"),
    ("11 F8", header(lambda h: h[WTE].update(dtype="F8_E4M3", shape=[97, 24 * 4])), 4, "F8"),
    ("14 NaN", float_bits("transformer.h.1.mlp.c_fc.weight", float("nan")), 3, "h.1.mlp.c_fc.weight"),
    ("14 Inf", float_bits(WTE, float("inf")), 3, WTE),
    ("16 shard in parent", index(shard_to("../x.safetensors")), 7, "../x"),
    ("16 absolute shard", index(shard_to("/etc/passwd")), 7, "passwd"),
    ("16 backslash", index(shard_to("a\\..\\b.safetensors")), 7, ""),
    ("16 symlink out", index(special_shard(lambda p: p.symlink_to("/etc/passwd"))), 7, ""),
    (
        "17 shard missing",
        index(lambda d, f: [p.unlink() for p in sorted(d.glob("model-*"))[:2]]),
        3,
        "00002-of-00004",
    ),
    (
        "18 tensor not in shard",
        index(lambda d, f: f["weight_map"].update({"ghost": min(f["weight_map"].values())})),
        3,
        "ghost",
    ),
    ("18 extra in shard", index(lambda d, f: f["weight_map"].pop(WTE)), 3, WTE),
    ("19 FIFO", index(special_shard(lambda p: os.mkfifo(p))), 7, ""),
    ("19 directory", index(special_shard(lambda p: p.mkdir())), 7, ""),
    ("20 no weight_map", index(lambda d, f: f.clear()), 3, "weight_map"),
    ("20 list", edited("hf-safetensors-sharded", "model.safetensors.index.json", lambda raw: b"[]"), 3, ""),
    ("21 .bin truncated", edited("hf-bin", "pytorch_model.bin", lambda raw: raw[:-300]), 3, "central directory"),
    ("22 .bin is HTML", edited("hf-bin", "pytorch_model.bin", lambda raw: HTML), 3, "HTML"),
    ("22 .bin is LFS", edited("hf-bin", "pytorch_model.bin", lambda raw: LFS), 3, "LFS"),
    ("22 .bin empty", edited("hf-bin", "pytorch_model.bin", lambda raw: b""), 3, "empty"),
    ("23 os.system", pickled({"a": Evil()}), 7, "system"),
    ("25 deflated", rezipped(zipfile.ZIP_DEFLATED), 7, "compress"),
    ("26 duplicate member", rezipped(twice=True), 7, ""),
    ("26 parent member", rezipped(rename=lambda n: n.replace("data/0", "../data/0")), 7, ".."),
    ("29 whole module", pickled(type("X", (), {"__reduce__": lambda s: (eval, ("1",))})()), 7, "eval"),
    ("30 bit flip in data", edited("openai-tf", DATA, flip(2000)), 3, "crc32c"),
    ("31 data truncated", edited("openai-tf", DATA, lambda raw: raw[:-8]), 3, "truncated"),
    ("32 index missing", without("openai-tf", INDEX), 3, ".index"),
    ("32 index truncated", edited("openai-tf", INDEX, lambda raw: raw[:-9]), 3, INDEX),
    ("32 index corrupt", edited("openai-tf", INDEX, flip(60)), 3, INDEX),
    ("32 wrong magic", edited("openai-tf", INDEX, lambda raw: raw[:-1] + b"\0"), 3, INDEX),
    ("35 shard of another step", lambda root: mixed_steps(root), 3, "crc32c"),
    ("42 no config.json", without("hf-safetensors", "config.json"), 3, "config.json"),
    ("42 not JSON", edited("hf-safetensors", "config.json", lambda raw: b"{"), 3, "config.json"),
    ("42 NaN", edited("hf-safetensors", "config.json", lambda r: r.replace(b"1e-05", b"NaN")), 3, "config.json"),
    ("42 heads do not divide", config(n_head=5), 3, "n_head"),
    ("42 no layers", config(n_layer=0), 3, "n_layer"),
    ("42 1e9 layers", config(n_layer=10**9), 3, "n_layer"),
    ("42 wrong type", config(n_embd="24"), 3, "n_embd"),
    ("43 layer more", config(n_layer=3), 3, "h.2.attn"),
    ("43 layer less", config(n_layer=1), 3, "h.1.attn"),
    ("44 vocabulary", config(vocab_size=96), 3, "wte"),
    ("44 context", config(n_positions=39, n_ctx=39), 3, "wpe"),
    ("45 missing", retensored(lambda t: t.pop("transformer.h.0.ln_2.bias")), 3, "h.0.ln_2.bias"),
    ("45 unknown", retensored(lambda t: t.update(adapter=np.ones(3, np.float32))), 3, "adapter"),
    ("46 untied but tied", retensored(lambda t: t.update({"lm_head.weight": t[WTE] + 1})), 3, "lm_head.weight"),
    ("47 lying model_type", config(model_type="gptj"), 3, "gpt2"),
    ("47 unknown model_type", config(model_type="llama"), 4, "llama"),
    ("48 activation", config(activation_function="prelu"), 4, "trained parameters"),
    ("48 rope_scaling", config(rope_scaling={"type": "linear"}), 4, "rope_scaling"),
    ("48 unknown key", config(use_magic=True), 4, "use_magic"),
    ("48 cross-attention", config(add_cross_attention=True), 4, "add_cross_attention"),
    ("missing source", lambda root: root / "nowhere", 3, "nowhere"),
]


def mixed_steps(root: Path) -> Path:
    directory = copied("openai-tf-adam", root)
    shutil.copy(directory / "model-10.data-00000-of-00001", directory / "model-20.data-00000-of-00001")
    return directory


@pytest.mark.parametrize(("make", "code", "fragment"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_source(make: Make, code: int, fragment: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    source = make(tmp_path)
    outcome = command(capsys, "convert", source, "-o", "out", "--no-verify")
    assert outcome.code == code, outcome.err
    assert fragment in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert list((tmp_path / "work").iterdir()) == []


def test_12_bfloat16_works(tmp_path: Path, capsys: Any) -> None:
    assert command(capsys, "hf", TINY / "hf-bf16", "--to", "safetensors", "-o", tmp_path / "out").code == 0


def test_14_nonfinite_allowed(tmp_path: Path, capsys: Any) -> None:
    source = float_bits("transformer.h.1.mlp.c_fc.weight", float("nan"))(tmp_path)
    args = ("convert", source, "-o", tmp_path / "out", "--no-verify", "--allow-nonfinite")
    outcome = command(capsys, *args)
    assert outcome.code == 0
    assert "h.1.mlp.c_fc.weight" in outcome.err


def test_24_bit_flip_in_a_bin(tmp_path: Path, capsys: Any) -> None:
    source = copied("hf-bin", tmp_path)
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        biggest = max(archive.infolist(), key=lambda info: info.file_size)
    raw = path.read_bytes()
    path.write_bytes(flip(biggest.header_offset + 512)(raw))
    outcome = command(capsys, "convert", source, "-o", tmp_path / "out", "--no-verify")
    assert outcome.code == 3
    assert "crc32" in outcome.err.lower()


def test_33_index_file_is_accepted(tmp_path: Path, capsys: Any) -> None:
    assert command(capsys, "inspect", TINY / "openai-tf" / INDEX).code == 0


@pytest.mark.parametrize(
    ("files", "fragment"),
    [(("model.ckpt.meta",), "meta"), (("saved_model.pb",), "SavedModel")],
)
def test_34_other_tensorflow_files(files: tuple[str, ...], fragment: str, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in files:
        (source / name).write_bytes(b"\x0a\x10" + bytes(64))
    for path in (source, source / files[0]):
        outcome = command(capsys, "openai-tf", path, "-o", tmp_path / "out")
        assert outcome.code == 4, outcome.err
        assert fragment in outcome.err


@pytest.mark.parametrize("inside", ["", "sub", "../in"])
def test_51_output_in_the_input(inside: str, tmp_path: Path, capsys: Any) -> None:
    source = copied("hf-safetensors", tmp_path)
    before = tree(tmp_path)
    outcome = command(capsys, "hf", source, "-o", source / inside, "--force", "--no-verify")
    assert outcome.code == 6
    assert tree(tmp_path) == before


def test_51_output_links_to_the_input(tmp_path: Path, capsys: Any) -> None:
    source = copied("hf-safetensors", tmp_path)
    (tmp_path / "link").symlink_to(source)
    before = tree(tmp_path)
    assert command(capsys, "hf", source, "-o", tmp_path / "link", "--force", "--no-verify").code == 6
    assert tree(tmp_path) == before


@pytest.mark.parametrize("output", ["file", "/dev/null", "full"])
def test_52_output_that_is_not_an_empty_directory(output: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    before = tree(tmp_path)
    assert command(capsys, "hf", TINY / "hf-bin", "-o", tmp_path / output, "--no-verify").code == 6
    assert tree(tmp_path) == before


def test_53_file_size_limit(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import resource, signal, sys\nfrom gptconvert.cli import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (40_000,) * 2)\n"
        f"sys.exit(run(['hf', {str(TINY / 'hf-bin')!r}, '-o', 'out', '--no-verify']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_54_odd_names(tmp_path: Path, capsys: Any) -> None:
    for name in ("naïve ☃", "with\nnewline", "-dash"):
        source = tmp_path / name
        shutil.copytree(TINY / "hf-safetensors", source)
        outcome = command(capsys, "hf", source, "-o", tmp_path / f"{name}.out", "--no-verify")
        assert outcome.code == 0, outcome.err
    outcome = command(capsys, "hf", tmp_path / "with\nnewline", "-o", tmp_path / "with\nnewline.out", "--no-verify")
    assert outcome.code == 6
    assert "with\\nnewline" in outcome.err


def test_55_input_changed_while_reading(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from gptconvert import pipeline

    source = copied("hf-safetensors", tmp_path)
    write = pipeline.write_and_digest

    def touched(*args: Any, **kwargs: Any) -> Any:
        done = write(*args, **kwargs)
        os.utime(source / "model.safetensors", (1, 1))
        return done

    monkeypatch.setattr(pipeline, "write_and_digest", touched)
    outcome = command(capsys, "hf", source, "-o", tmp_path / "out", "--no-verify")
    assert outcome.code == 3
    assert "changed while" in outcome.err
    assert not (tmp_path / "out").exists()


def test_57_single_file_ends_at_two_gibibytes() -> None:
    from gptconvert.errors import UnsupportedError
    from gptconvert.targets.onnx.plan import PROTOBUF_LIMIT, check_single_file_size

    check_single_file_size(PROTOBUF_LIMIT)
    with pytest.raises(UnsupportedError, match="2 GiB"):
        check_single_file_size(PROTOBUF_LIMIT + 1)


def test_58_damaged_tokenizer(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "in"
    shutil.copytree(TRAINED, source)
    (source / "encoder.json").write_text("{")
    outcome = command(capsys, "openai-tf", source, "-o", tmp_path / "out", "--no-verify")
    assert outcome.code == 3
    assert "encoder.json" in outcome.err
    (source / "encoder.json").unlink()
    outcome = command(capsys, "openai-tf", source, "-o", tmp_path / "out", "--no-verify")
    assert outcome.code == 0
    assert "encoder.json" in outcome.err


class TestStrict:
    """``--strict`` turns notes into errors before anything is published."""

    def test_58_missing_tokenizer(self, tmp_path: Path, capsys: Any) -> None:
        source = tmp_path / "in"
        shutil.copytree(TRAINED, source)
        args = ("openai-tf", source, "--no-verify", "--strict", "-o")
        assert command(capsys, *args, tmp_path / "whole").code == 0
        (source / "encoder.json").unlink()
        outcome = command(capsys, *args, tmp_path / "out")
        assert outcome.code == 3
        assert "encoder.json" in outcome.err and "--strict" in outcome.err
        assert not (tmp_path / "out").exists()

    def test_49_both_kinds_of_weights(self, tmp_path: Path, capsys: Any) -> None:
        source = copied("hf-bin", tmp_path)
        shutil.copy(TINY / "hf-safetensors" / "model.safetensors", source)
        args = ("hf", source, "--no-verify", "-o", tmp_path / "out")
        outcome = command(capsys, *args, "--strict")
        assert outcome.code == 3
        assert "pytorch_model.bin" in outcome.err
        assert not (tmp_path / "out").exists()
        assert command(capsys, *args).code == 0

    def test_notes_made_while_writing_count_too(self, tmp_path: Path, capsys: Any) -> None:
        source = float_bits("transformer.h.1.mlp.c_fc.weight", float("nan"))(tmp_path)
        args = ("convert", source, "-o", tmp_path / "out", "--no-verify", "--allow-nonfinite", "--strict")
        outcome = command(capsys, *args)
        assert outcome.code == 3
        assert not (tmp_path / "out").exists()


def test_60_missing_tensorflow_names_the_extra(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from importlib import util

    from gptconvert.targets import registry

    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None if name == "tensorflow" else util)
    outcome = command(capsys, "hf", TINY / "hf-bin", "--to", "tf", "-o", tmp_path / "out")
    assert outcome.code == 4
    assert "tensorflow" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["convert", "hf", "inspect"])
@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("https://huggingface.co/distilgpt2", "gptconvert hf distilgpt2"),
        ("https://huggingface.co/EleutherAI/pythia-70m/tree/main", "gptconvert hf EleutherAI/pythia-70m"),
        ("file:///models/x", "download it, and pass the path"),
        ("https://example.org/model.safetensors", "download it, and pass the path"),
    ],
)
def test_urls(form: str, url: str, hint: str, capsys: Any) -> None:
    done = command(capsys, form, url, *(["--dry-run"] if form != "inspect" else []))
    assert done.code == 3
    assert f"{url}: a URL, not a path" in done.err
    assert hint in done.err
