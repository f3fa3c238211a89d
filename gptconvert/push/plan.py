"""What an upload consists of, known before the first request."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptconvert.errors import InputError, UsageError, os_errors_as
from gptconvert.model.progress import Progress, Silent
from gptconvert.publish.checksums import dump_sums
from gptconvert.publish.manifest import MANIFEST_FILE, SUMS_FILE
from gptconvert.push.card import completed
from gptconvert.push.hub import DEFAULT_BRANCH
from gptconvert.push.package import read_package
from gptconvert.targets.package.model_card import CARD_FILE
from gptconvert.version import __version__

#: Most files and bytes of a commit. The hub recommends at most 50 to 100 files; an upload goes on after the last one.
MAX_FILES, MAX_BYTES = 50, 20 << 30
#: Committed last, because they describe the others.
_LAST = (CARD_FILE, MANIFEST_FILE, SUMS_FILE)
#: Branches and tags: a subset of what git allows.
_REFERENCE = re.compile(r"(?!refs/)(?!.*\.\.)(?!.*//)(?!.*\.lock$)\w(?:[\w./+-]*\w)?", re.ASCII)


@dataclass(frozen=True)
class Destination:
    """Where and how to upload.

    Attributes:
        repo: ``org/name``.
        branch: the branch to write to; None for a pull request.
        pull_request: number of one that exists; None for a new one.
        tag: created on the last commit; None for none.
        private: whether a repository that does not exist is created as private.
        message: title of the pull request and of the commits; None for a text that names the targets.

    Raises:
        UsageError: a value is not valid.
    """

    repo: str
    branch: str | None = None
    pull_request: int | None = None
    tag: str | None = None
    private: bool = False
    message: str | None = None

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise UsageError("not a valid repository name", path=self.repo, expected="org/name") from error
        if "/" not in self.repo:
            hint = "name the account or organisation too"
            raise UsageError("not a complete repository name", path=self.repo, expected="org/name", hint=hint)
        if self.branch == DEFAULT_BRANCH:
            hint = "push without --branch, for a pull request, or to another branch, and merge it"
            raise UsageError("the default branch is not written to directly", item="--branch", hint=hint)
        if self.branch is not None and self.pull_request is not None:
            raise UsageError("--branch contradicts --pr", hint="drop one of them")
        for flag, name in {"--branch": self.branch, "--tag": self.tag}.items():
            if name is not None and not _REFERENCE.fullmatch(name):
                raise UsageError("not a valid name for git", item=flag, found=name)
        if self.message is not None and not 3 <= len(self.message.strip()) <= 200:
            raise UsageError("not a title", item="--message", expected="3 to 200 characters")


@dataclass(frozen=True)
class Upload:
    """What is to be uploaded.

    Attributes:
        destination: where.
        directory: the local directory.
        digests: path → SHA-256, of every file as uploaded.
        sizes: path → bytes, likewise.
        replaced: path → content that differs from the local file: the completed card, and its checksum.
        parts: the paths of each commit.
        metadata: the card's front matter.
        title: title of the pull request and of the commits.
        notes: what the user should know, one sentence each.
    """

    destination: Destination
    directory: str
    digests: Mapping[str, str]
    sizes: Mapping[str, int]
    replaced: Mapping[str, bytes]
    parts: tuple[tuple[str, ...], ...]
    metadata: Mapping[str, Any]
    title: str
    notes: tuple[str, ...]

    @property
    def paths(self) -> list[str]:
        """The files, in the order of their upload."""
        return [path for part in self.parts for path in part]

    def content(self, name: str) -> str | bytes:
        """The local path of a file, or its content if that differs."""
        return self.replaced.get(name, os.path.join(self.directory, name))

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        content = self.content(name)
        if isinstance(content, bytes):
            return content
        with os_errors_as(InputError, "cannot be read", content), open(content, "rb") as file:
            return file.read()


def plan_upload(
    directory: str,
    destination: Destination,
    stated: Mapping[str, str],
    progress: Progress | None = None,
) -> Upload:
    """Check a directory, and plan its upload, without the network.

    Args:
        directory: output of a verified conversion.
        destination: where to.
        stated: ``license`` and ``base_model`` for the model card, as far as the user states them.
        progress: receives the bytes that are checked.

    Raises:
        InputError: files are missing, altered or not listed.
        VerificationError: the conversion was not verified.
    """
    package = read_package(directory, progress or Silent())
    card = completed(package.card, package.manifest, stated)
    replaced = {} if card.content == package.card else {CARD_FILE: card.content}
    digests = {**package.digests, **{name: hashlib.sha256(data).hexdigest() for name, data in replaced.items()}}
    # The card may have been edited, which its line must show too.
    replaced[SUMS_FILE] = dump_sums(digests)
    digests[SUMS_FILE] = hashlib.sha256(replaced[SUMS_FILE]).hexdigest()
    sizes = {**package.sizes, **{name: len(data) for name, data in replaced.items()}}
    parts = tuple(_parts(sizes))
    title = destination.message or f"Upload {', '.join(package.manifest['targets'])} by gptconvert {__version__}"
    notes = (*package.notes, *card.notes)
    return Upload(destination, directory, digests, sizes, replaced, parts, card.metadata, title.strip(), notes)


def _parts(sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """The files of each commit: in order, those that describe the others last."""
    part: list[str] = []
    for name in sorted(sizes.keys() - {*_LAST}) + [name for name in _LAST if name in sizes]:
        if part and (len(part) == MAX_FILES or sum(sizes[each] for each in (*part, name)) > MAX_BYTES):
            yield tuple(part)
            part = []
        part.append(name)
    yield tuple(part)
