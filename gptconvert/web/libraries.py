"""The JavaScript libraries of the page: pinned versions with integrity hashes, on a public CDN or beside the page."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from gptconvert.containers.json import read_json_object
from gptconvert.errors import GptConvertError, InputError

CDN = "https://cdn.jsdelivr.net/npm"
#: Folder of the copies, relative to the page.
FOLDER = "web/lib"
#: Package → (its licence, where the text is: a file of the package itself, or of ours).
LICENCES: Mapping[str, tuple[str, str | None]] = {
    "@huggingface/tokenizers": ("Apache-2.0", "LICENSE"),
    "onnxruntime-web": ("MIT", None),  # the package has no licence file
}


@dataclass(frozen=True)
class Library:
    """A file of an npm package.

    Attributes:
        path: ``PACKAGE/PATH``, as in ``node_modules``.
        size: in bytes.
        integrity: ``sha384-`` and the digest in base64 (W3C Subresource Integrity).
    """

    path: str
    size: int
    integrity: str

    @property
    def package(self) -> str:
        """Name of its package."""
        return next(name for name in packages() if self.path.startswith(f"{name}/"))

    @property
    def name(self) -> str:
        """Name of the file; no two files have the same."""
        return self.path.rpartition("/")[2]


def packages() -> Mapping[str, str]:
    """Package → version."""
    found: Mapping[str, str] = _table()["packages"]
    return found


def libraries() -> Mapping[str, Mapping[str, Library]]:
    """Part of the page (``tokenizer``, ``wasm``, ``webgpu``) → role (``module``, ``glue``, ``binary``) → file."""
    table = _table()
    return {
        part: {role: Library(**entry) for role, entry in files.items()}
        for part, files in table.items()
        if part != "packages"
    }


def described(*, local: bool) -> dict[str, object]:
    """The libraries for the page: addresses, sizes and hashes, with the versions and licences of the packages."""
    files = {
        part: {
            role: {"url": _url(each, local), "size": each.size, "integrity": each.integrity}
            for role, each in roles.items()
        }
        for part, roles in libraries().items()
    }
    about = [{"name": name, "version": version, "licence": LICENCES[name][0]} for name, version in packages().items()]
    return {"packages": about, **files}


def copies(node_modules: str) -> Iterator[tuple[str, bytes]]:
    """(path relative to the page, content) of every library and licence, from a ``node_modules`` folder.

    Raises:
        InputError: files are missing, or differ from the pinned versions. Lists all of them.
    """
    problems: list[str] = []
    found: list[tuple[str, bytes]] = []
    for roles in libraries().values():
        for each in roles.values():
            try:
                found.append((f"{FOLDER}/{each.name}", _read(node_modules, each)))
            except _WrongError as error:
                problems.append(f"{each.path}: {error}")
    if problems:
        wanted = " ".join(f"{name}@{version}" for name, version in packages().items())
        raise InputError(
            "lacks the libraries of the page\n  " + "\n  ".join(problems),
            path=node_modules,
            hint=f"npm install {wanted}",
        )
    yield from found
    for name, (_, file) in LICENCES.items():
        text = _own("licences/onnxruntime-web.txt") if file is None else _licence(node_modules, name, file)
        yield f"{FOLDER}/LICENSE-{name.rpartition('/')[2]}.txt", text


class _WrongError(Exception):
    """A library that is not the pinned one; the message says why."""


def _read(node_modules: str, library: Library) -> bytes:
    try:
        with open(os.path.join(node_modules, library.path), "rb") as file:
            data = file.read(library.size + 1)
    except OSError as error:
        raise _WrongError(f"cannot be read ({error.strerror})") from error
    digest = base64.b64encode(hashlib.sha384(data).digest()).decode()
    if f"sha384-{digest}" != library.integrity:
        package = library.package
        raise _WrongError(
            f"is not the file of version {packages()[package]}; found {_version(node_modules, package)}"
        )
    return data


def _version(node_modules: str, package: str) -> str:
    """The version that a package states."""
    try:
        stated = read_json_object(os.path.join(node_modules, package, "package.json"), 1 << 20, "package.json")
    except GptConvertError:
        return "no version"
    return f"version {stated.get('version')}"


def _licence(node_modules: str, package: str, file: str) -> bytes:
    path = os.path.join(node_modules, package, file)
    try:
        with open(path, "rb") as opened:
            return opened.read(1 << 20)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path, hint=f"npm install {package}") from error


def _url(library: Library, local: bool) -> str:
    if local:
        return f"{FOLDER}/{library.name}"
    package = library.package
    return f"{CDN}/{package}@{packages()[package]}{library.path[len(package) :]}"


@functools.cache
def _table() -> dict[str, Any]:
    """The pins: ``packages`` (name → version), and for each part of the page its files."""
    table: dict[str, Any] = json.loads(_own("libraries.json"))
    return table


def _own(name: str) -> bytes:
    return resources.files("gptconvert.web").joinpath(name).read_bytes()
