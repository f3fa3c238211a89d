"""huggingface_hub's errors as this program's, with the hub's address where that may be at fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptconvert.containers.untrusted import similar_path
from gptconvert.errors import GptConvertError, InputError, OutputError
from gptconvert.model.options import Options

#: Classes of the HTTP library, whose own name depends on huggingface_hub's version, for a failed connection.
_CONNECTION = {"TimeoutException", "NetworkError", "ProxyError", "RemoteProtocolError"}


@contextmanager
def translated(repo: str, options: Options) -> Iterator[None]:
    """Translate every error of huggingface_hub, and of the libraries below it, into this program's."""
    from huggingface_hub import constants

    try:
        yield
    except GptConvertError:
        raise
    except OSError as error:
        if error.errno is None or not error.strerror:
            raise _translation(error, repo, options) from error
        path = error.filename or options.cache_dir or constants.HF_HUB_CACHE
        raise OutputError(f"the hub cache cannot be written ({error.strerror})", path=path) from error
    except Exception as error:  # a reply that no hub would send can fail anywhere in these libraries
        raise _translation(error, repo, options) from error


def _translation(error: BaseException, repo: str, options: Options) -> InputError:
    from huggingface_hub import constants, errors

    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        if options.offline or constants.HF_HUB_OFFLINE:
            what = f"offline, and revision {options.revision or 'main'} is not in the local cache"
            return _not_local(repo, what, "run once without --offline and with HF_HUB_OFFLINE unset")
        return _translation(error.__cause__ or TimeoutError(str(error)), repo, options)
    if isinstance(error, errors.HFValidationError):
        return InputError("not a valid repository name", path=repo, expected="org/name")
    if isinstance(error, errors.HfHubHTTPError):
        return _http_error(repo, options, error)
    if is_connection_error(error):
        return _unreachable(repo, error)
    return _not_a_hub(repo, error)


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


def _unreachable(repo: str, error: BaseException) -> InputError:
    hint = "check the network, HF_ENDPOINT and proxies; to use a cached copy, pass --offline"
    return _not_local(repo, "the hub cannot be reached", hint, found=described(error))


def _not_a_hub(repo: str, error: BaseException) -> InputError:
    hint = "check HF_ENDPOINT, proxies, and whether the network needs a login in the browser"
    return InputError("the reply of the hub cannot be used", path=repo, found=described(error), hint=hint)


def is_connection_error(error: BaseException) -> bool:
    """Whether the hub could not be reached, or did not answer in time."""
    return isinstance(error, TimeoutError) or bool(_CONNECTION & {each.__name__ for each in type(error).__mro__})


def described(error: BaseException) -> str:
    """The address and the error, cut to one line."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}: {str(error).split(chr(10))[0][:160] or type(error).__name__}"


def _not_local(repo: str, what: str, hint: str, *, found: str | None = None) -> InputError:
    """The error for a name that is not on the hub, and may be a mistyped path: that comes first."""
    return InputError(
        f"no such file or directory, and as a hub repository: {what}",
        path=repo,
        found=found,
        hint="; ".join(filter(None, (similar_path(repo), hint))),
    )
