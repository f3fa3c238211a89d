"""What goes wrong during an upload, as errors of this program with what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gptconvert.errors import GptConvertError, InputError, OutputError, reason
from gptconvert.sources.hub_errors import described, is_connection_error

_LOGIN = "run `hf auth login`, or set HF_TOKEN to a token with write access"
_AGAIN = "try again later"
#: HTTP status → what it means, and what to do next.
STATUS: Mapping[int, tuple[str, str]] = {
    400: ("the hub does not accept the request", "correct what it names"),
    401: ("the hub does not accept the token, which may have expired", _LOGIN),
    402: ("the account's storage is used up", "free some, or use another account"),
    403: (
        "the token may not write to this repository",
        "use a token with write access to it (if fine-grained, `repo.write` and `discussion.write`)",
    ),
    404: (
        "no such repository, branch or pull request, or the token may not read it",
        f"check the name; if it is private, {_LOGIN}",
    ),
    409: ("the repository is not in the expected state", "another program may be writing to it; run again"),
    413: ("the hub refuses a file or request of this size", "see the limits in the hub's documentation"),
    429: ("too many requests", _AGAIN),
}


@contextmanager
def translated(repo: str, doing: str) -> Iterator[None]:
    """Translate every error of huggingface_hub, and of the libraries below it.

    Args:
        repo: the repository.
        doing: the step, such as ``creating the tag``.

    Raises:
        OutputError: the hub refused, failed, or could not be reached.
        InputError: a local file cannot be read any more.
    """
    try:
        yield
    except GptConvertError:
        raise
    except Exception as error:  # a reply that no hub would send can fail anywhere in these libraries
        raise _translation(error, repo, doing) from error


def _translation(error: Exception, repo: str, doing: str) -> GptConvertError:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    causes = [*_causes(error)]
    status = next((each for each in causes if isinstance(each, HfHubHTTPError)), None)
    if status is not None:
        return _http_error(status, repo, doing)
    found = next(filter(is_connection_error, causes), None)
    if found is not None:
        hint = "check the network, HF_ENDPOINT and proxies, then run again"
        return OutputError(f"{doing}: the hub cannot be reached", path=repo, found=described(found), hint=hint)
    local = next((each for each in causes if isinstance(each, OSError) and each.strerror and each.filename), None)
    if local is not None:
        return InputError(f"{doing}: cannot be read ({reason(local)})", path=str(local.filename))
    hint = f"check HF_ENDPOINT ({constants.ENDPOINT}) and proxies, and try HF_HUB_DISABLE_XET=1"
    return OutputError(f"{doing}: the reply of the hub cannot be used", path=repo, found=described(error), hint=hint)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it: uploads in threads are wrapped."""
    while error is not None:
        yield error
        error = error.__cause__


def _http_error(error: object, repo: str, doing: str) -> OutputError:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    unknown = ("the hub failed", _AGAIN) if status >= 500 else ("the hub does not accept the request", _AGAIN)
    what, hint = STATUS.get(status, unknown)
    said = str(getattr(error, "server_message", None) or "").strip().replace("\n", " ")[:200]
    found = f"HTTP {status}{f': {said}' if said else ''}"
    return OutputError(f"{doing}: {what}", path=repo, found=found, hint=hint)
