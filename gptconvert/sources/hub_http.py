"""Limits on the replies of a hub, for every request that huggingface_hub makes within :func:`guarded`.

huggingface_hub builds file names from the headers of a reply, reads bodies of any size, and waits as long as one byte
arrives now and then. A hostile hub or mirror, or a proxy between, can use each of these. The guard is a pair of hooks
in the HTTP client that huggingface_hub shares between its calls.
"""

from __future__ import annotations

import re
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from gptconvert.errors import GptConvertError, InputError, UnsafeInputError

#: The only hub whose replies may select Xet, a protocol that the guard does not see.
OFFICIAL = "https://huggingface.co"
#: A full commit hash.
COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
#: A file name for the cache that cannot be a path, on any system.
_ETAG = re.compile(r"[A-Za-z0-9][\w.+=~-]{0,199}", re.ASCII)
_WAITS = re.compile(r"(?:^|[;,]\s*t\s*=)\s*(\d{1,18})")
_BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Limits:
    """What a hub may take.

    Attributes:
        header_seconds: from a request to the end of the reply's headers.
        window_seconds: while a body arrives, each window of this length must bring ``window_bytes``.
        window_bytes: 1 KiB per second by default.
        requests: per file, with redirects and resumed downloads.
        wait_seconds: pause that a busy hub may request.
        other_bytes: body of a redirect or an error.
    """

    header_seconds: float = 60
    window_seconds: float = 60
    window_bytes: int = 60 << 10
    requests: int = 100
    wait_seconds: int = 300
    other_bytes: int = 1 << 20


LIMITS = Limits()


class _Guard:
    """The state of one call: a listing or a file."""

    def __init__(self, address: str, most: int | None) -> None:
        self.address, self.most, self.secure = address, most, address.startswith("https:")
        self.xet = address.startswith(f"{OFFICIAL}/")
        self.requests, self.expired = 0, False
        self.since, self.received = time.monotonic(), 0
        self.timer: threading.Timer | None = None
        self.sockets = _sockets()

    def sending(self, request: Any) -> None:
        self.stop_timer()
        self.requests += 1
        url = str(request.url)
        if self.expired:
            raise _too_slow(url)
        if request.url.scheme != "https" and (self.secure or request.url.scheme != "http"):
            expected = "https" if self.secure else "http or https"
            what = "the hub redirects to an address of another kind"
            raise UnsafeInputError(what, path=self.address, expected=expected, found=url)
        if self.requests > LIMITS.requests:
            what = f"gave up after {LIMITS.requests} requests for one file: the hub redirects or breaks off each"
            raise InputError(what, path=self.address)
        request.headers["Accept-Encoding"] = "identity"  # a compressed reply would hide its size
        request.extensions["trace"] = self.traced
        self.timer = threading.Timer(LIMITS.header_seconds, self.hang_up)
        self.timer.daemon = True
        self.timer.start()

    def answered(self, response: Any) -> None:
        self.stop_timer()
        headers, url = response.headers, str(response.request.url)
        _check_headers(response, url)
        if not self.xet:
            headers.pop("X-Xet-Hash", None)
        encoding = headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("", "identity") and response.request.method != "HEAD":
            hint = "a proxy or mirror compresses files; use another HF_ENDPOINT"
            raise InputError("the hub's reply is compressed, which was not requested", path=url, hint=hint)
        raw, most = response.iter_raw, self.most if response.status_code in (200, 206) else LIMITS.other_bytes
        response.iter_raw = lambda chunk_size=None: self.limited(raw(chunk_size), most, url)

    def limited(self, chunks: Iterator[bytes], most: int | None, url: str) -> Iterator[bytes]:
        """The chunks of a body, as long as they are neither too many nor too few."""
        total = 0
        for chunk in chunks:
            total += len(chunk)
            self.received += len(chunk)
            if most is not None and total > most:
                raise InputError("the hub's reply is too long", path=url, expected=f"at most {most} bytes")
            self.check_pace(url)
            yield chunk

    def check_pace(self, url: str) -> None:
        now = time.monotonic()
        if now - self.since < LIMITS.window_seconds:
            return
        if self.received < LIMITS.window_bytes:
            raise _too_slow(url)
        self.since, self.received = now, 0

    def traced(self, event: str, details: Mapping[str, Any]) -> None:
        """Remember the socket of every connection that the client opens."""
        extra = getattr(details.get("return_value"), "get_extra_info", None)
        if event.endswith(".complete") and extra is not None:
            opened = extra("socket")
            if isinstance(opened, socket.socket):
                self.sockets.add(opened)

    def hang_up(self) -> None:
        """End a read that waits for headers: read timeouts start anew with every byte."""
        self.expired = True
        for opened in list(self.sockets):
            try:
                opened.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed already
                continue

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


_ACTIVE: ContextVar[_Guard | None] = ContextVar("guard", default=None)
_LOCAL = threading.local()


@contextmanager
def guarded(address: str, most: int | None) -> Iterator[None]:
    """Limit the requests of this thread to a hub, within the context.

    Args:
        address: what is fetched first.
        most: bytes of the reply; None if unknown.

    Raises:
        InputError: a reply is too long, too slow or compressed.
        UnsafeInputError: a reply names a file outside the cache, or redirects to something other than http(s).
    """
    _install()
    guard = _Guard(address, most)
    token = _ACTIVE.set(guard)
    try:
        yield
    except Exception as error:
        if guard.expired and not isinstance(error, GptConvertError):
            raise _too_slow(address) from error
        raise
    finally:
        _ACTIVE.reset(token)
        guard.stop_timer()


def _install() -> None:
    """Add the hooks to huggingface_hub's client, which may be one that the caller's program has configured."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    inner = _http._GLOBAL_CLIENT_FACTORY
    if isinstance(inner, _Factory):
        return
    set_client_factory(_Factory(inner))


class _Factory:
    """Makes clients with the guard's hooks."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self) -> Any:
        client = self.inner()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", ()), _on_request],
            "response": [*hooks.get("response", ()), _on_response],
        }
        return client


def _on_request(request: Any) -> None:
    guard = _ACTIVE.get()
    if guard is not None:
        guard.sending(request)


def _on_response(response: Any) -> None:
    guard = _ACTIVE.get()
    if guard is not None:
        guard.answered(response)


def _check_headers(response: Any, url: str) -> None:
    """Refuse header values that huggingface_hub would use as paths or pauses."""
    headers = response.headers
    commit = headers.get("X-Repo-Commit")
    if commit is not None and not COMMIT.fullmatch(commit):
        raise UnsafeInputError("the hub's X-Repo-Commit is not a commit", path=url, found=commit[:80])
    # The regular ETag of a redirect within the hub, and of any reply but to HEAD, is not used.
    linked = headers.get("X-Linked-ETag")
    used = linked if linked or response.has_redirect_location else headers.get("ETag")
    if response.request.method == "HEAD" and used is not None and not _ETAG.fullmatch(_bare(used)):
        raise UnsafeInputError("the hub's ETag cannot be a file name in the cache", path=url, found=used[:80])
    if linked is None and response.has_redirect_location and not _ETAG.fullmatch(_bare(headers.get("ETag", ""))):
        headers.pop("ETag", None)
    if response.status_code in _BUSY:
        waits = [
            int(found) for name in ("Retry-After", "RateLimit") for found in _WAITS.findall(headers.get(name, ""))
        ]
        if max(waits, default=0) > LIMITS.wait_seconds:
            raise InputError(f"the hub is busy and requests a pause of {max(waits)} seconds", path=url)


def _bare(etag: str) -> str:
    """An ETag as huggingface_hub makes a file name of it."""
    return etag.lstrip("W/").strip('"')


def _too_slow(url: str) -> InputError:
    hint = "run the same command again; if it fails again, check the network, HF_ENDPOINT and proxies"
    return InputError("the hub is too slow: hardly anything arrives", path=url, hint=hint)


def _sockets() -> weakref.WeakSet[socket.socket]:
    """The sockets that this thread has opened to hubs."""
    if not hasattr(_LOCAL, "sockets"):
        _LOCAL.sockets = weakref.WeakSet()
    found: weakref.WeakSet[socket.socket] = _LOCAL.sockets
    return found
