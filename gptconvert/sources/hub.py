"""Checkpoints on the Hugging Face hub: resolve to one commit, fetch only the files needed, check their digests.

huggingface_hub handles requests, caching, proxies and authentication. The token comes from the environment or
``hf auth login``, never from an option; the server from ``HF_ENDPOINT``. This module chooses the files;
:mod:`.hub_listing` reads the repository's listing, :mod:`.hub_cache` fetches and checks one file, :mod:`.hub_http`
limits what a reply may do, and :mod:`.hub_errors` words what goes wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gptconvert.containers.untrusted import entries
from gptconvert.errors import InputError, UsageError
from gptconvert.model.options import Options
from gptconvert.sources.documents import is_document, largest_document
from gptconvert.sources.hf.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LEFT_BEHIND, MAX_CONFIG, lone_adapter
from gptconvert.sources.hf.files import CONFIG, STANDARD_NAMES, Weights, choose_weights
from gptconvert.sources.hf.shards import MAX_INDEX, read_weight_map
from gptconvert.sources.hub_cache import check_links, download
from gptconvert.sources.hub_errors import translated
from gptconvert.sources.hub_listing import Listing, read_listing
from gptconvert.sources.tokenizer_files import GPT1, GPT2, HUGGING_FACE, MAX_BYTES, huggingface_names, is_copied

_REPO_ID = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?(?:/[A-Za-z0-9_](?:[\w.-]{0,94}\w)?)?", re.ASCII)
_FILE_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index", ".json", ".npy", ".h5", ".onnx", ".gguf")
#: In a revision, what git does not allow and the cache would take as a path.
_NO_REVISION = re.compile(r"\.\.|^/|[\\\0-\x1f\x7f]|^$")
#: Largest total size of the tokenizer files and documents.
MAX_SMALL = 1 << 30
TOKENIZERS, INDEX = frozenset((*GPT1, *GPT2, *HUGGING_FACE)), ".index.json"


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


def is_repo_id(text: str) -> bool:
    """Whether ``text`` could name a repository (``org/name`` or ``name``), rather than a mistyped path."""
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and not text.endswith(_FILE_ENDINGS)


def fetch(repo: str, options: Options) -> Fetched:
    """Download a repository's configuration, weights and tokenizer unless they are already cached.

    Raises:
        InputError: repository, revision or file not found, no access, no network, a reply that is not a hub's, or a
            digest does not match.
        UnsafeInputError: a reply, or a link in the cache, leads out of the cache.
        UnsupportedError: the repository has only unsupported weights.
        OutputError: the cache cannot be written.
        UsageError: ``options.revision`` cannot be a revision.
    """
    from huggingface_hub import constants

    if options.revision is not None and _NO_REVISION.search(options.revision):
        raise UsageError("not a valid revision", item="--revision", expected="a branch, tag or commit")
    with translated(repo, options):
        if options.offline or constants.HF_HUB_OFFLINE:
            return _from_cache(repo, options)
        return _from_hub(repo, options)


def fetch_adapter(repo: str, options: Options) -> Fetched:
    """Download a LoRA adapter's configuration, weights and tokenizer, of its main branch, unless they are cached.

    Raises:
        InputError: as :func:`fetch`, or the repository holds no adapter.
        OutputError: the cache cannot be written.
    """
    from huggingface_hub import constants, hf_hub_download

    options = replace(options, revision=None)
    notes: tuple[str, ...] = ()
    with translated(repo, options):
        if options.offline or constants.HF_HUB_OFFLINE:
            config = hf_hub_download(repo, ADAPTER_CONFIG, cache_dir=options.cache_dir, local_files_only=True)
            _check_links(os.path.dirname(config))
        else:
            listing = read_listing(repo, None)
            files = listing.files
            weights = next((name for name in ADAPTER_WEIGHTS if name in files), None)
            if ADAPTER_CONFIG not in files or weights is None:
                expected = f"{ADAPTER_CONFIG} and {' or '.join(ADAPTER_WEIGHTS)}"
                raise InputError(
                    "no LoRA adapter in the repository", path=repo, expected=expected, found=_some(files)
                )
            config = download(repo, ADAPTER_CONFIG, None, listing.commit, files[ADAPTER_CONFIG], options, MAX_CONFIG)
            others = [weights, *(each for each in files if each in HUGGING_FACE or is_copied(each))]
            _download_all(repo, others, listing, options)
            notes = _unchecked((ADAPTER_CONFIG, *others), listing)
    directory = os.path.dirname(config)
    return Fetched(directory, os.path.basename(directory), "", notes)


def _from_hub(repo: str, options: Options) -> Fetched:
    listing = read_listing(repo, options.revision)
    files, commit = listing.files, listing.commit
    if ADAPTER_CONFIG in files and not any(name in files for name in STANDARD_NAMES):
        config = download(repo, ADAPTER_CONFIG, commit, commit, files[ADAPTER_CONFIG], options, MAX_CONFIG)
        raise lone_adapter(os.path.dirname(config), [ADAPTER_CONFIG], repo)
    if CONFIG not in files:
        raise InputError(
            "config.json is missing from the repository",
            path=repo,
            found=_some(files),
            hint="check the name; if the files are right, download them, add config.json and convert the directory",
        )
    weights, notes = choose_weights(files, options.weights_file, repo)
    notes += [LEFT_BEHIND] if ADAPTER_CONFIG in files else []
    # Request the revision by the name given, so that the cache can resolve that name offline.
    directory = os.path.dirname(download(repo, CONFIG, options.revision, commit, files[CONFIG], options, MAX_CONFIG))
    documents, left = _documents(listing)
    notes += left
    small = [*huggingface_names(files), *filter(is_copied, files), *documents]
    _download_all(repo, small, listing, options)
    large = _weights_files(repo, weights, listing, options)
    _download_all(repo, large, listing, options)
    notes += _unchecked((CONFIG, *small, weights.name, *large), listing)
    return Fetched(directory, commit, weights.name, tuple(notes), listing.names)


def _download_all(repo: str, names: Iterable[str], listing: Listing, options: Options) -> None:
    names = list(names)
    total = sum(listing.files[name].size or 0 for name in names if _most(name) is not None)
    if total > MAX_SMALL:
        expected, found = f"at most {MAX_SMALL} bytes", f"{total} bytes"
        raise InputError("the repository's tokenizer files are too large", path=repo, expected=expected, found=found)
    for name in names:
        download(repo, name, listing.commit, listing.commit, listing.files[name], options, _most(name))


def _most(name: str) -> int | None:
    """Largest size of a file that is read whole; None for weights."""
    if is_document(name):
        return largest_document(name)
    if name.endswith(INDEX):
        return MAX_INDEX
    return MAX_BYTES if name in TOKENIZERS or is_copied(name) else None


def _documents(listing: Listing) -> tuple[list[str], list[str]]:
    """The licences and the model card, and a note on those that are too large: a conversion does not need them."""
    named = [name for name in listing.files if is_document(name)]
    large = [name for name in named if (listing.files[name].size or 0) > largest_document(name)]
    notes = [f"left behind, as too large for documents: {_some(large)}"] if large else []
    return [name for name in named if name not in large], notes


def _unchecked(names: Iterable[str], listing: Listing) -> tuple[str, ...]:
    """The note on files whose digest is not listed."""
    found = [name for name in dict.fromkeys(names) if listing.files[name].digest is None]
    return (f"not checked after the download, as the hub lists no digest: {_some(found)}",) if found else ()


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:8]) or "no files"


def _weights_files(repo: str, weights: Weights, listing: Listing, options: Options) -> list[str]:
    """The weights file, or all shards that its index names."""
    if not weights.sharded:
        return [weights.name]
    entry = listing.files[weights.name]
    index = download(repo, weights.name, listing.commit, listing.commit, entry, options, MAX_INDEX)
    shards = sorted(set(read_weight_map(index).values()))
    missing = [name for name in shards if name not in listing.files]
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
    _check_links(directory)
    try:
        weights, notes = choose_weights(entries(directory), options.weights_file, directory)
    except InputError as error:
        error.hint = "the repository is only partly cached; run once without --offline"
        raise
    return Fetched(directory, os.path.basename(directory), weights.name, tuple(notes))


def _check_links(directory: str) -> None:
    """Refuse a cached snapshot with links out of the cache, which another program may have let a hub create."""
    for name in entries(directory):
        check_links(os.path.join(directory, name))
