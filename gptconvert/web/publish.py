"""Write the page into an export's directory: ``web/`` and ``index.html``, all or nothing."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

from gptconvert.containers.json import dump_json
from gptconvert.errors import OutputError, os_errors_as
from gptconvert.publish import signals
from gptconvert.publish.checksums import dump_sums
from gptconvert.publish.file_system import OS, FileSystem
from gptconvert.publish.manifest import SUMS_FILE
from gptconvert.publish.replaceable import WEB_INDEX
from gptconvert.publish.staging import Staging
from gptconvert.web.libraries import copies
from gptconvert.web.site import describe

INDEX, FOLDER, DOCUMENT = WEB_INDEX, "web", "site.json"
#: In every page that this program wrote.
MARK = b'<meta name="generator" content="gptconvert">'
ASSETS = ("app.js", "style.css", "unpack.js", "worker.js")
_TEMPORARY = f".{INDEX}.gptconvert-"


@dataclass(frozen=True)
class Site:
    """A published page.

    Attributes:
        directory: the export.
        files: paths relative to it, with their sizes in bytes.
        document: of :func:`gptconvert.web.site.describe`.
        notes: for the user.
    """

    directory: str
    files: Mapping[str, int]
    document: Mapping[str, Any]
    notes: tuple[str, ...]


def publish(
    directory: str, node_modules: str | None = None, *, force: bool = False, file_system: FileSystem = OS
) -> Site:
    """Write the page for an export, or replace the one that is there.

    Args:
        directory: the export.
        node_modules: folder to copy the libraries from; None to load them from the CDN.
        force: whether files that this program did not write may be replaced.
        file_system: the file operations.

    Raises:
        InputError, UnsafeInputError, UnsupportedError: see :func:`~gptconvert.web.site.describe` and
            :func:`~gptconvert.web.libraries.copies`.
        OutputError: the page cannot be written, or would replace another file.
    """
    document = describe(directory, local=node_modules is not None)
    files = {f"{FOLDER}/{name}": asset(name) for name in ASSETS}
    files |= {} if node_modules is None else dict(copies(node_modules))
    files[f"{FOLDER}/{DOCUMENT}"] = dump_json(document)
    files[INDEX] = asset(INDEX)
    files[f"{FOLDER}/{SUMS_FILE}"] = _sums(files)
    if not force:
        _check_ours(directory)
    with Staging(os.path.join(directory, FOLDER), force=True, file_system=file_system) as staging:
        staging.require_space(sum(map(len, files.values())))
        with _prepared(directory, files[INDEX], file_system) as replace:
            for path, content in files.items():
                folder, _, name = path.partition("/")
                if folder == FOLDER:
                    _write(file_system, os.path.join(staging.path, name), content)
            with signals.held():
                staging.publish()
                replace()
    return Site(directory, {path: len(content) for path, content in files.items()}, document, tuple(staging.notes))


def asset(name: str) -> bytes:
    """A file of the page that is the same for every export."""
    return resources.files("gptconvert.web").joinpath("assets", name).read_bytes()


def _sums(files: Mapping[str, bytes]) -> bytes:
    """For ``sha256sum -c web/SHA256SUMS`` in the export's directory."""
    return dump_sums({path: hashlib.sha256(data).hexdigest() for path, data in files.items()})


def _check_ours(directory: str) -> None:
    """Refuse to replace what another program wrote."""
    index, folder = os.path.join(directory, INDEX), os.path.join(directory, FOLDER)
    hint = "move it away, or replace it with --force"
    with os_errors_as(OutputError, "cannot be examined", index):
        if os.path.lexists(index) and not (os.path.isfile(index) and MARK in _head(index)):
            raise OutputError("exists and is not a page of gptconvert", path=index, hint=hint)
        if os.path.lexists(folder) and not os.path.isfile(os.path.join(folder, DOCUMENT)):
            raise OutputError("exists and is not the folder of a page of gptconvert", path=folder, hint=hint)


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1 << 12)


@contextmanager
def _prepared(directory: str, content: bytes, file_system: FileSystem) -> Iterator[Any]:
    """Write ``index.html`` under a temporary name; the function yielded renames it, which needs no more space."""
    path = os.path.join(directory, INDEX)
    with os_errors_as(OutputError, "cannot be written", path):
        if os.path.isdir(path):
            raise OutputError("is a directory", path=path, hint="move it away")
        for name in os.listdir(directory):  # of a killed run: Staging's lock keeps others out
            if name.startswith(_TEMPORARY):
                file_system.remove_file(os.path.join(directory, name))
    temporary = os.path.join(directory, _TEMPORARY + secrets.token_hex(3))

    def replace() -> None:
        with os_errors_as(OutputError, "cannot be written", path):
            file_system.rename(temporary, path)
            file_system.sync_path(directory)

    try:
        _write(file_system, temporary, content)
        yield replace
    finally:
        with suppress(FileNotFoundError):
            file_system.remove_file(temporary)


def _write(file_system: FileSystem, path: str, content: bytes) -> None:
    """Write a new file."""
    with os_errors_as(OutputError, "cannot be written", path):
        if not os.path.isdir(os.path.dirname(path)):
            file_system.make_directory(os.path.dirname(path))
        descriptor = file_system.create(path)
        try:
            file_system.write(descriptor, content, 0)
            file_system.sync(descriptor)
        finally:
            file_system.close(descriptor)
