"""manifest.json and SHA256SUMS: correct, complete and reproducible."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError
from gptconvert.model.export import PlannedFile, place
from gptconvert.model.options import Options
from gptconvert.model.tensors import Cast
from gptconvert.publish.manifest import Recipe, check_inputs_unchanged, manifest_files, snapshot
from gptconvert.publish.writer import WrittenFile, write_and_digest, write_files
from gptconvert.version import __version__
from tests.helpers import checkpoint_of, openai_hparams, openai_layout, tiny_gpt2


def convert(source: Path, out: Path, recorded: dict[str, object] | None = None, **options: Any) -> dict[str, Any]:
    """Write a checkpoint with a dropped tensor, as stored and in bfloat16; returns its manifest."""
    source.mkdir(parents=True)
    out.mkdir(parents=True)
    raw, arrays = tiny_gpt2(n_inner=None)
    layout = {f"run/{n}": a for n, a in openai_layout(arrays).items()} | {"global_step": np.array(7)}
    (source / "encoder.json").write_bytes(b"{}")
    checkpoint = checkpoint_of(
        openai_hparams(raw),
        layout,
        source,
        scheme="openai-tf",
        tokenizer={"encoder.json": str(source / "encoder.json")},
        path=str(source),
        repo="org/name",
        revision="0123abcd",
    )
    import ml_dtypes

    names = sorted(checkpoint.weights)
    half = np.dtype(ml_dtypes.bfloat16)
    stored, stored_end = place([(n, checkpoint.weights[n], n) for n in names])
    narrow, narrow_end = place([(n, Cast(checkpoint.weights[n], half), n) for n in names])
    files = [
        PlannedFile("onnx/model.onnx_data", stored_end, b"", stored),
        PlannedFile("b.bin", narrow_end, b"", narrow),
        PlannedFile.of_bytes("config.json", b"{}\n"),
    ]
    written = write_and_digest(str(out), files, checkpoint)
    (out / "extra").write_bytes(b"extra")
    also = [WrittenFile("extra", 5, hashlib.sha256(b"extra").hexdigest())]
    recipe = Recipe(("safetensors", "onnx"), recorded or {"opset": 21, "dtype": None}, ("onnx", "numpy"))
    made = manifest_files(checkpoint, files, written, recipe, also=also, **options)
    assert [file.path for file in made] == ["manifest.json", "SHA256SUMS"]
    write_files(str(out), made)
    result: dict[str, Any] = json.loads((out / "manifest.json").read_bytes())
    return result


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_describes_source_options_and_versions(tmp_path: Path, out: Path) -> None:
    manifest = convert(tmp_path / "source", out, verification={"passed": True})
    assert manifest["schema_version"] == 1
    assert manifest["tool"] == {"name": "gptconvert", "version": __version__}
    assert manifest["libraries"] == {name: metadata.version(name) for name in ("onnx", "numpy")}
    assert manifest["targets"] == ["onnx", "safetensors"]
    assert manifest["options"] == {"opset": 21, "dtype": None}
    assert manifest["config"]["n_embd"] == 24
    assert manifest["special_ids"] == {"bos": 96, "eos": [96], "pad": None}
    assert manifest["verification"] == {"passed": True}
    source = manifest["source"]
    assert (source["scheme"], source["repo"], source["revision"]) == ("openai-tf", "org/name", "0123abcd")
    assert source["prefix"] == "run/"
    assert source["dropped"] == ["global_step"]
    names = ["encoder.json", "weights.raw"]
    assert source["files"] == [
        {"name": n, "size": (tmp_path / "source" / n).stat().st_size, "sha256": sha(tmp_path / "source" / n)}
        for n in names
    ]


def test_lists_every_option_that_affects_the_output(tmp_path: Path, out: Path) -> None:
    """The options are flat and include source options, but not those that do not affect the bytes."""
    options = Options(dtype="fp16", activation="tanh", trim_vocab=90, hparams="/home/me/hparams.json", force=True)
    recorded = convert(tmp_path / "source", out, recorded=options.recorded())["options"]
    assert recorded == json.loads(json.dumps(options.recorded()))
    assert (recorded["dtype"], recorded["activation"], recorded["trim_vocab"]) == ("fp16", "tanh", 90)
    assert recorded["hparams"] == "hparams.json"
    assert recorded["opset"] == Options().opset
    assert "force" not in recorded
    assert all(value is None or isinstance(value, bool | int | str | list) for value in recorded.values())


def test_lists_every_file_and_tensor(tmp_path: Path, out: Path) -> None:
    manifest = convert(tmp_path / "source", out)
    paths = ["b.bin", "config.json", "extra", "onnx/model.onnx_data"]
    assert manifest["files"] == [{"path": p, "size": (out / p).stat().st_size, "sha256": sha(out / p)} for p in paths]
    assert manifest["verification"] is None
    tensors = {(t["file"], t["name"]): t for t in manifest["tensors"]}
    assert len(tensors) == len(manifest["tensors"]) == 2 * 28
    assert list(tensors) == sorted(tensors)
    assert tensors["b.bin", "h.1.mlp.c_fc.bias"]["dtype"] == "bfloat16"
    wte = tiny_gpt2(n_inner=None)[1]["transformer.wte.weight"]
    assert tensors["onnx/model.onnx_data", "wte.weight"] == {
        "file": "onnx/model.onnx_data",
        "name": "wte.weight",
        "dtype": "float32",
        "shape": [97, 24],
        "sha256": hashlib.sha256(wte.tobytes()).hexdigest(),
    }


def test_sha256sum_agrees(tmp_path: Path, out: Path) -> None:
    convert(tmp_path / "source", out)
    lines = (out / "SHA256SUMS").read_text().splitlines()
    listed = [line.split("  ", 1)[1] for line in lines]
    assert listed == sorted(listed)
    assert set(listed) == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def test_is_reproducible(tmp_path: Path) -> None:
    convert(tmp_path / "here" / "source", tmp_path / "here" / "out")
    convert(tmp_path / "some where else" / "input", tmp_path / "o")
    for name in ("manifest.json", "SHA256SUMS"):
        content = (tmp_path / "o" / name).read_bytes()
        assert content == (tmp_path / "here" / "out" / name).read_bytes()
        assert str(tmp_path).encode() not in content
        assert os.uname().nodename.encode() not in content


def test_refuses_numbers_that_json_cannot_express(tmp_path: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        convert(tmp_path / "source", out, verification={"ratio": float("nan")})


class TestInputsUnchanged:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[str]:
        for name in ("a", "b", "c"):
            (tmp_path / name).write_bytes(b"content")
        return [str(tmp_path / name) for name in ("a", "b", "c", "absent")]

    def test_untouched_files_pass(self, paths: list[str]) -> None:
        before = snapshot(paths)
        check_inputs_unchanged(before)
        check_inputs_unchanged(before, snapshot(paths))

    @pytest.mark.parametrize("how", ["grow", "rewrite", "touch", "replace", "remove", "appear"])
    def test_changed_files_are_named(self, paths: list[str], how: str) -> None:
        before = snapshot(paths)
        times = os.stat(paths[1])
        changed = paths[3] if how == "appear" else paths[1]
        if how == "touch":
            os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
        elif how == "remove":
            os.unlink(changed)
        elif how == "replace":
            Path(changed + ".new").write_bytes(b"CONTENT")
            os.utime(changed + ".new", ns=(times.st_atime_ns, times.st_mtime_ns))
            os.replace(changed + ".new", changed)
        else:
            Path(changed).write_bytes(b"x" * times.st_size if how == "rewrite" else b"content and more")
            os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
        name = os.path.basename(changed)
        with pytest.raises(InputError, match=f"changed while it was being read: {name}$") as caught:
            check_inputs_unchanged(before)
        assert caught.value.exit_code == 3
        assert caught.value.path == changed
