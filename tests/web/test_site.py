"""``gptconvert web``: what it writes, and what it refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptconvert.errors import InputError, OutputError, UnsafeInputError
from gptconvert.publish.file_system import FileSystem
from gptconvert.publish.replaceable import WEB_SUMS, deletion_notes
from gptconvert.web.libraries import CDN, copies, described, libraries, packages
from gptconvert.web.publish import FOLDER, INDEX, MARK, asset, publish
from gptconvert.web.site import describe
from tests.commands import TRAINED, command, tree
from tests.reporting.runs import valid

WRITTEN = {
    INDEX,
    *(f"{FOLDER}/{name}" for name in ("SHA256SUMS", "app.js", "site.json", "style.css", "unpack.js", "worker.js")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gptconvert.model.options import Options
    from gptconvert.pipeline import convert, open_checkpoint

    directory = tmp_path_factory.mktemp("export") / "out"
    options = Options(targets=("onnx",), quantize=("q8", "q4"), last_token=True, verify=None)
    convert(open_checkpoint(str(TRAINED)), str(directory), options)
    return directory


@pytest.fixture
def export(made: Path, tmp_path: Path) -> Path:
    """A copy of an export, whose files a test may change."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_files_and_their_digests(export: Path, capsys: Any) -> None:
    before = tree(export)
    done = command(capsys, "web", export, "--json")
    assert (done.code, done.err) == (0, "")
    after = tree(export)
    assert {**after, **before} == after  # the export is as it was
    assert after.keys() - before.keys() == WRITTEN
    found = valid("web", done.json)
    assert {each["path"]: each["size"] for each in found["files"]} == {path: len(after[path]) for path in WRITTEN}
    assert [each["name"] for each in found["variants"]] == ["q8", "q4", "fp32"]
    sums = dict(line.split("  ")[::-1] for line in after[WEB_SUMS].decode().splitlines())
    assert sums == {p: hashlib.sha256(after[p]).hexdigest() for p in WRITTEN - {WEB_SUMS}}
    assert command(capsys, "web", export, "--json").code == 0
    assert tree(export) == after


def test_document(export: Path) -> None:
    document = describe(str(export), local=False)
    assert {key: document[key] for key in ("model", "context", "start", "stops", "defaults")} == {
        "model": "GPT-2",
        "context": 256,
        "start": [2002],
        "stops": [2002],
        "defaults": {},
    }
    for variant in document["variants"]:
        files = [variant["graph"], *variant["data"]]
        assert variant["size"] == sum(each["size"] for each in files)
        for each in files:
            path, _, version = each["url"].partition("?v=")
            data = (export / path).read_bytes()
            assert (each["size"], each["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            assert each["sha256"].startswith(version) and len(version) == 16
        assert [each["path"] for each in variant["data"]] == [f"{os.path.basename(path_of(variant))}_data"]
        assert variant["verified"] is None  # it was not
    assert document["libraries"] == described(local=False)


def path_of(variant: dict[str, Any]) -> str:
    path: str = variant["graph"]["url"].partition("?")[0]
    return path


def test_data_in_several_files_is_ordered_by_number(export: Path) -> None:
    for number in (2, 10, 1):
        (export / f"onnx/model_q4.onnx_data_{number}").write_bytes(b"x")
    (q4,) = (each for each in describe(str(export), local=False)["variants"] if each["name"] == "q4")
    assert [each["path"] for each in q4["data"]] == [f"model_q4.onnx_data{end}" for end in ("", "_1", "_2", "_10")]


def test_what_the_manifest_says_of_verification(export: Path) -> None:
    runs = [{"groups": [{"group": "length 1"}, {"group": "length 2"}]}]
    passed = {"path": "onnx/model_quantized.onnx", "ok": True, "runs": runs, "weights": {"equal": 52}}
    failed = {"path": "onnx/model_q4.onnx", "ok": False, "runs": runs}
    artifacts = [passed | {"quality": {"max_kl": 0.01, "ok": True}}, failed]
    edit(export / "manifest.json", verification={"artifacts": artifacts})
    found = {each["name"]: each["verified"] for each in describe(str(export), local=False)["variants"]}
    assert found == {"q8": {"groups": 2, "weights": 52, "max_kl": 0.01}, "q4": None, "fp32": None}


def test_an_export_of_another_program(export: Path) -> None:
    (export / "manifest.json").unlink()
    (export / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_k": 40}')
    document = describe(str(export), local=False)
    assert (document["model"], document["source"]) == ("gpt2", None)
    assert document["defaults"] == {"temperature": 0.7, "top_k": 40}


def test_a_repository_names_the_model(export: Path) -> None:
    manifest = json.loads((export / "manifest.json").read_text())
    edit(export / "manifest.json", source=manifest["source"] | {"repo": "org/tales"})
    assert describe(str(export), local=False)["model"] == "tales"


@pytest.mark.parametrize("name", ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "tokenizer.json"])
def test_a_changed_file_is_refused(export: Path, name: str) -> None:
    data = bytearray((export / name).read_bytes())
    data[-1] ^= 1
    (export / name).write_bytes(data)
    with pytest.raises(InputError, match=r"was changed after it was published"):
        publish(str(export))
    assert not (export / INDEX).exists()


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda out: shutil.rmtree(out), 3, "no such file or directory"),
        (lambda out: shutil.rmtree(out / "onnx"), 3, "no ONNX graph for a browser"),
        (lambda out: (out / "tokenizer.json").unlink(), 3, "no tokenizer.json"),
        (lambda out: (out / "config.json").unlink(), 3, "no config.json"),
        (lambda out: (out / "manifest.json").write_text("[]"), 3, "a JSON object"),
        (lambda out: (out / "manifest.json").write_text("{}"), 3, "is not a manifest of gptconvert"),
        (lambda out: edit(out / "manifest.json", config={"task": "feature-extraction"}), 4, "does not write text"),
        (lambda out: (out / INDEX).write_text("<h1>Mine</h1>"), 6, "is not a page of gptconvert"),
        (lambda out: (out / INDEX).mkdir(), 6, "is not a page of gptconvert"),
        (lambda out: (out / "web").mkdir(), 6, "is not the folder of a page"),
        (lambda out: (out / "web").symlink_to("onnx"), 6, "is not the folder of a page"),
    ],
    ids=lambda value: None,
)
def test_bad_directories(export: Path, damage: Any, code: int, message: str, capsys: Any) -> None:
    damage(export)
    before = tree(export) if export.exists() else None
    done = command(capsys, "web", export, "--json")
    assert done.code == code and message in str(done.json["error"])
    assert before is None or tree(export) == before


def test_links_out_of_the_directory_are_refused(export: Path, tmp_path: Path) -> None:
    shutil.move(export / "onnx/model_q4.onnx", tmp_path / "elsewhere")
    (export / "onnx/model_q4.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError, match="links out"):
        publish(str(export))


def test_force_replaces_the_files_of_others(export: Path, capsys: Any) -> None:
    (export / INDEX).write_text("<h1>Mine</h1>")
    (export / "web").mkdir()
    (export / "web/mine").write_text("mine")
    assert command(capsys, "web", export, "--force").code == 0
    assert MARK in (export / INDEX).read_bytes()
    assert not (export / "web/mine").exists()


def test_the_page_is_none_of_the_files_that_force_warns_of(export: Path) -> None:
    publish(str(export))
    assert deletion_notes(str(export)) == ()
    (export / "web/mine").write_text("mine")
    assert "web/mine" in deletion_notes(str(export))[0]


class Failing(FileSystem):
    """Fails at the operation of this number."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.left = fails_at

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def create(self, path: str) -> int:
        self._count()
        return super().create(path)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._count()
        super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        self._count()
        super().sync(descriptor)

    def rename(self, source: str, target: str) -> None:
        if os.path.basename(target) != INDEX:
            self._count()
        super().rename(source, target)


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_all_or_nothing(export: Path, again: bool) -> None:
    """Whichever operation fails, the directory is as before; index.html is renamed last."""
    if again:
        publish(str(export))
        edit(export / "generation_config.json", do_sample=True, temperature=0.5)
        (export / "manifest.json").unlink()
    before = tree(export)
    for number in range(1, 100):
        file_system = Failing(number)
        try:
            publish(str(export), file_system=file_system)
        except OutputError:
            assert tree(export) == before, number
        else:
            assert file_system.left > 0
            break
    assert number > 15 and tree(export) != before


def test_libraries_must_be_the_pinned_ones(tmp_path: Path) -> None:
    every = [each for roles in libraries().values() for each in roles.values()]
    with pytest.raises(InputError) as caught:
        list(copies(str(tmp_path)))
    assert all(f"{each.path}: cannot be read" in str(caught.value) for each in every)
    assert caught.value.hint == "npm install " + " ".join(f"{name}@{version}" for name, version in packages().items())
    package = tmp_path / "onnxruntime-web"
    (package / "dist").mkdir(parents=True)
    (package / "package.json").write_text('{"version": "1.0.0"}')
    (tmp_path / every[1].path).write_bytes(b"other")
    with pytest.raises(InputError, match=r"is not the file of version 1\.31\..*; found version 1\.0\.0"):
        list(copies(str(tmp_path)))


def test_addresses_of_the_libraries() -> None:
    addresses = [
        file["url"]
        for part, roles in described(local=False).items()
        if part != "packages"
        for file in roles.values()  # type: ignore[attr-defined]
    ]
    assert len(addresses) == 7 and all(each.startswith(f"{CDN}/") for each in addresses)
    for name, version in packages().items():
        assert any(f"/{name}@{version}/dist/" in each for each in addresses)
    # The page may fetch from nowhere else.
    assert f"connect-src 'self' blob: {CDN}/;" in asset(INDEX).decode()
