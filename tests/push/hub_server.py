"""A hub on the loopback: the part of its protocol that creates repositories, pull requests, commits and tags."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.sources.hub_server import Server, blob_id

TOKEN = "hf_good"
#: Files of these kinds are stored by LFS.
LFS = (".safetensors", ".onnx", ".onnx_data", ".pb", ".gguf")


@dataclass(frozen=True)
class Blob:
    """A committed file."""

    content: bytes
    lfs: bool


@dataclass
class Repo:
    """A repository.

    Attributes:
        private: its visibility.
        refs: branch, ``refs/pr/N`` or ``refs/tags/NAME`` → commit.
        commits: commit → path → file.
        titles: commit → its message.
        pull_requests: number → status.
        ignored: paths that a .gitignore leaves out.
    """

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": Blob(b"*.onnx filter=lfs\n", False)}, "initial commit")

    def commit(self, ref: str, files: Mapping[str, Blob], title: str) -> str:
        """Add files to a revision."""
        oid = hashlib.sha1(f"{ref} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = {**self.files(ref), **files}
        self.refs[ref], self.titles[oid] = oid, title
        return oid

    def files(self, revision: str) -> dict[str, Blob]:
        """The files of a branch, reference or commit."""
        return self.commits.get(self.refs.get(revision, revision), {})

    def contents(self, revision: str) -> dict[str, bytes]:
        """The same without the hub's own files."""
        return {path: blob.content for path, blob in self.files(revision).items() if path != ".gitattributes"}


@dataclass
class Hub:
    """The server's content.

    Attributes:
        repos: name → repository.
        objects: SHA-256 → content of an LFS object.
        requests: what was asked, in order, as named in ``ROUTES``.
        fail: request → status with which it is refused; 0 to never answer, -1 to hang up.
        after: request → how many succeed before ``fail`` applies.
        until: request → the last to which it applies.
        refused: text with which every model card is refused.
        damage: LFS objects are stored damaged.
        endpoint: the address.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    until: dict[str, int] = field(default_factory=dict)
    refused: str = ""
    damage: bool = False
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


#: Name of a request → method and path.
ROUTES: Mapping[str, tuple[str, str]] = {
    "info": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)"),
    "create": ("POST", r"/api/repos/create"),
    "refs": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs"),
    "validate": ("POST", r"/api/validate-yaml"),
    "open": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions"),
    "details": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions/(?P<number>\d+)"),
    "status": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions/(?P<number>\d+)/status"),
    "branch": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<ref>[^/]+)"),
    "preupload": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<ref>[^/]+)"),
    "batch": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    "verify": ("POST", r"/lfs/verify"),
    "commit": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<ref>[^/]+)"),
    "revision": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<ref>[^/]+)"),
    "tree": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<ref>[^/]+)"),
    "tag": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/tag/(?P<ref>[^/]+)"),
    "xet": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-write-token/(?P<ref>[^/]+)"),
}


class Refused(Exception):
    """A request is refused with a status and a message."""


class Handler(BaseHTTPRequestHandler):
    """Answers requests from ``hub``."""

    protocol_version, wbufsize = "HTTP/1.1", 1 << 16  # one write per reply, else each waits 40 ms for an ACK
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def do_PUT(self) -> None:
        self.respond()

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self.chunk, b""))
        path = urlsplit(self.path).path
        name, found = next(
            (name, match)
            for name, (method, pattern) in ROUTES.items()
            if method == self.command and (match := re.fullmatch(pattern, path))
        )
        with self.hub.lock:
            self.hub.requests.append(name)
            nth = self.hub.requests.count(name)
            fails = self.hub.after.get(name, 0) < nth <= self.hub.until.get(name, nth)
            status = self.hub.fail.get(name) if fails else None
        if status == 0:
            time.sleep(3)
            self.close_connection = True
            return
        if status == -1:
            self.close_connection = True
            return
        try:
            if status is not None:
                raise Refused(status, "planted")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and name not in ("put", "validate"):
                raise Refused(401, "Invalid credentials in Authorization header")
            with self.hub.lock:
                arguments = {key: unquote(value) for key, value in found.groupdict().items()}
                reply = getattr(self, f"on_{name}")(body, **arguments)
            self.send(200, reply)
        except Refused as error:
            status, message = error.args
            self.send(status, {"error": message}, message)

    def chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def send(self, status: int, reply: object, message: str | None = None) -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if message is not None:
            self.send_header("X-Error-Message", message)
            if message == "Repository not found" or (message == "planted" and status in (401, 404)):
                self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(data)

    def repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise Refused(404, "Repository not found")
        return self.hub.repos[name]

    def at(self, repo: str, ref: str) -> Repo:
        found = self.repo(repo)
        if ref not in found.refs and ref not in found.commits:
            raise Refused(404, "Revision not found")
        return found

    def on_info(self, body: bytes, repo: str) -> object:
        found = self.repo(repo)
        return {"id": repo, "private": found.private, "sha": found.refs["main"], "siblings": []}

    def on_revision(self, body: bytes, repo: str, ref: str) -> object:
        found = self.at(repo, ref)
        return {"id": repo, "private": found.private, "sha": found.refs.get(ref, ref), "siblings": []}

    def on_create(self, body: bytes) -> object:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo")
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or asked.get("private", False))
        return {"url": f"{self.hub.endpoint}/{name}"}

    def on_refs(self, body: bytes, repo: str) -> object:
        refs = self.repo(repo).refs
        tags = {ref.removeprefix("refs/tags/"): oid for ref, oid in refs.items() if ref.startswith("refs/tags/")}
        return {
            "branches": [],
            "converts": [],
            "tags": [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid} for name, oid in tags.items()],
        }

    def on_validate(self, body: bytes) -> object:
        assert json.loads(body)["content"].startswith("---\n")
        if self.hub.refused:
            raise Refused(400, self.hub.refused)
        return {"errors": [], "warnings": []}

    def on_open(self, body: bytes, repo: str) -> object:
        found, asked = self.repo(repo), json.loads(body)
        assert asked["pullRequest"] and asked["title"] and asked["description"]
        number = len(found.pull_requests) + 1
        found.pull_requests[number] = "draft"
        found.refs[f"refs/pr/{number}"] = found.refs["main"]
        return {"num": number}

    def on_details(self, body: bytes, repo: str, number: str) -> object:
        found = self.repo(repo)
        if int(number) not in found.pull_requests:
            raise Refused(404, "Discussion not found")
        return {
            "title": "title",
            "num": int(number),
            "author": {"name": "someone"},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "status": found.pull_requests[int(number)],
            "repo": {"name": repo, "type": "model"},
            "isPullRequest": True,
            "events": [],
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
        }

    def on_status(self, body: bytes, repo: str, number: str) -> object:
        status = json.loads(body)["status"]
        self.repo(repo).pull_requests[int(number)] = status
        event = {"id": "e", "type": "status-change", "createdAt": "2026-01-01T00:00:00.000Z"}
        return {"newStatus": {**event, "author": {"name": "someone"}, "data": {"status": status}}}

    def on_branch(self, body: bytes, repo: str, ref: str) -> object:
        found = self.repo(repo)
        if ref in found.refs:
            raise Refused(409, "Reference already exists")
        found.refs[ref] = found.refs[json.loads(body)["startingPoint"]]
        return {}

    def on_preupload(self, body: bytes, repo: str, ref: str) -> object:
        found, files = self.at(repo, ref), json.loads(body)["files"]
        present = found.files(ref)
        return {"files": [self.mode(each["path"], present, found) for each in files]}

    def mode(self, path: str, present: Mapping[str, Blob], repo: Repo) -> Mapping[str, object]:
        blob = present.get(path)
        oid = blob and (hashlib.sha256(blob.content).hexdigest() if blob.lfs else blob_id(blob.content))
        kind = "lfs" if path.endswith(LFS) else "regular"
        return {"path": path, "uploadMode": kind, "shouldIgnore": path in repo.ignored, "oid": oid}

    def on_batch(self, body: bytes, repo: str) -> object:
        self.repo(repo)
        asked = json.loads(body)
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        objects: list[Any] = []
        for each in asked["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}
            verify = {"href": f"{self.hub.endpoint}/lfs/verify"}
            actions = {} if each["oid"] in self.hub.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**each, **actions})
        return {"transfer": "basic", "objects": objects}

    def on_put(self, body: bytes, oid: str) -> object:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "checksum mismatch")
        self.hub.objects[oid] = body[:-1] + b"\0" if self.hub.damage else body
        return {}

    def on_verify(self, body: bytes) -> object:
        asked = json.loads(body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "no such object")
        return {}

    def on_commit(self, body: bytes, repo: str, ref: str) -> object:
        found = self.at(repo, ref)
        assert ref != "main", "the default branch is never written to"
        head, *operations = map(json.loads, body.splitlines())
        files: dict[str, Blob] = {}
        for each in operations:
            value = each["value"]
            if each["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            else:
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        oid = found.commit(ref, files, head["value"]["summary"])
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid}

    def on_tree(self, body: bytes, repo: str, ref: str) -> object:
        entries: list[dict[str, object]] = []
        for path, blob in self.at(repo, ref).files(ref).items():
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(blob.content)}
            entry["oid"] = blob_id(blob.content)
            if blob.lfs:
                digest = hashlib.sha256(blob.content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(blob.content), "pointerSize": 134}
            entries.append(entry)
        return [*entries, {"type": "directory", "path": "onnx", "oid": "0" * 40}]

    def on_tag(self, body: bytes, repo: str, ref: str) -> object:
        found, name = self.at(repo, ref), json.loads(body)["tag"]
        found.refs[f"refs/tags/{name}"] = found.refs.get(ref, ref)
        return {}

    def on_xet(self, body: bytes, repo: str, ref: str) -> object:
        raise Refused(404, "no Xet here")


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` on a free port of the loopback and set ``hub.endpoint``."""
    server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
