"""A repository's listing: the commit that a revision names, and its files with sizes and digests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from gptconvert.containers.untrusted import explain_bytes, is_plain_name
from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.sources.hub_http import COMMIT, guarded

#: 100,000 files, the most that the hub recommends for a repository, take some 25 MB.
MAX_BYTES, MAX_VALUES = 32 << 20, 1_000_000
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Digest:
    """A file's digest as the hub lists it: SHA-256 for large files, the git blob id for small ones."""

    value: str
    git: bool


@dataclass(frozen=True)
class Entry:
    """A file: its size in bytes and its digest, each None if not listed."""

    size: int | None
    digest: Digest | None


@dataclass(frozen=True)
class Listing:
    """A commit's files.

    Attributes:
        commit: the full hash.
        files: name → entry of the files at the top of the repository.
        names: names at the top of the repository, directories with ``/``.
    """

    commit: str
    files: Mapping[str, Entry]
    names: tuple[str, ...]


def read_listing(repo: str, revision: str | None) -> Listing:
    """Fetch the listing of a revision; None is the default branch.

    Raises:
        InputError: the reply is not a listing.
        UnsafeInputError: a file's name leads out of the repository.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    url = f"{constants.ENDPOINT}/api/models/{repo}{at}"
    with guarded(url, MAX_BYTES):
        options: dict[str, Any] = {"params": {"blobs": True}, "timeout": constants.HF_HUB_ETAG_TIMEOUT}
        with get_session().stream("GET", url, headers=build_hf_headers(), **options) as response:
            hf_raise_for_status(response)
            data = response.read()
    return parse_listing(data, url)


def parse_listing(data: bytes, url: str) -> Listing:
    """The listing in a reply. Raises as :func:`read_listing`."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise InputError("the repository's listing is too long", path=url, expected=f"at most {MAX_VALUES} values")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        kind = explain_bytes(data[:512]) or "is not JSON"
        hint = "check HF_ENDPOINT, proxies, and whether the network needs a login in the browser"
        what = f"the reply should be the repository's listing, but {kind}"
        raise InputError(what, path=url, hint=hint) from error
    if not isinstance(value, dict) or not isinstance(value.get("siblings"), list):
        raise _malformed(url, "an object with `siblings`", type(value).__name__)
    commit = value.get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _malformed(url, "a commit in `sha`", commit)
    entries: dict[str, Entry] = {}
    for sibling in value["siblings"]:
        name = sibling.get("rfilename") if isinstance(sibling, dict) else None
        if not isinstance(name, str):
            raise _malformed(url, "a file name in each of `siblings`", sibling)
        if name in entries:
            raise _malformed(url, "each file once", name)
        if "\0" in name or {"", ".", ".."} & set(name.split("/")):
            what = "the listing has a file name that leads out of the repository"
            raise UnsafeInputError(what, path=url, found=name)
        entries[name] = _entry(sibling, url)
    names = {head + slash for name in entries for head, slash, _ in [name.partition("/")]}
    # A name with a backslash or a drive is a path on some systems: it is listed, but never fetched.
    files = {name: entry for name, entry in entries.items() if is_plain_name(name)}
    return Listing(commit, files, tuple(sorted(names)))


def _entry(sibling: Mapping[str, Any], url: str) -> Entry:
    lfs, blob = sibling.get("lfs"), sibling.get("blobId")
    if lfs is not None and not isinstance(lfs, dict):
        raise _malformed(url, "an object in `lfs`", lfs)
    size = sibling.get("size") if lfs is None else lfs.get("size", sibling.get("size"))
    if size is not None and (type(size) is not int or size < 0):
        raise _malformed(url, "a number of bytes in `size`", size)
    value, form = (blob, _SHA1) if lfs is None else (lfs.get("sha256"), _SHA256)
    if value is None:
        return Entry(size, None)
    if not isinstance(value, str) or not form.fullmatch(value):
        raise _malformed(url, "a digest", value)
    return Entry(size, Digest(value, git=lfs is None))


def _malformed(url: str, expected: str, found: object) -> InputError:
    return InputError("the repository's listing is malformed", path=url, expected=expected, found=str(found)[:80])
