"""One file from the hub into the cache: checked against the listing, and removed again if it is damaged.

huggingface_hub compares only lengths. What is removed was created by this run, and is inside the repository's
directory of the cache: links are not followed.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from gptconvert.containers.untrusted import entries, hub_homes, links_out
from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.model.options import Options
from gptconvert.sources.hub_http import guarded
from gptconvert.sources.hub_listing import Digest, Entry

_BLOCK = 1 << 20


def download(
    repo: str, name: str, revision: str | None, commit: str, entry: Entry, options: Options, most: int | None = None
) -> str:
    """Fetch one file and return its path in the cache.

    Args:
        repo: the repository.
        name: the file's name, at the top of the repository.
        revision: as the user gave it, so that the cache can resolve that name offline; or the commit.
        commit: the commit that the revision names.
        entry: size and digest from the listing.
        options: ``cache_dir``.
        most: largest size in bytes, of a file that is read whole; None for weights.

    Raises:
        InputError: the file is damaged or too large, or the revision now names another commit.
        UnsafeInputError: the file in the cache is a link that leaves the cache.
    """
    from huggingface_hub import constants, hf_hub_download

    if most is not None and entry.size is not None and entry.size > most:
        expected, found = f"at most {most} bytes", f"{entry.size} bytes"
        raise InputError("too large for its kind of file", path=f"{repo}/{name}", expected=expected, found=found)
    limit = most if entry.size is None else entry.size
    home = _home(repo, options)
    before = _present(home, name)
    expected = os.path.join(home, "snapshots", commit, name)
    with guarded(f"{constants.ENDPOINT}/{repo}/resolve/{revision or 'main'}/{name}", limit):
        path = hf_hub_download(repo, name, revision=revision, cache_dir=options.cache_dir)
    try:
        if path != expected:
            hint = "run the same command again"
            raise InputError("the repository changed during the download", path=repo, hint=hint)
        check_links(path)
        if entry.digest is not None and path not in before:
            _check(path, entry.digest, f"{repo}/{name}", before)
    except BaseException:  # an interrupted check must not leave a file that the next run would trust
        _remove(path, home, before)
        raise
    return path


def check_links(path: str) -> None:
    """Raise :class:`UnsafeInputError` if a file in the cache is a link that leaves the cache."""
    if links_out(path, hub_homes(os.path.dirname(path))):
        hint = "remove this link; a hub, or another program, has put it there"
        raise UnsafeInputError("the cached file links out of the hub cache", path=path, hint=hint)


def _home(repo: str, options: Options) -> str:
    """The repository's directory in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(options.cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    return str(cache / repo_folder_name(repo_id=repo, repo_type="model"))


def _present(home: str, name: str) -> set[str]:
    """The paths that exist already, among those that a download of ``name`` may create."""
    blobs, snapshots = os.path.join(home, "blobs"), os.path.join(home, "snapshots")
    links = {os.path.join(snapshots, commit, name) for commit in entries(snapshots, quiet=True)}
    return {os.path.join(blobs, blob) for blob in entries(blobs, quiet=True)} | set(filter(os.path.exists, links))


def _blob(path: str, home: str) -> str | None:
    """The file in ``blobs`` that a link names, which may be a link itself; None for any other path."""
    if not os.path.islink(path):
        return None
    target = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    return target if os.path.dirname(target) == os.path.join(home, "blobs") else None


def _remove(path: str, home: str, before: set[str]) -> None:
    """Remove what this run created: the file or link at ``path``, and the blob that it names."""
    inside = path.startswith(os.path.join(home, "snapshots") + os.sep)
    for each in (_blob(path, home), path if inside else None):
        if each is not None and each not in before and os.path.lexists(each):
            os.unlink(each)


def _check(path: str, expected: Digest, where: str, before: set[str]) -> None:
    digest = hashlib.sha1(usedforsecurity=False) if expected.git else hashlib.sha256()
    if expected.git:
        digest.update(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() == expected.value:
        return
    wanted = f"{'git blob' if expected.git else 'SHA-256'} {expected.value}"
    if (old := os.path.realpath(path)) in before:
        raise InputError(
            "a file that was in the cache before is damaged",
            path=where,
            expected=wanted,
            found=digest.hexdigest(),
            hint=f"remove {old} and run the same command again",
        )
    raise InputError(
        "the downloaded file is damaged and was removed from the cache",
        path=where,
        expected=wanted,
        found=digest.hexdigest(),
        hint="run the same command again; if it fails again, a proxy or mirror is altering the file",
    )
