"""A web server on 127.0.0.1 for tests: plain files with ranges, validators and faults, and the Hub's file protocol.

Every request is kept in `server.requests`, so that a test can say how many there were and what they asked for.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar


@dataclass
class Served:
    """One file and the ways in which its server misbehaves; `faults` are used up one request at a time."""

    content: bytes
    ranges: bool = True
    etag: str | None = None
    """None: made from the content; "": the server sends none."""
    faults: list[str] = field(default_factory=list)
    """`cut:N` closes the connection after N bytes of the body; a number is answered as that status."""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def validator(self) -> str:
        if self.etag is not None:
            return self.etag
        # the git hash of the content, as the Hub sends for files outside its large-file storage
        return f'"{hashlib.sha1(b"blob %d" % len(self.content) + bytes(1) + self.content).hexdigest()}"'


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class LocalServer(ThreadingHTTPServer):
    """Serves `files` by path; `hub_errors` maps a path prefix to (status, the Hub's error code)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Served] = {}
        self.hub_errors: dict[str, tuple[int, str]] = {}
        self.redirects: dict[str, str] = {}
        self.requests: list[Request] = []
        self.delay_s = 0.0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early, as some tests do on purpose, is nothing to print."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def serve(self, path: str, content: bytes, **how: Any) -> str:
        """Serve `content` at `path` and return its URL."""
        self.files[path] = Served(content, **how)
        return self.url + path

    def serve_hub_file(self, repo: str, revision: str, file: str, content: bytes) -> None:
        """Serve a file as the Hub does: commit, ETag and length in the headers of `/repo/resolve/revision/file`."""
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(revision.encode()).hexdigest()
        self.serve(f"/{repo}/resolve/{revision}/{file}", content, headers={"X-Repo-Commit": commit})

    def asked(self, method: str, ending: str = "") -> list[Request]:
        """The requests of one method whose path ends so."""
        return [one for one in self.requests if one.method == method and one.path.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalServer

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *arguments: object) -> None:
        """Keep the test output clean."""

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(Request(self.command, path, dict(self.headers)))
        refused = next((answer for prefix, answer in self.server.hub_errors.items() if path.startswith(prefix)), None)
        served = self.server.files.get(path)
        fault = served.faults.pop(0) if served and served.faults and body else ""
        if refused:
            self._status(refused[0], {"X-Error-Code": refused[1], "X-Error-Message": refused[1]})
        elif path in self.server.redirects:
            self._status(302, {"Location": self.server.redirects[path]})
        elif served is None:
            self._status(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
        elif fault.isdigit():
            self._status(int(fault), {})
        else:
            self._file(served, body, cut=int(fault.removeprefix("cut:")) if fault else None)

    def _file(self, served: Served, body: bool, cut: int | None) -> None:
        start, whole = 0, len(served.content)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and served.ranges and self.headers.get("If-Range", served.validator) == served.validator:
            start = int(asked[1])
        if start and start >= whole:
            self._status(416, {"Content-Range": f"bytes */{whole}"})
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(whole - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        if served.validator:
            self.send_header("ETag", served.validator)
        for name, value in served.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            threading.Event().wait(self.server.delay_s)
            self.wfile.write(served.content[start : whole if cut is None else start + cut])
            self.wfile.flush()
        if cut is not None:
            self.close_connection = True

    def _status(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()


Server = TypeVar("Server", bound=LocalServer)


@contextmanager
def local_server(kind: type[Server] = LocalServer) -> Iterator[Server]:  # type: ignore[assignment]
    """A running server; everything it started has ended when the block ends."""
    server = kind()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
