"""What a file is when it is not what it claims, and that nothing but regular files is opened."""

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

from gptconvert.containers.untrusted import explain_bytes, explain_file, file_size, read_small
from gptconvert.errors import InputError, UnsafeInputError

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
    content, said = KNOWN[kind]
    (tmp_path / "file").write_bytes(content)
    assert said in (explain_file(tmp_path / "file") or "")
    assert said not in (explain_bytes(content, allow={kind}) or "")


@pytest.mark.parametrize("content", [b"\x00\x01\x02\xff" * 40, np.float32([1, 2]).tobytes(), bytes(8)])
def test_nothing_is_claimed_of_plain_data(content: bytes) -> None:
    assert explain_bytes(content) is None


def test_explaining_never_opens_what_could_block(tmp_path: Path) -> None:
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
    """Run as nobody: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_unreadable_file(unprivileged: None) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:  # nobody's own; pytest's directories are closed to nobody
        path = os.path.join(folder, "f")
        Path(path).write_bytes(b"secret")
        os.chmod(path, 0)
        for read in (file_size, lambda p: read_small(p, 10, "a test")):
            with pytest.raises(InputError, match="Permission denied"):
                read(path)
        assert explain_file(path) is None
