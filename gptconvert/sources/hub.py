"""Checkpoints on the Hugging Face hub: resolve to one commit, fetch only the files needed, check their digests.

huggingface_hub handles requests, caching, proxies and authentication. The token comes from the environment or
``hf auth login``, never from an option; the server from ``HF_ENDPOINT``. This module chooses the files and verifies
the downloads: huggingface_hub compares only lengths.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from gptconvert.containers.untrusted import entries, is_plain_name, similar_path
from gptconvert.errors import GptConvertError, InputError, OutputError
from gptconvert.model.options import Options
from gptconvert.sources.documents import is_document
from gptconvert.sources.hf.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LEFT_BEHIND, lone_adapter
from gptconvert.sources.hf.files import CONFIG, STANDARD_NAMES, Weights, choose_weights
from gptconvert.sources.hf.shards import read_weight_map
from gptconvert.sources.tokenizer_files import HUGGING_FACE, huggingface_names, is_copied

_REPO_ID = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?(?:/[A-Za-z0-9_](?:[\w.-]{0,94}\w)?)?", re.ASCII)
_FILE_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index", ".json", ".npy", ".h5", ".onnx", ".gguf")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Fetched:
    """A repository's files in the local cache.

    Attributes:
        directory: the snapshot of one commit.
        revision: that commit.
        weights_file: name of the weights file, or of its index, in ``directory``.
        notes: notes for the user.
        names: names at the top of the repository, directories with ``/``; None if read from the cache.
    """

    directory: str
    revision: str
    weights_file: str
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Digest:
    """A file's digest as the hub lists it: SHA-256 for large files, the git blob id for small ones."""

    value: str
    git: bool


def is_repo_id(text: str) -> bool:
    """Whether ``text`` could name a repository (``org/name`` or ``name``), rather than a mistyped path."""
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and not text.endswith(_FILE_ENDINGS)


def fetch(repo: str, options: Options) -> Fetched:
    """Download a repository's configuration, weights and tokenizer unless they are already cached.

    Raises:
        InputError: repository, revision or file not found, no access, no network, or a digest does not match.
        UnsupportedError: the repository has only unsupported weights.
        OutputError: the cache cannot be written.
    """
    from huggingface_hub import constants

    with _translated(repo, options):
        if options.offline or constants.HF_HUB_OFFLINE:
            return _from_cache(repo, options)
        return _from_hub(repo, options)


def fetch_adapter(repo: str, options: Options) -> Fetched:
    """Download a LoRA adapter's configuration, weights and tokenizer, of its main branch, unless they are cached.

    Raises:
        InputError: as :func:`fetch`, or the repository holds no adapter.
        OutputError: the cache cannot be written.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    options = replace(options, revision=None)
    with _translated(repo, options):
        if options.offline or constants.HF_HUB_OFFLINE:
            config = hf_hub_download(repo, ADAPTER_CONFIG, cache_dir=options.cache_dir, local_files_only=True)
        else:
            info = HfApi().model_info(repo, files_metadata=True)
            digests = _digests(info)
            weights = next((name for name in ADAPTER_WEIGHTS if name in digests), None)
            if ADAPTER_CONFIG not in digests or weights is None:
                expected = f"{ADAPTER_CONFIG} and {' or '.join(ADAPTER_WEIGHTS)}"
                found = ", ".join(sorted(digests)[:8]) or "no files"
                raise InputError("no LoRA adapter in the repository", path=repo, expected=expected, found=found)
            config = _download(repo, ADAPTER_CONFIG, None, digests[ADAPTER_CONFIG], options)
            for name in (weights, *(each for each in digests if each in HUGGING_FACE or is_copied(each))):
                _download(repo, name, str(info.sha), digests[name], options)
    directory = os.path.dirname(config)
    return Fetched(directory, os.path.basename(directory), "")


def _from_hub(repo: str, options: Options) -> Fetched:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=options.revision, files_metadata=True)
    commit = str(info.sha)
    digests = _digests(info)
    if ADAPTER_CONFIG in digests and not any(name in digests for name in STANDARD_NAMES):
        config = _download(repo, ADAPTER_CONFIG, commit, digests[ADAPTER_CONFIG], options)
        raise lone_adapter(os.path.dirname(config), [ADAPTER_CONFIG], repo)
    if CONFIG not in digests:
        raise InputError(
            "config.json is missing from the repository",
            path=repo,
            found=", ".join(sorted(digests)[:8]) or "no files",
            hint="check the name; if the files are right, download them, add config.json and convert the directory",
        )
    weights, notes = choose_weights(digests, options.weights_file, repo)
    notes += [LEFT_BEHIND] if ADAPTER_CONFIG in digests else []
    # Request the revision by the name given, so that the cache can resolve that name offline.
    directory = os.path.dirname(_download(repo, CONFIG, options.revision, digests[CONFIG], options))
    if os.path.basename(directory) != commit:
        raise InputError("the repository changed during the download", path=repo, hint="run the same command again")
    for name in (*huggingface_names(digests), *filter(is_copied, digests), *filter(is_document, digests)):
        _download(repo, name, commit, digests[name], options)
    for name in _weights_files(repo, weights, commit, digests, options):
        _download(repo, name, commit, digests[name], options)
    names = {head + slash for file in info.siblings or () for head, slash, _ in [file.rfilename.partition("/")]}
    return Fetched(directory, commit, weights.name, tuple(notes), tuple(sorted(names)))


def _weights_files(
    repo: str, weights: Weights, commit: str, digests: Mapping[str, _Digest | None], options: Options
) -> list[str]:
    """The weights file, or all shards that its index names."""
    if not weights.sharded:
        return [weights.name]
    index = _download(repo, weights.name, commit, digests[weights.name], options)
    shards = sorted(set(read_weight_map(index).values()))
    missing = [name for name in shards if name not in digests]
    if missing:
        listed = ", ".join(missing[:8])
        raise InputError(
            f"{len(missing)} of {len(shards)} shards are missing from the repository: {listed}",
            path=repo,
            hint="the upload is incomplete; try another --revision or report it to the repository's owner",
        )
    return shards


def _from_cache(repo: str, options: Options) -> Fetched:
    from huggingface_hub import hf_hub_download

    config = hf_hub_download(
        repo, CONFIG, revision=options.revision, cache_dir=options.cache_dir, local_files_only=True
    )
    directory = os.path.dirname(config)
    try:
        weights, notes = choose_weights(entries(directory), options.weights_file, directory)
    except InputError as error:
        error.hint = "the repository is only partly cached; run once without --offline"
        raise
    return Fetched(directory, os.path.basename(directory), weights.name, tuple(notes))


def _download(repo: str, name: str, revision: str | None, digest: _Digest | None, options: Options) -> str:
    """Fetch one file and return its path in the cache. A new download that fails its digest check is deleted."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cache = options.cache_dir
    known = isinstance(try_to_load_from_cache(repo, name, cache_dir=cache, revision=revision), str)
    path = hf_hub_download(repo, name, revision=revision, cache_dir=cache)
    if digest is not None and not known:
        try:
            _check(path, digest, f"{repo}/{name}")
        except BaseException:  # an interrupted check must not leave a file that the next run would trust
            for leftover in (os.path.realpath(path), path):
                if os.path.lexists(leftover):
                    os.unlink(leftover)
            raise
    return path


def _digests(info: Any) -> dict[str, _Digest | None]:
    """The files at the top of a repository, with their digests."""
    return {file.rfilename: _digest(file) for file in info.siblings or () if is_plain_name(file.rfilename)}


def _digest(file: Any) -> _Digest | None:
    """The digest of one entry in the hub's listing."""
    if file.lfs is not None:
        return _Digest(file.lfs.sha256, git=False)
    return None if file.blob_id is None else _Digest(file.blob_id, git=True)


def _check(path: str, expected: _Digest, where: str) -> None:
    digest = hashlib.sha1(usedforsecurity=False) if expected.git else hashlib.sha256()
    if expected.git:
        digest.update(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected.value:
        raise InputError(
            "the downloaded file is damaged and was removed from the cache",
            path=where,
            expected=f"{'git blob' if expected.git else 'SHA-256'} {expected.value}",
            found=digest.hexdigest(),
            hint="run the same command again; if it fails again, a proxy or mirror is altering the file",
        )


@contextmanager
def _translated(repo: str, options: Options) -> Iterator[None]:
    """Translate huggingface_hub's errors into this program's."""
    from huggingface_hub import errors

    try:
        yield
    except GptConvertError:
        raise
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        what = f"offline, and revision {options.revision or 'main'} is not in the local cache"
        raise _not_local(repo, what, "run once without --offline and with HF_HUB_OFFLINE unset") from error
    except errors.HfHubHTTPError as error:
        raise _http_error(repo, options, error) from error
    except errors.HFValidationError as error:
        raise InputError("not a valid repository name", path=repo, expected="org/name") from error
    except OSError as error:
        if error.errno is None:
            raise _unreachable(repo, error) from error
        raise OutputError(f"the hub cache cannot be written ({error.strerror})", path=error.filename) from error
    except Exception as error:  # transport errors: the library that raises them depends on huggingface_hub's version
        if not isinstance(error, getattr(errors, "HTTPError", ())):
            raise
        raise _unreachable(repo, error) from error


def _http_error(repo: str, options: Options, error: Any) -> InputError:
    from huggingface_hub import constants, errors

    status = getattr(error.response, "status_code", None)
    login = "set HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        hint = f"request access at {constants.ENDPOINT}/{repo}, then {login}"
        return InputError("this repository is gated: its owner must grant you access", path=repo, hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = "pass --revision with an existing branch, tag or full commit hash"
        return InputError(f"the repository has no revision {options.revision!r}", path=repo, hint=hint)
    if status in (401, 403):
        what = "the hub denied access" if status == 403 else "no such repository, or it is private"
        return _not_local(repo, what, f"check the name; if it is private, {login}", found=f"HTTP {status}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_local(repo, "no such repository on the hub", "check the name", found=f"HTTP {status}")
    return InputError("the hub returned an error", path=repo, found=f"HTTP {status}", hint="try again later")


def _unreachable(repo: str, error: Exception) -> InputError:
    hint = "check the network, HF_ENDPOINT and proxies; to use a cached copy, pass --offline"
    return _not_local(repo, "the hub cannot be reached", hint, found=str(error)[:120] or type(error).__name__)


def _not_local(repo: str, what: str, hint: str, *, found: str | None = None) -> InputError:
    """The error for a name that is not on the hub, and may be a mistyped path: that comes first."""
    return InputError(
        f"no such file or directory, and as a hub repository: {what}",
        path=repo,
        found=found,
        hint="; ".join(filter(None, (similar_path(repo), hint))),
    )
