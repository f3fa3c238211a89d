"""Hubs, mirrors and proxies that lie, stall, or try to leave the cache.

Each command runs in this process, with huggingface_hub's constants set to a server on the loopback.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gptconvert.errors import InputError
from gptconvert.sources import hub_http
from gptconvert.sources.hub_listing import MAX_VALUES, parse_listing
from tests.commands import Outcome, command
from tests.helpers import FIXTURES
from tests.sources.hub_server import COMMIT, Hub, Reply, blob_id, serve

REPO = "org/tiny"
VICTIM = "victim.txt"
UP = "../../../" + VICTIM


@dataclass
class Site:
    """A user's directory with a hub cache inside, beside a file that must survive."""

    hub: Hub
    home: Path
    run: Callable[..., Outcome]

    def inspect(self, *options: str) -> Outcome:
        return self.run("inspect", REPO, "--cache-dir", self.home / "cache", "--no-tensors", *options)

    def refused(self, code: int, *texts: str) -> Outcome:
        """Run, and check the exit code, the message, and that nothing outside the cache was touched."""
        done = self.inspect()
        assert done.code == code, done.err
        assert "this is a bug" not in done.err and "Traceback" not in done.err
        for text in texts:
            assert text in done.err
        assert (self.home / VICTIM).read_text() == "precious"
        assert sorted(os.listdir(self.home)) in (["cache", VICTIM], [VICTIM])
        return done

    def trick(self, change: Callable[[Reply], Reply], *, path: str = "/resolve/", method: str = "") -> None:
        """Change the replies to requests whose path contains ``path``."""

        def changed(command: str, at: str, reply: Reply) -> Reply:
            return change(reply) if path in at and method in ("", command) else reply

        self.hub.trick = changed


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Site]:
    from huggingface_hub import constants

    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    (home / VICTIM).write_text("precious")
    source = FIXTURES / "tiny-gpt2" / "hf-safetensors"
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with serve(Hub({REPO: {"main": COMMIT}}, {COMMIT: files})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
        monkeypatch.setattr(hub_http, "LIMITS", hub_http.Limits(1, 1, 200, 12, 5, 1 << 20))
        yield Site(hub, home, lambda *args: command(capsys, *args))


def test_an_honest_hub(site: Site) -> None:
    done = site.inspect("--json")
    assert done.code == 0, done.err
    assert not any("digest" in note for note in done.json["notes"])


# Paths


@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag"])
@pytest.mark.parametrize("etag", [UP, "/etc/passwd", "..", "a/b", "..\\..\\x", "", "x" * 300, ".hidden"])
def test_etag_that_leaves_the_cache(site: Site, header: str, etag: str) -> None:
    quoted = f'"{etag}"'
    site.trick(lambda reply: replace(reply, headers={**reply.headers, header: quoted}))
    site.refused(7, "the hub's ETag cannot be a file name in the cache", site.hub.endpoint)
    assert not list((site.home / "cache").rglob("*.txt"))


@pytest.mark.parametrize("commit", [UP, "/etc", "main", COMMIT + "/..", ""])
@pytest.mark.parametrize("status", [200, 404])
def test_commit_header_that_leaves_the_cache(site: Site, commit: str, status: int) -> None:
    """Also with an error: huggingface_hub records a missing file under the commit, by creating an empty file."""
    extra = {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound"}
    site.trick(lambda reply: replace(reply, status=status, headers={**reply.headers, **extra}))
    site.refused(7, "X-Repo-Commit is not a commit", site.hub.endpoint)


def listing(site: Site, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the repository's listing."""

    def changed(reply: Reply) -> Reply:
        assert isinstance(reply.body, bytes)
        value = json.loads(reply.body)
        change(value)
        return replace(reply, body=json.dumps(value).encode())

    site.trick(changed, path="api/models/")


@pytest.mark.parametrize("name", [f"../{UP}", "/etc/passwd", "LICENSE\0", "..", "a/../b", "a//b", ""])
def test_file_name_that_leaves_the_repository(site: Site, name: str) -> None:
    listing(site, lambda value: value["siblings"].append({"rfilename": name, "size": 1}))
    site.refused(7, "the listing has a file name that leads out of the repository", site.hub.endpoint)
    assert site.hub.downloads() == []


@pytest.mark.parametrize("name", ["..\\..\\victim.tiktoken", "C:x.tiktoken"])
def test_file_name_that_is_a_path_on_windows_is_never_fetched(site: Site, name: str) -> None:
    site.hub.files[COMMIT][name] = b"x"
    assert site.inspect().code == 0
    assert not any("tiktoken" in name for name in site.hub.downloads())


@pytest.mark.parametrize("commit", [f"../{UP}", "main", None, 7, COMMIT.upper()])
def test_commit_in_the_listing(site: Site, commit: object) -> None:
    listing(site, lambda value: value.update(sha=commit))
    site.refused(3, "listing is malformed", "a commit in `sha`", site.hub.endpoint)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/"])
@pytest.mark.parametrize("path", ["/resolve/", "api/models/"])
def test_redirect_to_another_kind_of_address(site: Site, location: str, path: str) -> None:
    site.trick(lambda reply: Reply(302, {**reply.headers, "Location": location}, b""), path=path)
    site.refused(7, "redirects to an address of another kind", site.hub.endpoint)


def test_redirect_to_another_host_is_followed_and_checked(site: Site) -> None:
    """As to the hub's own content servers: the digest is the listing's."""
    here = site.hub.endpoint.replace("127.0.0.1", "localhost")

    def redirected(method: str, path: str, reply: Reply) -> Reply:
        to = f"{here}/org/tiny/resolve/{COMMIT}/{path.rsplit('/', 1)[1]}"
        other = "/resolve/" in path and method == "HEAD"
        return replace(reply, status=302, headers={**reply.headers, "Location": to}) if other else reply

    site.hub.trick = redirected
    assert site.inspect().code == 0
    site.home.joinpath("cache").rename(site.home.parent / "used")
    site.hub.lies["config.json"] = site.hub.files[COMMIT]["config.json"][::-1]
    site.refused(3, "the downloaded file is damaged and was removed from the cache")


@pytest.mark.parametrize("path", ["/resolve/", "api/models/"])
def test_endless_redirects(site: Site, path: str) -> None:
    def onwards(_: str, at: str, reply: Reply) -> Reply:
        return Reply(302, {**reply.headers, "Location": f"{site.hub.endpoint}/{at}"}, b"") if path in at else reply

    site.hub.trick = onwards
    site.refused(3, site.hub.endpoint)


def test_revision_that_leaves_the_cache(site: Site) -> None:
    done = site.inspect("--revision", f"../{UP}")
    assert (done.code, site.hub.requests) == (2, [])
    assert "--revision: not a valid revision" in done.err


# What is deleted


def test_a_damaged_download_is_removed_and_nothing_else(site: Site) -> None:
    name = "model.safetensors"
    site.hub.lies[name] = site.hub.files[COMMIT][name][::-1]
    site.refused(3, "the downloaded file is damaged and was removed from the cache", name)
    left = [path.name for path in site.home.rglob("*") if path.is_file() or path.is_symlink()]
    assert name not in left and hashlib.sha256(site.hub.files[COMMIT][name]).hexdigest() not in left
    assert "config.json" in left


def test_a_file_that_was_in_the_cache_is_never_removed(site: Site) -> None:
    """The hub passes off one cached file as another, by its ETag."""
    assert site.inspect().code == 0
    blobs = next(site.home.rglob("blobs"))
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    config = site.hub.files[COMMIT]["config.json"]
    newer = "f" * 40
    site.hub.files[newer] = site.hub.files[COMMIT] | {"config.json": config + b" "}
    site.hub.repos[REPO]["main"] = newer
    site.trick(
        lambda reply: replace(
            reply, headers={**reply.headers, "ETag": blob_id(config), "Content-Length": str(len(config))}
        ),
        path="config.json",
    )
    done = site.refused(3, "a file that was in the cache before is damaged")
    assert f"remove {blobs / blob_id(config)}" in done.err
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before
    assert not (blobs.parent / "snapshots" / newer / "config.json").exists()


def test_a_link_out_of_the_cache_is_refused_and_its_target_stays(site: Site) -> None:
    """As left by another program that trusted the hub."""
    assert site.inspect().code == 0
    config = next(site.home.rglob("config.json"))
    config.unlink()
    config.symlink_to(site.home / VICTIM)
    site.refused(7, "links out of the hub cache")
    done = site.inspect("--offline")
    assert done.code == 7 and "links out of the hub cache" in done.err
    assert config.is_symlink()


def test_another_commit_in_the_headers_leaves_nothing_unchecked(site: Site) -> None:
    site.trick(lambda reply: replace(reply, headers={**reply.headers, "X-Repo-Commit": "e" * 40}), path="config.json")
    site.refused(3, "the repository changed during the download")
    assert not list(site.home.rglob("config.json"))


def test_the_digest_is_checked_although_an_older_commit_is_cached(site: Site) -> None:
    assert site.inspect().code == 0
    newer = "d" * 40
    config = site.hub.files[COMMIT]["config.json"] + b"\n"
    site.hub.files[newer] = site.hub.files[COMMIT] | {"config.json": config}
    site.hub.repos[REPO]["main"] = newer
    site.hub.lies["config.json"] = config[:-1] + b" "
    site.refused(3, "the downloaded file is damaged and was removed from the cache")


# Digests


def test_files_without_a_digest_are_noted(site: Site) -> None:
    def without(value: dict[str, Any]) -> None:
        for sibling in value["siblings"]:
            sibling.pop("lfs", None), sibling.pop("blobId", None)

    listing(site, without)
    notes = site.inspect("--json").json["notes"]
    assert "not checked after the download, as the hub lists no digest: config.json, model.safetensors" in notes
    strict = site.run("convert", REPO, "--cache-dir", site.home / "cache", "--strict", "--dry-run")
    assert strict.code == 3 and "lists no digest" in strict.err


@pytest.mark.parametrize(
    "sibling",
    [
        7,
        {},
        {"rfilename": 7},
        {"rfilename": "config.json", "blobId": "x"},
        {"rfilename": "config.json", "blobId": 7},
        {"rfilename": "config.json", "lfs": "x"},
        {"rfilename": "config.json", "lfs": {"sha256": "0" * 63}},
        {"rfilename": "config.json", "size": -1},
        {"rfilename": "config.json", "size": "1"},
    ],
    ids=str,
)
def test_malformed_entries(sibling: object) -> None:
    with pytest.raises(InputError, match="listing is malformed"):
        parse_listing(json.dumps({"sha": COMMIT, "siblings": [sibling]}).encode(), "http://hub")


def test_a_file_listed_twice() -> None:
    data = json.dumps({"sha": COMMIT, "siblings": [{"rfilename": "a"}] * 2}).encode()
    with pytest.raises(InputError, match="each file once"):
        parse_listing(data, "http://hub")


# Replies that are not a hub's

HTML = b"<!DOCTYPE html><html><title>Welcome to our WLAN</title></html>"


@pytest.mark.parametrize(
    "body",
    [HTML, b"", b"{", b"[]", b"null", b'{"sha":1e999}', b"[" * 100_000, b"\xff\xfe\x00", b'{"siblings":[{}]}'],
    ids=["html", "empty", "cut", "list", "null", "number", "deep", "bytes", "entry"],
)
def test_listing_that_is_none(site: Site, body: bytes) -> None:
    site.trick(lambda reply: replace(reply, body=body), path="api/models/")
    done = site.refused(3, f"{site.hub.endpoint}/api/models/{REPO}")
    assert ("HTML page" in done.err) == (body == HTML)


@pytest.mark.parametrize("status", [200, 401, 403, 404, 500])
@pytest.mark.parametrize(
    "body", [HTML, b'[{"errors": 7}]', b'{"errors": [7]}', b'{"error": {}}'], ids=["html", *"123"]
)
def test_error_bodies(site: Site, status: int, body: bytes) -> None:
    site.trick(lambda reply: Reply(status, {"Content-Type": "application/json"}, body), path="api/models/")
    site.refused(3)


@pytest.mark.parametrize("kind", ["html", "no etag", "no commit"])
def test_file_replies_without_metadata(site: Site, kind: str) -> None:
    """A captive portal answers everything with 200; huggingface_hub then speaks of an offline cache."""
    change: dict[str, Callable[[Reply], Reply]] = {
        "html": lambda reply: Reply(200, {"Content-Type": "text/html"}, HTML),
        "no etag": lambda reply: replace(reply, headers={"X-Repo-Commit": COMMIT}),
        "no commit": lambda reply: replace(reply, headers={"ETag": '"0"'}),
    }
    site.trick(change[kind])
    done = site.refused(3, "the reply of the hub cannot be used", site.hub.endpoint)
    assert "offline" not in done.err


@pytest.mark.parametrize(
    "headers", [{"Content-Length": "5"}, {"X-Linked-Size": "7"}, {"Content-Range": "bytes x/y"}], ids=str
)
def test_wrong_sizes(site: Site, headers: dict[str, str]) -> None:
    site.trick(lambda reply: replace(reply, headers={**reply.headers, **headers}), path="config.json")
    site.refused(3)


def test_connection_that_breaks_off_again_and_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every resumed download brings a chunk, so huggingface_hub would never give up."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    part = lambda reply: replace(reply, headers={**reply.headers, "Content-Length": "900"}, body=b"x")  # noqa: E731
    site.trick(part, path="config.json", method="GET")
    site.refused(3, "gave up after 12 requests for one file", site.hub.endpoint)


# Time and size


def test_busy_hub_that_requests_a_long_pause(site: Site) -> None:
    site.trick(lambda reply: Reply(429, {"Retry-After": "86400"}, b""), path="config.json")
    site.refused(3, "requests a pause of 86400 seconds")


@pytest.mark.parametrize("path", ["config.json", "api/models/"])
@pytest.mark.parametrize("slow_headers", [False, True], ids=["body", "headers"])
def test_a_byte_now_and_then(site: Site, path: str, slow_headers: bool) -> None:
    site.trick(lambda reply: replace(reply, seconds=0.02, slow_headers=slow_headers), path=path, method="GET")
    start = time.monotonic()
    site.refused(3, "the hub is too slow", site.hub.endpoint)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("path", ["config.json", "api/models/"])
def test_gzip_bomb(site: Site, path: str) -> None:
    bomb = gzip.compress(bytes(100 << 20))
    site.trick(lambda reply: replace(reply, headers={"Content-Encoding": "gzip"}, body=bomb), path=path, method="GET")
    site.refused(3, "the hub's reply is compressed, which was not requested", site.hub.endpoint)


@pytest.mark.parametrize("path", ["config.json", "api/models/"])
@pytest.mark.parametrize("status", [200, 404])
def test_endless_body(site: Site, path: str, status: int) -> None:
    def endless(reply: Reply) -> Reply:
        headers = {**reply.headers, "Content-Length": None}
        return replace(reply, status=status, headers=headers, body=iter(lambda: bytes(1 << 20), None))

    site.trick(endless, path=path, method="GET")
    site.refused(3, "the hub's reply is too long", site.hub.endpoint)


def test_listing_of_a_million_files(site: Site) -> None:
    import resource

    entry = b'{"rfilename":"%d"},'
    body = b'{"sha":"' + COMMIT.encode() + b'","siblings":[' + b"".join(entry % i for i in range(1_000_000))
    site.trick(lambda reply: replace(reply, body=body[:-1] + b"]}"), path="api/models/")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    site.refused(3, f"listing is too long; expected at most {MAX_VALUES} values")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10


def test_the_largest_listing_is_read_in_good_time() -> None:
    siblings = [{"rfilename": f"f/{i}", "size": 1, "blobId": f"{i:040x}"} for i in range(100_000)]
    data = json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
    start = time.process_time()
    assert parse_listing(data, "http://hub").names == ("f/",)
    assert time.process_time() - start < 2


# The guard


def test_the_guard_keeps_a_client_that_the_program_configured(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    made, default = [], _http.default_client_factory
    set_client_factory(lambda: made.append(1) or default())
    try:
        assert site.inspect().code == 0
        assert made == [1]
    finally:
        set_client_factory(default)


def test_requests_outside_the_guard_are_left_alone(site: Site) -> None:
    from huggingface_hub.utils import get_session

    assert site.inspect().code == 0
    site.trick(lambda reply: replace(reply, headers={"ETag": UP}), path="other")
    assert get_session().head(f"{site.hub.endpoint}/other").headers["ETag"] == UP


# Sizes


ENORMOUS = 1 << 40


def listed(site: Site, name: str, size: int) -> None:
    """List one more file, of any size."""
    site.hub.files[COMMIT][name] = b"{}"

    def change(value: dict[str, Any]) -> None:
        for each in value["siblings"]:
            if each["rfilename"] == name:
                each.update(size=size, lfs={"sha256": "0" * 64, "size": size})

    listing(site, change)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.json", "spiece.model", "vocab.txt"])
def test_documents_of_any_size_are_not_downloaded(site: Site, name: str) -> None:
    listed(site, name, ENORMOUS)
    site.refused(3, f"/{name}: too large for its kind of file" if name == "config.json" else "too large", "bytes")
    assert name not in site.hub.downloads()


@pytest.mark.parametrize("name", ["README.md", "LICENSE.txt"])
def test_enormous_documents_that_are_not_needed_are_left_behind(site: Site, name: str) -> None:
    listed(site, name, ENORMOUS)
    done = site.inspect("--json")
    assert done.code == 0, done.err
    assert f"left behind, as too large for documents: {name}" in done.json["notes"]
    assert name not in site.hub.downloads()


def test_an_endless_document_of_unknown_size(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptconvert.sources.hub.MAX_BYTES", 1 << 20)
    site.hub.files[COMMIT]["tokenizer.json"] = b"{}"

    def endless(_: str, at: str, reply: Reply) -> Reply:
        if at.endswith("tokenizer.json"):
            headers = {**reply.headers, "Content-Length": None}
            return replace(reply, headers=headers, body=iter(lambda: bytes(1 << 20), None))
        if "/api/" in at:
            value = json.loads(reply.body)  # type: ignore[arg-type]
            for each in value["siblings"]:
                if each["rfilename"] == "tokenizer.json":
                    each.pop("size")
            body = json.dumps(value).encode()
            return replace(reply, body=body, headers={**reply.headers, "Content-Length": str(len(body))})
        return reply

    site.hub.trick = endless
    site.refused(3, "the hub's reply is too long")
