"""Requests to a repository of the hub, by huggingface_hub, which reads the endpoint, token and proxies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gptconvert.errors import OutputError
from gptconvert.push.hub_errors import translated
from gptconvert.sources.hub_http import OFFICIAL

#: Longest wait, in seconds. huggingface_hub itself waits for ever. A large commit takes the hub a minute.
WAITS: Mapping[str, float] = {"connect": 10, "write": 60, "read": 180, "pool": 60}
DEFAULT_BRANCH = "main"
#: Files of the hub's own, which a repository has from the start.
HUB_FILES = (".gitattributes", ".gitignore")


@dataclass(frozen=True)
class Stored:
    """A file on the hub: its size in bytes, and either its SHA-256 or, if it is small, its git blob id."""

    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True)
class PullRequest:
    """A pull request: its number, its page, and whether it is a draft."""

    number: int
    url: str
    is_draft: bool

    @property
    def revision(self) -> str:
        """The git reference of its commits."""
        return f"refs/pr/{self.number}"


class HubRepository:
    """A repository, under the account of the token.

    Args:
        name: ``org/name``.

    Raises:
        OutputError: offline, or not logged in. So do all methods if the hub fails, refuses or is out of reach.
    """

    def __init__(self, name: str) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.name = name
        if constants.HF_HUB_OFFLINE:
            what = "HF_HUB_OFFLINE is set, so nothing can be uploaded"
            raise OutputError(what, path=name, hint="unset it, or pass --dry-run")
        with translated(name, "logging in"):
            token = get_token()
        if token is None:
            hint = "run `hf auth login`, or set HF_TOKEN to a token with write access"
            raise OutputError("not logged in to the hub", path=name, hint=hint)
        self._api = HfApi(token=token)

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"{self._api.endpoint}/{self.name}"

    def is_private(self) -> bool | None:
        """Whether it is private; None if it does not exist, or the token may not read it."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with translated(self.name, "opening the repository"):
            try:
                return bool(self._api.model_info(self.name).private)
            except RepositoryNotFoundError as error:
                if error.response.status_code != 404:
                    raise
                return None

    def create(self, private: bool) -> None:
        """Create the repository: public, or as its organisation decides, unless ``private``."""
        with translated(self.name, "creating the repository"):
            self._api.create_repo(self.name, private=private or None)

    def tags(self) -> set[str]:
        """The names of its tags."""
        with translated(self.name, "listing the tags"):
            return {each.name for each in self._api.list_repo_refs(self.name).tags}

    def check_card(self, content: bytes) -> None:
        """Have the hub check the metadata of a model card, as it will when the card is committed."""
        from huggingface_hub import get_session
        from huggingface_hub.errors import BadRequestError
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        with translated(self.name, "checking the model card"):
            # Not ModelCard.validate: in version 1.0 it asks the official hub, whatever the endpoint.
            body = {"repoType": "model", "content": content.decode("utf-8-sig")}
            response = get_session().post(f"{self._api.endpoint}/api/validate-yaml", json=body)
            try:
                hf_raise_for_status(response)
            except BadRequestError as error:
                what, said = "the hub does not accept the model card's front matter", error.server_message or ""
                found = " ".join(said.split())[:400]
                raise OutputError(what, path=self.name, item="README.md", found=found, hint="correct it") from error

    def open_pull_request(self, title: str, description: str) -> PullRequest:
        """Create a draft, which cannot be merged before it is complete."""
        with translated(self.name, "creating the pull request"):
            return self._pull_request(self._api.create_pull_request(self.name, title, description=description))

    def pull_request(self, number: int) -> PullRequest:
        """A pull request that exists."""
        with translated(self.name, f"opening pull request {number}"):
            found = self._api.get_discussion_details(self.name, number)
            if not found.is_pull_request or found.status not in ("draft", "open"):
                what, hint = f"pull request {number} is {found.status}", "push without --pr, for a new one"
                raise OutputError(what, path=self.name, hint=hint)
            return self._pull_request(found)

    def _pull_request(self, found: Any) -> PullRequest:
        return PullRequest(found.num, f"{self.url}/discussions/{found.num}", found.status == "draft")

    def publish(self, pull_request: PullRequest) -> None:
        """Make a draft ready for review."""
        with translated(self.name, f"publishing pull request {pull_request.number}"):
            self._api.change_discussion_status(self.name, pull_request.number, "open")

    def ensure_branch(self, branch: str) -> None:
        """Create a branch from the default branch, unless it exists."""
        with translated(self.name, f"creating branch {branch}"):
            self._api.create_branch(self.name, branch=branch, revision=DEFAULT_BRANCH, exist_ok=True)

    def commit(self, files: Mapping[str, str | bytes], revision: str, message: str) -> str:
        """Upload files, and add them to a branch or pull request in one commit; returns its hash.

        Args:
            files: path in the repository → local path, or content.
            revision: the branch, or the pull request's revision.
            message: the commit message.
        """
        from huggingface_hub import CommitOperationAdd

        with translated(self.name, "uploading"):
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            done = self._api.create_commit(self.name, operations, commit_message=message, revision=revision)
            return done.oid

    def files(self, revision: str) -> dict[str, Stored]:
        """All files of a revision, by path."""
        from huggingface_hub.hf_api import RepoFile

        with translated(self.name, "comparing what was uploaded"):
            tree = self._api.list_repo_tree(self.name, recursive=True, revision=revision)
            return {each.path: _stored(each) for each in tree if isinstance(each, RepoFile)}

    def tag(self, tag: str, revision: str, message: str) -> None:
        """Tag a commit."""
        with translated(self.name, f"creating tag {tag}"):
            self._api.create_tag(self.name, tag=tag, revision=revision, tag_message=message)


def _stored(file: Any) -> Stored:
    return Stored(file.size, None if file.lfs is None else file.lfs.sha256, file.blob_id)


@contextmanager
def limited() -> Iterator[None]:
    """Limit huggingface_hub, in all threads: its waits to :data:`WAITS`, and Xet to the official hub."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    inner: Callable[[], Any] = _http._GLOBAL_CLIENT_FACTORY

    def create() -> Any:
        client = inner()
        hooks: Mapping[str, Sequence[Any]] = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks.get("request", ()), _limit]}
        return client

    without_xet = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = without_xet or constants.ENDPOINT != OFFICIAL
    set_client_factory(create)
    try:
        yield
    finally:
        set_client_factory(inner)
        constants.HF_HUB_DISABLE_XET = without_xet


def _limit(request: Any) -> None:
    stated = {name: value for name, value in request.extensions.get("timeout", {}).items() if value is not None}
    request.extensions["timeout"] = {**WAITS, **stated}
