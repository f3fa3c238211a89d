"""The upload: prepare the repository, commit in parts, compare, publish, tag.

Nothing is written to the default branch. A draft pull request, or a branch, receives the commits, and readers of the
default branch see none of it before it is merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from gptconvert.errors import GptConvertError, OutputError
from gptconvert.model.progress import Progress, Silent
from gptconvert.publish import journal
from gptconvert.publish.manifest import MANIFEST_FILE, SUMS_FILE
from gptconvert.push.hub import HUB_FILES, HubRepository, PullRequest, Stored, limited
from gptconvert.push.plan import Upload
from gptconvert.targets.package.model_card import CARD_FILE


@dataclass
class Pushed:
    """The result of an upload; in a dry run, nothing but the plan.

    Attributes:
        upload: what was uploaded.
        url: the repository's page.
        pull_request: the pull request; None for a branch.
        revision: the branch, or the reference of the pull request.
        commits: hashes of the commits that hold the files, in order.
        notes: what the user should know, one sentence each.
    """

    upload: Upload
    url: str | None = None
    pull_request: PullRequest | None = None
    revision: str | None = None
    commits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def page(self) -> str:
        """The address of what was uploaded."""
        return self.pull_request.url if self.pull_request else f"{self.url}/tree/{self.revision}"

    def as_dict(self) -> dict[str, object]:
        """The output of ``--json``."""
        upload, found = self.upload, self.pull_request
        return {
            "repo": upload.destination.repo,
            "url": self.url,
            "revision": self.revision,
            "pull_request": None if found is None else {"number": found.number, "url": found.url},
            "oid": self.commits[-1] if self.commits else None,
            "commits": [{"oid": oid, "url": f"{self.url}/commit/{oid}"} for oid in self.commits],
            "tag": upload.destination.tag,
            "size": sum(upload.sizes.values()),
            "files": [
                {"path": path, "size": upload.sizes[path], "sha256": upload.digests[path]} for path in upload.paths
            ],
            "parts": len(upload.parts),
            "card": dict(upload.metadata),
            "notes": [*upload.notes, *self.notes],
        }


def push(upload: Upload, progress: Progress | None = None) -> Pushed:
    """Upload to a pull request or branch; the tag comes last.

    Raises:
        OutputError: not logged in; the hub refused, failed, or could not be reached; or it stores something else. The
            hint says what was left behind, and how to go on.
    """
    state = _State(upload)
    try:
        with limited():
            return _push(upload, state, progress or Silent())
    except GptConvertError as error:
        error.hint = "; ".join(filter(None, (error.hint, state.left_behind())))
        raise


class _State:
    """What an upload has done to the repository so far, recorded for a signal too."""

    def __init__(self, upload: Upload) -> None:
        self.upload, self.done = upload, 0
        self.target, self.again, self.uncertain = "", "", ""
        self.record()

    def record(self) -> None:
        journal.record("remote", self.left_behind())

    def may_leave(self, what: str) -> None:
        """The next request may leave this behind, even if it seems to fail."""
        self.uncertain = what
        self.record()

    def begin(self, target: str, again: str) -> None:
        """The pull request or branch exists."""
        self.target, self.again = target, again
        self.record()

    def committed(self) -> None:
        self.done += 1
        self.record()

    def left_behind(self) -> str:
        """For the user: what is on the hub now, and how to go on."""
        if not self.target:
            return f"nothing was uploaded{f'; {self.uncertain}' if self.uncertain else ''}"
        held = f"{self.done} of {len(self.upload.parts)} commits"
        return f"the default branch is unchanged; {self.target} holds {held}; {self.again}"


def _push(upload: Upload, state: _State, progress: Progress) -> Pushed:
    destination = upload.destination
    repository = HubRepository(destination.repo)
    pushed = Pushed(upload, repository.url)
    progress.stage("preparing", 0)
    _prepare(repository, upload, state)
    revision = pushed.revision = _open(repository, pushed, state)
    for index, part in enumerate(upload.parts):
        count = f" (part {index + 1} of {len(upload.parts)})" if len(upload.parts) > 1 else ""
        progress.stage(f"uploading{count}", 0)
        oid = repository.commit({name: upload.content(name) for name in part}, revision, upload.title + count)
        pushed.commits += [oid] if oid not in pushed.commits else []
        state.committed()
    progress.stage("comparing", 0)
    pushed.notes += _compare(repository, upload, pushed.commits[-1])
    if pushed.pull_request is not None and pushed.pull_request.is_draft:
        repository.publish(pushed.pull_request)
    if destination.tag is not None:
        repository.tag(destination.tag, pushed.commits[-1], upload.title)
    journal.record("published", pushed.page)
    return pushed


def _prepare(repository: HubRepository, upload: Upload, state: _State) -> None:
    """Refuse what would fail later, and create the repository if it does not exist."""
    destination = upload.destination
    private = repository.is_private()
    if private is False and destination.private:
        hint = "make it private in its settings, or drop --private"
        raise OutputError("the repository exists, and is public", path=repository.name, hint=hint)
    if private is not None and destination.tag in repository.tags():
        hint = "choose another tag, or delete this one"
        raise OutputError(f"the repository has a tag {destination.tag}", path=repository.name, hint=hint)
    if CARD_FILE in upload.digests:
        repository.check_card(upload.read(CARD_FILE))
    if private is None:
        state.may_leave("the new repository is empty, if it was created")
        repository.create(destination.private)


def _open(repository: HubRepository, pushed: Pushed, state: _State) -> str:
    """Open the pull request or branch; returns its revision."""
    upload, destination = pushed.upload, pushed.upload.destination
    if destination.branch is not None:
        repository.ensure_branch(destination.branch)
        state.begin(f"branch {destination.branch}", "run the same command again to go on, or delete the branch")
        return destination.branch
    if destination.pull_request is not None:
        found = repository.pull_request(destination.pull_request)
    else:
        digest = upload.digests[MANIFEST_FILE]
        text = f"SHA-256 of {MANIFEST_FILE}: `{digest}`. `sha256sum -c {SUMS_FILE}` checks all files."
        state.may_leave("an empty draft pull request may have been created")
        found = repository.open_pull_request(upload.title, text)
    pushed.pull_request = found
    state.begin(f"pull request {found.url}", f"run again with --pr {found.number} to go on, or close it")
    return found.revision


def _compare(repository: HubRepository, upload: Upload, oid: str) -> Sequence[str]:
    """Compare what the hub stores with what was to be uploaded; returns notes.

    Raises:
        OutputError: files are missing or different. Names all of them.
    """
    stored = repository.files(oid)
    wrong = [name for name in upload.digests if name not in stored or not _is_same(upload, name, stored[name])]
    if wrong:
        what = f"the hub stores something else for {', '.join(sorted(wrong)[:8])}"
        hint = "a file may have changed during the upload, or a .gitignore of the repository left it out"
        raise OutputError(what, path=repository.name, hint=hint)
    others = sorted(stored.keys() - upload.digests.keys() - {*HUB_FILES})
    some = ", ".join(others[:5]) + (" …" if len(others) > 5 else "")
    return [f"the repository has other files too, which were left as they are: {some}"] if others else []


def _is_same(upload: Upload, name: str, stored: Stored) -> bool:
    if stored.sha256 is not None:
        return (stored.sha256, stored.size) == (upload.digests[name], upload.sizes[name])
    if stored.size != upload.sizes[name]:
        return False
    content = upload.read(name)
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return blob == stored.blob_id and hashlib.sha256(content).hexdigest() == upload.digests[name]
