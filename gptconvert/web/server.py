"""Serve an export's directory to browsers on this machine, with the headers that threads in WebAssembly need.

Only regular files inside the directory are served, none that is hidden, and only to pages of this server: another
site could otherwise read the model through a name that resolves to the loopback address (DNS rebinding).
"""

from __future__ import annotations

import os
import re
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from gptconvert.containers.untrusted import is_plain_name
from gptconvert.errors import OutputError
from gptconvert.web.libraries import CDN

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}
POLICY = (
    "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; worker-src 'self' blob:; style-src 'self'; "
    f"connect-src 'self' blob: {CDN}/; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_BLOCK = 1 << 18
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Server(ThreadingHTTPServer):
    """A server of one directory on the loopback interface.

    Args:
        directory: the directory.
        port: 0 for any free one.

    Raises:
        OutputError: the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, directory: str, port: int) -> None:
        self.root = os.path.realpath(directory)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            hint = "choose another port, or any free one with --serve 0"
            raise OutputError(f"port {port} cannot be used ({error.strerror})", hint=hint) from error

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that close a connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with files."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gptconvert", ""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the address of the page is all there is to say."""

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def _answer(self, *, body: bool) -> None:
        if self.headers.get("Host") not in [f"{name}:{self.server.server_port}" for name in NAMES]:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        path = self._path()
        try:
            file = None if path is None else open(path, "rb")  # noqa: SIM115 - closed below
        except OSError:
            file = None
        if path is None or file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file:
            self._send(path, file, body=body)

    def _path(self) -> str | None:
        """The regular file that is asked for; None if there is none that may be served."""
        parts = unquote(urlsplit(self.path).path).removeprefix("/").split("/")
        if parts[-1] == "":
            parts[-1] = "index.html"
        if not all(is_plain_name(part) and not part.startswith(".") for part in parts):
            return None
        try:
            path = os.path.realpath(os.path.join(self.server.root, *parts))
        except ValueError:  # a NUL
            return None
        inside = path.startswith(os.path.join(self.server.root, ""))
        return path if inside and os.path.isfile(path) else None

    def _send(self, path: str, file: IO[bytes], *, body: bool) -> None:
        size = os.fstat(file.fileno()).st_size
        part = _part(self.headers.get("Range"), size)
        if part is None:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, end = part
        whole = end - start == size
        self.send_response(HTTPStatus.OK if whole else HTTPStatus.PARTIAL_CONTENT)
        if not whole:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        kind = TYPES.get(os.path.splitext(path)[1].lower(), "application/octet-stream")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            file.seek(start)
            _copy(file, self.wfile, end - start)


def _part(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, end) of the bytes that a Range header asks for; None if there are none (RFC 9110, section 14)."""
    match = _RANGE.fullmatch(header or "")
    if match is None or match[0] == "bytes=-":  # none, several ranges or another unit: the whole file
        return 0, size
    first, last = match.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):  # not a range: ignored
            return 0, size
    return (start, end) if start < end else None


def _copy(file: IO[bytes], target: Any, count: int) -> None:
    """Copy ``count`` bytes, fewer if the file becomes shorter meanwhile."""
    while count > 0 and (block := file.read(min(count, _BLOCK))):
        target.write(block)
        count -= len(block)
