"""A hub on the loopback: the part of the Hugging Face protocol needed to resolve and download a model.

It is honest unless ``Hub.trick`` replaces its replies.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Reply:
    """What the server sends.

    Attributes:
        status: HTTP status.
        headers: added to ``Content-Length``, or replacing it; None removes one.
        body: the content, or parts of it that are sent as they are made.
        seconds: pause after each byte of the headers and the body.
        slow_headers: whether the pause applies to the headers.
    """

    status: int
    headers: Mapping[str, str | None]
    body: bytes | Iterable[bytes]
    seconds: float = 0
    slow_headers: bool = False


#: Method, path of the request (``org/tiny/resolve/main/config.json``), and the honest reply → the reply sent.
Trick = Callable[[str, str, Reply], Reply]


@dataclass
class Hub:
    """The server's content, and the requests it received.

    Attributes:
        repos: repository → revision (branch, tag or commit) → commit.
        files: commit → name → content.
        private: repositories that need the token ``good``.
        gated: repositories whose owner has not granted access.
        lies: file name → content sent instead of the listed one (same length).
        requests: method and path of every request.
        authorization: the token of every request.
        status: HTTP status returned for every request; None for normal operation.
        trick: replaces replies; None for normal operation.
        endpoint: the server's address.
    """

    repos: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    lies: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)
    status: int | None = None
    trick: Trick | None = None
    endpoint: str = ""

    def downloads(self) -> list[str]:
        """Names of the files fetched."""
        return [r.rsplit("/", 1)[1] for r in self.requests if r.startswith("GET") and "/resolve/" in r]


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".h5"))


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sibling(name: str, content: bytes) -> dict[str, object]:
    """One entry of the listing ``/api/models/REPO/revision/REV?blobs=true``."""
    entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
    if is_lfs(name):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class Handler(BaseHTTPRequestHandler):
    """Answers requests from ``hub``."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append(f"{self.command} {path}")
        hub.authorization.append(self.headers.get("Authorization"))
        if hub.status is not None:
            return self.error(hub.status)
        api = path.startswith("api/models/")
        path = path.removeprefix("api/models/")
        repo = next((r for r in hub.repos if path == r or path.startswith(r + "/")), None)
        if repo is None:
            return self.error(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        if repo in hub.private and self.headers.get("Authorization") != "Bearer good":
            return self.error(401, "RepoNotFound")
        if repo in hub.gated and not api:
            return self.error(403, "GatedRepo")
        rest = path[len(repo) :].strip("/").split("/", 2)
        revision = rest[1] if len(rest) > 1 else "main"
        commit = hub.repos[repo].get(revision, revision)
        if commit not in hub.files:
            return self.error(404, "RevisionNotFound")
        if api:
            return self.listing(repo, commit)
        return self.content(commit, rest[2])

    def listing(self, repo: str, commit: str) -> None:
        files = [sibling(name, content) for name, content in self.hub.files[commit].items()]
        self.send(200, json.dumps({"id": repo, "sha": commit, "siblings": files}).encode(), {})

    def content(self, commit: str, name: str) -> None:
        content = self.hub.files[commit].get(name)
        if content is None:
            return self.error(404, "EntryNotFound")
        etag = hashlib.sha256(content).hexdigest() if is_lfs(name) else blob_id(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if is_lfs(name):
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        body = self.hub.lies.get(name, content)
        wanted = self.headers.get("Range")
        if wanted is None or self.command == "HEAD":
            return self.send(200, body, headers)
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        return self.send(206, body[start:], headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})

    def error(self, status: int, code: str | None = None) -> None:
        self.send(status, b"", {} if code is None else {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        reply = Reply(status, headers, body)
        if self.hub.trick is not None:
            reply = self.hub.trick(self.command, unquote(urlsplit(self.path).path).strip("/"), reply)
        length = {"Content-Length": str(len(reply.body))} if isinstance(reply.body, bytes) else {}
        named = {name: value for name, value in {**length, **reply.headers}.items() if value is not None}
        self.close_connection = self.command == "GET" and named.get("Content-Length") != length.get("Content-Length")
        head = f"HTTP/1.1 {reply.status} OK\r\n" + "".join(f"{name}: {value}\r\n" for name, value in named.items())
        try:
            self.write([(head + "\r\n").encode("latin-1")], reply.seconds if reply.slow_headers else 0)
            if self.command == "GET":
                self.write([reply.body] if isinstance(reply.body, bytes) else reply.body, reply.seconds)
        except OSError:  # the client gave up, as it should
            self.close_connection = True

    def write(self, parts: Iterable[bytes], seconds: float) -> None:
        for part in parts:
            for piece in [part] if not seconds else (part[i : i + 1] for i in range(len(part))):
                self.wfile.write(piece)
                time.sleep(seconds)


class Server(ThreadingHTTPServer):
    """A server that does not wait for its threads, and stays quiet when a client hangs up."""

    daemon_threads, block_on_close = True, False

    def handle_error(self, *_: object) -> None: ...


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` on a free port of the loopback and set ``hub.endpoint``."""
    handler = type("Handler", (Handler,), {"hub": hub})
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
