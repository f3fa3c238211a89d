"""Sources and outputs as URLs: digests, interrupted uploads, listings that lie."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gptconvert.batch import remote
from gptconvert.batch.alone import run_alone
from gptconvert.batch.jobs import Job, parse_job
from gptconvert.batch.memory import source_size
from gptconvert.errors import GptConvertError, InputError, OutputError, UnsafeInputError, UnsupportedError, UsageError
from tests.batch.test_jobs import listed
from tests.commands import TINY, command, tree

SOURCE = TINY / "hf-safetensors"
MODEL, OUT = "memory://bucket/models/tiny", "memory://bucket/out/tiny"


class Store(MemoryFileSystem):
    """Like an object store: listings with MD5 digests; faults on request."""

    protocol = "store"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    log: ClassVar[list[str]] = []
    wrong: ClassVar[set[str]] = set()
    fails: ClassVar[set[str]] = set()
    cut: ClassVar[set[str]] = set()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("store://", "memory://")))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path)
        if found["type"] == "file":
            import base64

            data = b"wrong" if os.path.basename(path) in self.wrong else self.cat_file(path)
            found["md5Hash"] = base64.b64encode(hashlib.md5(data).digest()).decode()
        return found

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        found = super().ls(path, detail=True)
        return [self.info(each["name"]) for each in found] if detail else [each["name"] for each in found]

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        name = os.path.basename(rpath)
        self.log.append(name)
        if name in self.fails:
            raise PermissionError("403 Forbidden")
        data = Path(lpath).read_bytes()
        self.pipe_file(rpath, data[:-1] if name in self.cut else data)

    def rm_file(self, path: str) -> None:
        self.log.append(f"-{os.path.basename(path)}")
        super().rm_file(path)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture(autouse=True)
def clean(scratch: None) -> Iterator[None]:
    fsspec.register_implementation("store", Store, clobber=True)
    yield
    for each in (MemoryFileSystem, Store):
        each.store.clear()
        each.pseudo_dirs[:] = [""]
    for faults in (Store.log, Store.wrong, Store.fails, Store.cut):
        faults.clear()
    assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("gptconvert-scratch-")]


def put(url: str, directory: Path = SOURCE) -> str:
    files, path = fsspec.core.url_to_fs(url)
    for file in directory.iterdir():
        files.pipe_file(f"{path}/{file.name}", file.read_bytes())
    return url


def found(url: str) -> dict[str, bytes]:
    files, path = fsspec.core.url_to_fs(url)
    return {name[len(path) :].lstrip("/"): files.cat_file(name) for name in sorted(files.find(path))}


def job(source: object = SOURCE, output: str = OUT, **options: Any) -> Job:
    given = {"verify": None, **options}
    return parse_job({"source": str(source), "output": output, "targets": ["safetensors"], "options": given})


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("serial") / "out"
    run_alone(job(output=str(output)))
    return tree(output)


@pytest.mark.parametrize("scheme", ["memory", "store"])
def test_source_and_output(scheme: str, serial: dict[str, bytes]) -> None:
    source, output = put(f"{scheme}://bucket/models/tiny"), f"{scheme}://bucket/out"
    record = run_alone(job(source, output))
    assert record.status == "converted"
    assert found(output) == serial
    noted = "not checked after the download, as the store lists no digest: config.json" in str(
        record.details["notes"]
    )
    assert noted == (scheme == "memory")
    again = run_alone(job(source, f"{output}/"))
    assert (again.status, again.details["manifest_sha256"]) == ("skipped", record.details["manifest_sha256"])


def test_the_command_with_files(tmp_path: Path, capsys: Any, serial: dict[str, bytes]) -> None:
    """``file://`` works across processes."""
    line = job(SOURCE.as_uri(), (tmp_path / "a b").as_uri().replace("%20", " ")).as_dict()
    path = listed(tmp_path, line)
    assert [command(capsys, "batch", path).code for _ in range(2)] == [0, 0]
    assert tree(tmp_path / "a b") == serial


def test_the_manifest_is_last(tmp_path: Path) -> None:
    run_alone(job(output="store://bucket/out"))
    assert Store.log[-2:] == ["SHA256SUMS", "manifest.json"]
    assert "model.safetensors" in Store.log[:-2]
    Store.log.clear()
    Store("store").pipe_file("/bucket/out/old.bin", b"x")
    with pytest.raises(OutputError, match="not up to date: its options differ: dtype"):
        run_alone(job(output="store://bucket/out", dtype="fp16"))
    assert Store.log == []
    run_alone(job(output="store://bucket/out", dtype="fp16", force=True))
    assert Store.log[0] == "-manifest.json", "readers must not find it beside files of another conversion"
    assert Store.log[-2:] == ["manifest.json", "-old.bin"]
    assert run_alone(job(output="store://bucket/out", dtype="fp16")).status == "skipped"


@pytest.mark.parametrize("fault", ["fails", "cut"])
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_an_upload_that_fails_leaves_nothing(fault: str, name: str, serial: dict[str, bytes]) -> None:
    getattr(Store, fault).add(name)
    with pytest.raises(OutputError, match={"fails": "cannot be uploaded", "cut": "another size"}[fault]) as caught:
        run_alone(job(output="store://bucket/out"))
    assert caught.value.path == f"store://bucket/out/{name}"
    assert found("store://bucket/out") == {}
    getattr(Store, fault).clear()
    assert run_alone(job(output="store://bucket/out")).status == "converted"
    assert found("store://bucket/out") == serial


def test_files_of_an_interrupted_upload_are_replaced(serial: dict[str, bytes]) -> None:
    files = MemoryFileSystem()
    files.pipe_file("/bucket/out/tiny/model.safetensors", b"half")
    assert run_alone(job()).status == "converted"
    assert found(OUT) == serial


def test_other_files_in_the_way() -> None:
    files = MemoryFileSystem()
    files.pipe_file("/bucket/out/tiny/thesis.tex", b"x")
    with pytest.raises(OutputError, match=r"not those of a conversion: thesis\.tex"):
        run_alone(job())
    assert found(OUT) == {"thesis.tex": b"x"}
    files.pipe_file("/bucket/file", b"x")
    with pytest.raises(OutputError, match="not a directory"):
        run_alone(job(output="memory://bucket/file"))


def test_a_damaged_output_is_not_skipped() -> None:
    run_alone(job())
    MemoryFileSystem().pipe_file("/bucket/out/tiny/model.safetensors", b"damaged")
    with pytest.raises(OutputError, match=r"model\.safetensors was changed"):
        run_alone(job())


def test_the_digest_of_the_store() -> None:
    put("store://bucket/m")
    Store.wrong.add("model.safetensors")
    with pytest.raises(InputError, match="the download does not match the store's md5") as caught:
        run_alone(job("store://bucket/m"))
    assert caught.value.path == "store://bucket/m/model.safetensors"


def test_checksums_beside_the_source(tmp_path: Path) -> None:
    source = Path(shutil.copytree(SOURCE, tmp_path / "m"))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.iterdir()}
    (source / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    record = run_alone(job(put(MODEL, source)))
    assert "not checked" not in str(record.details["notes"])
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"x")
    put(MODEL, source)
    with pytest.raises(InputError, match="the download does not match SHA256SUMS"):
        run_alone(job(MODEL, "memory://bucket/other"))


def test_a_source_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    put(MODEL)
    read = remote._write

    def write(file: Any, block: bytes, path: str) -> None:
        read(file, block, path)
        MemoryFileSystem().pipe_file(f"/bucket/models/tiny/{os.path.basename(path)}", b"another")

    monkeypatch.setattr(remote, "_write", write)
    with pytest.raises(InputError, match="input changed while it was being read"):
        run_alone(job(MODEL))


def test_a_prefix_brings_its_files_and_the_small_ones_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    put(MODEL, TINY / "openai-tf")
    put(f"{MODEL}-other", TINY / "openai-tf")
    monkeypatch.setattr(remote, "MAX_BESIDE", 1000)
    prefix = next((TINY / "openai-tf").glob("*.index")).name.removesuffix(".index")
    MemoryFileSystem().pipe_file("/bucket/models/tiny/large.bin", bytes(2000))
    given = job(f"{MODEL}/{prefix}")
    sizes = {path.name: path.stat().st_size for path in (TINY / "openai-tf").iterdir()}
    assert source_size(given) == sum(n for name, n in sizes.items() if name.startswith(prefix) or n <= 1000)
    assert run_alone(given).status == "converted"


@pytest.mark.parametrize("name", ["../../up", "a/../../up", "a//b"])
def test_names_that_lead_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(MODEL)
    listing = MemoryFileSystem.find

    def find(self: Any, path: str, **settings: Any) -> Any:
        entries = listing(self, path, **settings)
        return {**entries, f"{path}/{name}": next(iter(entries.values()))}

    monkeypatch.setattr(MemoryFileSystem, "find", find)
    with pytest.raises(UnsafeInputError, match="leads out of the directory"):
        run_alone(job(MODEL))


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    put(MODEL)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match="not enough free space to download the source"):
        run_alone(job(MODEL))


@pytest.mark.parametrize(
    ("source", "kind", "part"),
    [
        ("memory://bucket/missing", InputError, "no such file or directory"),
        ("nonsense://bucket/x", UsageError, "not a URL that fsspec can open"),
    ],
)
def test_sources_that_cannot_be_opened(source: str, kind: type[GptConvertError], part: str) -> None:
    with pytest.raises(kind, match=part) as caught:
        run_alone(job(source))
    assert caught.value.path == source
    assert source_size(job(source)) == 0


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UnsupportedError, match="s3fs"):
        run_alone(job("s3://bucket/x"))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UnsupportedError, match="fsspec, which is not installed") as caught:
        run_alone(job("s3://bucket/x"))
    assert caught.value.hint == "pip install 'fsspec>=2024.5'"


def test_verification_comes_before_the_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptconvert.errors import VerificationError

    def fail(*_: Any) -> None:
        raise VerificationError("wrong")

    monkeypatch.setattr("gptconvert.pipeline._verified", fail)
    with pytest.raises(VerificationError):
        run_alone(job(output="store://bucket/out"))
    assert Store.log == []
    assert json.dumps(found("store://bucket/out")) == "{}"
