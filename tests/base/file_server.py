"""A real HTTP server on 127.0.0.1 for the tests: ETags, ranges, and the ways in which servers fail."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import soma.base.artefact as artefact


class FileServer:
    """What it serves and how: `files` path → bytes, and one-time or lasting faults by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, list[int]] = {}  # path → after how many bytes to break off, one entry per request
        self.status: dict[str, list[int]] = {}  # path → status codes to answer first
        self.delay: dict[str, float] = {}  # path → seconds before the answer, at most until the server ends
        self.over = threading.Event()
        self.login: str | None = None  # the Authorization header that is asked for
        self.redirect: dict[str, str] = {}
        self.validators = True
        self.requests: list[tuple[str, int, dict[str, str]]] = []  # path, status answered, request headers
        self.url = ""

    def answered(self, path: str) -> list[int]:
        return [status for asked, status, _ in self.requests if asked == path]


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def answer(self, status: int, headers: dict[str, str], body: bytes = b"", cut: int | None = None) -> None:
            server.requests.append((urlsplit(self.path).path, status, dict(self.headers)))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if cut is None else body[:cut])

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            server.over.wait(server.delay.get(path, 0))
            if server.login and self.headers.get("Authorization") != server.login:
                return self.answer(401, {})
            if server.status.get(path):
                return self.answer(server.status[path].pop(0), {})
            if path in server.redirect:
                return self.answer(302, {"Location": server.redirect[path]})
            if path not in server.files:
                return self.answer(404, {})
            body = server.files[path]
            etag = f'"{artefact.hash_lines([body.hex()])[:16]}"'
            headers = {"ETag": etag} if server.validators else {}
            if server.validators and self.headers.get("If-None-Match") == etag:
                return self.answer(304, headers)
            cut = server.cut[path].pop(0) if server.cut.get(path) else None
            start = self.headers.get("Range", "").removeprefix("bytes=").rstrip("-")
            if start and server.validators and self.headers.get("If-Range") == etag:
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                return self.answer(206, headers, body[int(start) :], cut)
            return self.answer(200, headers, body, cut)

    return Handler


@contextmanager
def serving() -> Iterator[FileServer]:
    """A running server."""
    files = FileServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(files)) as http:
        files.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield files
        finally:
            files.over.set()
            http.shutdown()
            thread.join()
