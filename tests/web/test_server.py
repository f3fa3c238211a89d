"""The server of the page: headers, types, ranges, and what it must not serve."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptconvert.errors import OutputError
from gptconvert.web.server import HEADERS, Server

BODY = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server") / "out"
    (root / "onnx").mkdir(parents=True)
    (root / "index.html").write_text("<!doctype html>")
    for name in ("onnx/model.onnx", "a b.wasm", "worker.js", "lib.mjs", "café.json", "style.css", ".hidden"):
        (root / name).write_bytes(BODY)
    (root.parent / "secret").write_text("secret")
    (root / "link").symlink_to("../secret")
    (root / "inner").symlink_to("worker.js")
    os.mkfifo(root / "pipe")
    found = Server(str(root), 0)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def ask(
    server: Server, path: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/index.html?v=1", "text/html; charset=utf-8"),
        ("/onnx/model.onnx?v=0123", "application/octet-stream"),
        ("/a%20b.wasm", "application/wasm"),
        ("/worker.js", "text/javascript; charset=utf-8"),
        ("/lib.mjs", "text/javascript; charset=utf-8"),
        ("/caf%C3%A9.json", "application/json"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/inner", "text/javascript; charset=utf-8"),
    ],
)
def test_files(server: Server, path: str, kind: str) -> None:
    status, headers, body = ask(server, path)
    assert (status, headers["Content-Type"]) == (200, kind)
    assert body == (b"<!doctype html>" if "html" in kind else BODY)
    assert HEADERS.items() <= headers.items()
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert headers["Cache-Control"] == "no-store"
    status, head, body = ask(server, path, method="HEAD")
    assert (status, body) == (200, b"")
    assert head["Content-Length"] == headers["Content-Length"]


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/missing",
            "/onnx",
            "/onnx/",
            "/.hidden",
            "/../secret",
            "/%2e%2e/secret",
            "/..%2fsecret",
            "/link",
            "/pipe",
        ),
        *(
            "//etc/passwd",
            "/onnx/../../secret",
            "/onnx//model.onnx",
            "/a\\..\\secret",
            "/x%00y",
            "/%ff",
            "/./worker.js",
        ),
    ],
)
def test_nothing_else_is_served(server: Server, path: str) -> None:
    status, headers, body = ask(server, path)
    assert status == 404
    assert b"secret" not in body.replace(b"secret", b"", path.count("secret")) and BODY[:64] not in body
    assert HEADERS.items() <= headers.items()


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost:1", "evil.example:{port}", ""])
def test_other_names_are_refused(server: Server, host: str) -> None:
    """A page elsewhere whose name resolves to this address must not read the model."""
    status, _, body = ask(server, "/worker.js", {"Host": host.format(port=server.server_port)})
    assert status == 421 and BODY[:64] not in body
    assert ask(server, "/worker.js", {"Host": f"localhost:{server.server_port}"})[0] == 200


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=10-19", slice(10, 20)),
        ("bytes=10000-", slice(10000, None)),
        ("bytes=-100", slice(-100, None)),
        ("bytes=10-99999999", slice(10, None)),
    ],
)
def test_ranges(server: Server, asked: str, part: slice) -> None:
    status, headers, body = ask(server, "/onnx/model.onnx", {"Range": asked})
    start, end, _ = part.indices(len(BODY))
    assert (status, body) == (206, BODY[part])
    assert headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(BODY)}"


@pytest.mark.parametrize("asked", ["bytes=5-4", "bytes=-", "bytes=0-1,3-4", "items=0-1", "bytes=x-y", "bytes=0-"])
def test_ranges_that_mean_the_whole_file(server: Server, asked: str) -> None:
    assert ask(server, "/onnx/model.onnx", {"Range": asked})[::2] == (200, BODY)


@pytest.mark.parametrize("asked", [f"bytes={len(BODY)}-", "bytes=-0"])
def test_ranges_beyond_the_file(server: Server, asked: str) -> None:
    status, headers, body = ask(server, "/onnx/model.onnx", {"Range": asked})
    assert (status, headers["Content-Range"], body) == (416, f"bytes */{len(BODY)}", b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods(server: Server, method: str) -> None:
    assert ask(server, "/worker.js", method=method)[0] == 501


def test_a_port_in_use(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"port {server.server_port} cannot be used"):
        Server(str(tmp_path), server.server_port)


def test_only_this_machine_is_served(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.socket.family == socket.AF_INET


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_signals_end_the_server(tmp_path: Path, number: int, code: int) -> None:
    """Ctrl-C is the normal way to stop it, so the exit code is 0."""
    from tests.commands import TRAINED

    program = [sys.executable, "-m", "gptconvert"]
    export = tmp_path / "out"
    subprocess.run([*program, "openai-tf", TRAINED, "--to", "onnx", "--no-verify", "-q", "-o", export], check=True)
    with subprocess.Popen([*program, "web", export, "--serve", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(line.split()[1] for line in process.stdout if line.startswith("Open "))
        host, _, port = address.removeprefix("http://").rstrip("/").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", "/web/site.json")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(number)
        assert process.wait(20) == code
