"""Sources and outputs on object stores and other remote file systems, by fsspec.

A source is downloaded to a scratch directory, and compared with the digests that the store or a SHA256SUMS beside it
records. An output is uploaded once it is verified, the manifest last: readers treat an output without one as absent.
Credentials come from the environment, as each file system documents.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from gptconvert.containers.untrusted import is_plain_name
from gptconvert.errors import (
    GptConvertError,
    InputError,
    OutputError,
    UnsafeInputError,
    UnsupportedError,
    UsageError,
    install_hint,
    reason,
)
from gptconvert.publish.checksums import MAX_SUMS, parse_sums
from gptconvert.publish.manifest import MANIFEST_FILE, SUMS_FILE

#: Most files of a source.
MAX_FILES = 10_000
#: Largest file that is fetched because it is beside a source that is a file: configurations and tokenizers.
MAX_BESIDE = 64 << 20
_BLOCK = 4 << 20
#: Fields of a listing that change when a file is replaced.
_STATE = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "generation", "created")
#: Field of a listing → the algorithm of its digest, and the decoding. ETag is left out: it is not always an MD5.
_DIGESTS: Mapping[str, tuple[str, Callable[[Any], str | None]]] = {
    "sha256": ("sha256", lambda value: value if isinstance(value, str) else None),
    "lfs": ("sha256", lambda value: value.get("sha256") if isinstance(value, dict) else None),
    "md5": ("md5", lambda value: value if isinstance(value, str) else None),
    "md5Hash": ("md5", lambda value: base64.b64decode(value).hex()),
}


@contextmanager
def _errors(url: str, kind: type[GptConvertError], what: str) -> Iterator[None]:
    """Convert what fsspec and its file systems raise, each its own classes, to an error of ours."""
    try:
        yield
    except GptConvertError:
        raise
    except FileNotFoundError as error:
        raise kind("no such file or directory", path=url) from error
    except Exception as error:
        raise kind(f"{what} ({reason(error) or type(error).__name__})", path=url) from error


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        UnsupportedError: fsspec, or the package of the protocol, is not installed.
        UsageError: fsspec does not know the protocol.
    """
    try:
        import fsspec
    except ModuleNotFoundError:
        what = "URLs need the Python package fsspec, which is not installed"
        raise UnsupportedError(what, path=url, hint=install_hint("remote")) from None
    try:
        found, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise UnsupportedError(f"the file system of the URL cannot be used ({error})", path=url) from error
    except ValueError as error:
        raise UsageError(f"not a URL that fsspec can open ({error})", path=url) from error
    except Exception as error:
        raise InputError(f"cannot be opened ({reason(error)})", path=url) from error
    return found, path.rstrip("/")


def size_of(url: str) -> int:
    """Bytes of the files of a source.

    Raises:
        GptConvertError: it cannot be listed.
    """
    files, path = file_system(url)
    with _errors(url, InputError, "cannot be listed"):
        return sum(info.get("size") or 0 for info in _listing(files, path, url)[1].values())


def _listing(files: Any, path: str, url: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The source's directory, and its files by their path in it.

    Raises:
        InputError: there are none, or too many.
        UnsafeInputError: a name leads out of the directory.
    """
    is_directory = files.isdir(path)
    folder = path if is_directory else path.rpartition("/")[0]
    if is_directory:
        found = files.find(folder, detail=True)
    else:
        stem = path.rpartition("/")[2]
        listed = [info for info in files.ls(folder, detail=True) if info["type"] == "file"]
        named = [info["name"] for info in listed if _relative(info["name"], folder).startswith(stem)]
        beside = [info for info in listed if info["name"] in named or (info.get("size") or 0) <= MAX_BESIDE]
        found = {info["name"]: info for info in beside if named}
    if not found:
        raise InputError("no such file or directory", path=url)
    if len(found) > MAX_FILES:
        raise InputError("too many files", path=url, expected=f"at most {MAX_FILES}", found=len(found))
    entries = {_relative(name, folder): info for name, info in found.items()}
    for name in entries:
        if not all(is_plain_name(part) for part in name.split("/")):
            raise UnsafeInputError(
                "the listing has a file name that leads out of the directory", path=url, found=name
            )
    return folder, entries


def _relative(name: str, folder: str) -> str:
    return name.lstrip("/").removeprefix(folder.lstrip("/")).lstrip("/")


def fetch(url: str, directory: str) -> tuple[str, list[str]]:
    """Download a source; returns its local path, and notes for the user.

    Args:
        url: a directory; or a file or the prefix of several, which are fetched with the small files beside them.
        directory: an empty directory.

    Raises:
        InputError: missing, cannot be read, changed meanwhile, or without the digest that is recorded for it.
        OutputError: it does not fit on the disk.
    """
    files, path = file_system(url)
    with _errors(url, InputError, "cannot be read"):
        folder, entries = _listing(files, path, url)
        _require_space(directory, sum(info.get("size") or 0 for info in entries.values()), url)
        # The name of the directory is part of some formats.
        root = os.path.join(directory, folder.rpartition("/")[2] or "source")
        base = url.rstrip("/") if folder == path else url.rpartition("/")[0]
        sums = {name: _download(files, info, root, name, f"{base}/{name}") for name, info in entries.items()}
        recorded = _recorded_sums(root) if SUMS_FILE in entries else {}
        for name in sums.keys() & recorded.keys():
            if sums[name][0] != recorded[name]:
                raise _damaged(f"{base}/{name}", SUMS_FILE, recorded[name], sums[name][0])
    unchecked = [name for name, (_, checked) in sums.items() if not checked and name not in recorded]
    unchecked = [name for name in unchecked if name != SUMS_FILE]
    some = ", ".join(sorted(unchecked)[:5])
    notes = [f"not checked after the download, as the store lists no digest: {some}"] if unchecked else []
    return root if folder == path else os.path.join(root, path.rpartition("/")[2]), notes


def _require_space(directory: str, nbytes: int, url: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        hint = "free some space, or choose another directory for temporary files with TMPDIR"
        what = "not enough free space to download the source"
        raise OutputError(what, path=url, expected=f"{nbytes} bytes", found=f"{free} bytes in {directory}", hint=hint)


def _download(files: Any, info: Mapping[str, Any], root: str, name: str, shown: str) -> tuple[str, bool]:
    """Download one file; returns its SHA-256, and whether a digest of the store's was compared."""
    target = os.path.join(root, name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    before = files.info(info["name"])  # a listing may format its fields differently
    hashes, nbytes = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}, 0
    with files.open(info["name"], "rb") as source, open(target, "wb") as copy:
        while block := source.read(_BLOCK):
            nbytes += len(block)
            for each in hashes.values():
                each.update(block)
            _write(copy, block, target)
    now = files.info(info["name"])
    if any(before.get(key) != now.get(key) for key in _STATE) or nbytes != now.get("size", nbytes):
        hint = "wait until it is complete, then run the job again"
        raise InputError("input changed while it was being read", path=shown, hint=hint)
    checked, info = False, {**info, **before}
    for key, (algorithm, decode) in _DIGESTS.items():
        expected = decode(info[key]) if info.get(key) else None
        if expected is not None:
            checked = True
            if hashes[algorithm].hexdigest() != expected.lower():
                raise _damaged(shown, f"the store's {algorithm}", expected, hashes[algorithm].hexdigest())
    return hashes["sha256"].hexdigest(), checked


def _write(file: IO[bytes], block: bytes, path: str) -> None:
    try:
        file.write(block)
    except OSError as error:
        raise OutputError(f"cannot be written ({reason(error)})", path=path) from error


def _damaged(path: str, record: str, expected: str, found: str) -> InputError:
    what = f"the download does not match {record}"
    return InputError(what, path=path, expected=expected, found=found, hint="the file is damaged; upload it again")


def _recorded_sums(root: str) -> dict[str, str]:
    with open(os.path.join(root, SUMS_FILE), "rb") as file:
        return parse_sums(file.read(MAX_SUMS)).digests


class RemoteOutput:
    """A directory on a remote file system.

    Args:
        url: where to publish.
        directory: the local directory to convert to; it does not exist.
        names: relative paths of the files that will be published.
        force: whether an output that is not up to date may be replaced.

    Raises:
        OutputError: it cannot be listed, or holds files that an upload would not replace.
    """

    def __init__(self, url: str, directory: str, names: set[str], *, force: bool = False) -> None:
        self.directory, self._url, self._force = directory, url.rstrip("/"), force
        self._files, self._path = file_system(url)
        self._found = self._existing()
        strange = sorted(self._found - names)
        if strange and not force and not self.exists():
            some = ", ".join(strange[:5])
            what = f"output exists and holds files that are not those of a conversion: {some}"
            raise OutputError(what, path=url, hint="choose another output, or delete them with --force")

    def exists(self) -> bool:
        """Whether there is a complete output. Files of an upload that was interrupted do not count."""
        return MANIFEST_FILE in self._found

    def open(self, name: str) -> IO[bytes]:
        """Open a file of the existing output. Raises OSError."""
        file: IO[bytes] = self._files.open(f"{self._path}/{name}", "rb")
        return file

    def _existing(self) -> set[str]:
        with _errors(self._url, OutputError, "cannot be listed"):
            if not self._files.exists(self._path):
                return set()
            if not self._files.isdir(self._path):
                raise OutputError("output exists and is not a directory", path=self._url)
            return {_relative(name, self._path) for name in self._files.find(self._path)}

    def publish(self) -> None:
        """Upload the converted directory, the manifest last. If that fails, remove what was uploaded.

        Raises:
            OutputError: a file could not be uploaded. There is no manifest, and so no output.
        """
        names = sorted(_names(self.directory), key=lambda name: (name == MANIFEST_FILE, name == SUMS_FILE, name))
        begun: list[str] = []
        try:
            if self.exists():
                self._remove([MANIFEST_FILE])
            for name in names:
                begun.append(name)
                self._upload(name)
            if self._force:
                self._remove(sorted(self._found - set(names)))
        except BaseException:
            with suppress(Exception):
                self._remove([name for name in reversed(begun) if name in self._existing()])
            raise

    def _upload(self, name: str) -> None:
        local, remote, shown = os.path.join(self.directory, name), f"{self._path}/{name}", f"{self._url}/{name}"
        with _errors(shown, OutputError, "cannot be uploaded"):
            self._files.makedirs(remote.rpartition("/")[0], exist_ok=True)
            self._files.put_file(local, remote)
            found, expected = self._files.info(remote).get("size"), os.path.getsize(local)
        if found != expected:
            what = "the uploaded file has another size"
            raise OutputError(what, path=shown, expected=f"{expected} bytes", found=f"{found} bytes")

    def _remove(self, names: list[str]) -> None:
        with _errors(self._url, OutputError, "cannot be replaced"):
            for name in names:
                self._files.rm_file(f"{self._path}/{name}")


def _names(directory: str) -> Iterator[str]:
    """Relative paths of all files, with forward slashes."""
    for folder, _, names in os.walk(directory):
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), directory).replace(os.sep, "/")
