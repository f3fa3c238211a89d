"""Files of the wrong kind are identified, and only regular files are opened."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptconvert.containers.untrusted import (
    entries,
    explain_bytes,
    explain_file,
    file_beside,
    file_size,
    hub_homes,
    is_plain_name,
    is_regular,
    links_out,
    no_such_path,
    read_head,
    read_small,
)
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError

pytestmark = pytest.mark.usefixtures("no_hang")


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"b")
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
KNOWN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "lfs": (LFS, "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s3--ab\n", "git-annex"),
    "html": (b"\xef\xbb\xbf\r\n <!DOCTYPE HTML><p>Sign in", "HTML page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>BlobNotFound</Code>', "XML page"),
    "gzip": (gzip.compress(b"a"), "gzip"),
    "bzip2": (bz2.compress(b"a"), "bzip2"),
    "xz": (lzma.compress(b"a"), "xz"),
    "zip": (_zip(), "zip archive"),
    "tar": (_tar(), "tar archive"),
    "npy": (_npy(), "NumPy"),
    "pickle": (pickle.dumps({"a": 1}, protocol=4), "pickle"),
    "zeros": (bytes(512), "zero bytes"),
    "text": (b"Access denied.\nGo away.\n", "text file that begins with 'Access denied.'"),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_known_kinds_are_named(tmp_path: Path, kind: str) -> None:
    content, words = KNOWN[kind]
    (tmp_path / "file").write_bytes(content)
    assert words in (explain_file(tmp_path / "file") or "")
    assert words not in (explain_bytes(content, allow={kind}) or "")


@pytest.mark.parametrize("content", [b"\x00\x01\x02\xff" * 40, np.float32([1, 2]).tobytes(), bytes(8)])
def test_plain_data_has_no_explanation(content: bytes) -> None:
    assert explain_bytes(content) is None


def test_explain_file_never_opens_files_that_could_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert explain_file(tmp_path / "fifo") is None
    assert explain_file("/dev/zero") is None
    assert explain_file(tmp_path) is None
    assert explain_file(tmp_path / "missing") is None
    assert explain_file("nul\0byte") is None


def _socket(path: str) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (os.mkdir, "a directory"),
        (os.mkfifo, "a named pipe"),
        (_socket, "a socket"),
        (lambda path: os.symlink("/dev/null", path), "a character device"),
    ],
    ids=["directory", "fifo", "socket", "device"],
)
@pytest.mark.parametrize("read", [file_size, lambda path: read_small(path, 10, "a test")], ids=["size", "content"])
def test_only_regular_files(
    tmp_path: Path, make: Callable[[str], None], found: str, read: Callable[[str], object]
) -> None:
    path = str(tmp_path / "f")
    make(path)
    with pytest.raises(UnsafeInputError) as caught:
        read(path)
    assert caught.value.found == found


def test_missing_and_impossible_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file is missing"):
        file_size(tmp_path / "missing")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(InputError, match="file is missing"):
        file_size(tmp_path / "dangling")
    for name in ("a" * 300, "nul\0byte"):
        with pytest.raises(InputError, match="cannot be read"):
            file_size(str(tmp_path / name))


def test_size_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    assert file_size(tmp_path / "f") == 10
    assert read_small(tmp_path / "f", 10, "a test") == b"0123456789"
    with pytest.raises(InputError, match="too large for a test; expected at most 9 bytes, found 10 bytes"):
        read_small(tmp_path / "f", 9, "a test")


@pytest.fixture
def unprivileged() -> object:
    """Run as the user nobody: root can read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_unreadable_file(unprivileged: None) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:  # pytest's directories are not accessible to the user nobody
        path = os.path.join(folder, "f")
        Path(path).write_bytes(b"secret")
        os.chmod(path, 0)
        for read in (file_size, lambda p: read_small(p, 10, "a test")):
            with pytest.raises(InputError, match="Permission denied"):
                read(path)
        assert explain_file(path) is None


# --- directories and links ----------------------------------------------------------------------------------------


def test_entries(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to("b")
    for name in ("c", "a"):
        (tmp_path / name).touch()
    (tmp_path / "dangling").symlink_to("nothing")
    assert entries(str(tmp_path)) == ["a", "b", "c", "dangling", "link"]
    assert entries(str(tmp_path), files_only=True) == ["a", "c", "dangling"]
    for path in (str(tmp_path / "none"), str(tmp_path / "a"), "nul\0byte"):
        assert entries(path, quiet=True) == []
        with pytest.raises(InputError, match="directory cannot be read"):
            entries(path)


def test_similar_names_are_suggested_for_a_missing_path(tmp_path: Path) -> None:
    (tmp_path / "gpt2-small").mkdir()
    for path in (tmp_path / "gpt2-smal", tmp_path / "gpt2-smal" / "deeper"):
        assert f"{tmp_path}/gpt2-small?" in str(no_such_path(str(path)).hint)
    assert "hub repository" in str(no_such_path(str(tmp_path / "other")).hint)
    assert "hub repository" in str(no_such_path("nul\0byte").hint)
    assert no_such_path(str(tmp_path / "other"), hub=False).hint is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", "C:a", "/a"])
def test_paths_are_not_plain_names(name: str) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("a.b-c")


def test_only_files_and_links_to_files_are_regular(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    assert [name for name in entries(str(tmp_path)) if is_regular(str(tmp_path / name))] == ["file", "link"]
    assert not is_regular("nul\0byte")


def test_head(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(bytes(range(256)) * 9)
    assert read_head(tmp_path / "long") == bytes(range(256)) * 2
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeInputError):
        read_head(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("target", "inside"),
    [
        ("cache/models--x/snapshots/0123/real", True),
        ("cache/models--x/blobs/real", True),
        ("cache/blobs/real", True),
        ("cache/models--y/blobs/real", False),
        ("cache/models--x/snapshots/4567/real", False),
        ("cache/models--x/snapshots/01234/real", False),
    ],
)
def test_where_links_of_a_hub_cache_may_lead(tmp_path: Path, target: str, inside: bool) -> None:
    snapshot = tmp_path / "cache" / "models--x" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).touch()
    (snapshot / "link").symlink_to(tmp_path / target)
    assert links_out(str(snapshot / "link"), hub_homes(str(snapshot))) is not inside


def test_a_blobs_directory_that_is_itself_a_link_leads_out(tmp_path: Path) -> None:
    snapshot = tmp_path / "x" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").touch()
    (tmp_path / "x" / "blobs").symlink_to(tmp_path / "secret")
    (snapshot / "link").symlink_to("../../blobs/key")
    assert links_out(str(snapshot / "link"), hub_homes(str(snapshot)))


@pytest.mark.parametrize(
    ("location", "error", "message"),
    [
        ("data", None, ""),
        ("sub/data", None, ""),
        ("inside", None, ""),
        ("../data", UnsafeInputError, "leaves the directory"),
        ("sub/../../data", UnsafeInputError, "leaves the directory"),
        ("/etc/passwd", UnsafeInputError, "leaves the directory"),
        ("sub\\data", UnsafeInputError, "leaves the directory"),
        ("C:data", UnsafeInputError, "leaves the directory"),
        ("da\0ta", UnsafeInputError, "leaves the directory"),
        ("outside", UnsafeInputError, "links out of the directory"),
        ("sub", UnsafeInputError, "not a regular file"),
        ("pipe", UnsafeInputError, "not a regular file"),
        ("gone", InputError, "'gone': file is missing"),
    ],
)
def test_files_that_another_file_names(
    tmp_path: Path, location: str, error: type[GptConvertError] | None, message: str
) -> None:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    for path in (tmp_path / "data", home / "data", home / "sub" / "data", home / "model"):
        path.touch()
    (home / "inside").symlink_to("data")
    (home / "outside").symlink_to("../data")
    os.mkfifo(home / "pipe")
    if error is None:
        assert file_beside(str(home / "model"), location, "data file") == os.path.realpath(home / location)
    else:
        with pytest.raises(error, match=message):
            file_beside(str(home / "model"), location, "data file")


def test_files_that_are_links_into_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, store = tmp_path / "home", tmp_path / "store"
    home.mkdir()
    store.mkdir()
    for name in ("model", "data"):
        (store / name[::-1]).touch()
        (home / name).symlink_to(store / name[::-1])
    monkeypatch.chdir(home)
    for path in ("model", str(home / "model")):
        assert file_beside(path, "data", "data file") == str(store / "atad")
