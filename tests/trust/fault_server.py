"""A web server that fails in the ways in which servers fail: one `Fault` for each request, used up in their order.

It speaks to a plain downloader and to the Hub's client alike; a path without faults left is served as it should be.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from helpers.local_server import LocalServer, Request, Served, _Handler, local_server


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one request; parts that are left alone are as they should be."""

    status: int = 0
    """Answer this instead of the file."""
    headers: dict[str, str] = field(default_factory=dict)
    """Beside, or in the place of, the right ones."""
    without: tuple[str, ...] = ()
    """Headers that are left out."""
    body: bytes | None = None
    """Sent instead of the file's content."""
    cut_at: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_at: int | None = None
    """Send nothing more after so many bytes, and keep the connection until the server ends."""
    piece_bytes: int = 1 << 16
    pause_s: float = 0.0
    """Between pieces: a slow line, or a trickle."""
    silent: bool = False
    """Take the request and never answer."""
    at_byte: tuple[int, Callable[[], None]] | None = None
    """Call this when so many bytes of the body were sent."""


class FaultServer(LocalServer):
    """`faults` by path are used up by GET, `head_faults` by HEAD; `renamed` maps a repository to where it went."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = _FaultHandler
        self.faults: dict[str, list[Fault]] = {}
        self.head_faults: dict[str, list[Fault]] = {}
        self.renamed: dict[str, str] = {}
        self.injected = 0
        self.ending = threading.Event()
        self._taking = threading.Lock()

    def serve_lfs(self, repo: str, revision: str, file: str, content: bytes, sha256: str = "") -> str:
        """Serve a large file as the Hub does, whose ETag is its hash (or another, if one is given); returns its path."""
        self.serve_hub_file(repo, revision, file, content)
        path = f"/{repo}/resolve/{revision}/{file}"
        self.files[path].etag = f'"{sha256 or hashlib.sha256(content).hexdigest()}"'
        return path

    def take(self, method: str, path: str) -> Fault:
        """Return the fault of the next request, counting it; none is left: a Fault without any fault."""
        with self._taking:
            waiting = (self.faults if method == "GET" else self.head_faults).get(path)
            if not waiting:
                return Fault()
            self.injected += 1
            return waiting.pop(0)

    def heal(self) -> None:
        """Let all that is to come go right."""
        with self._taking:
            self.faults.clear()
            self.head_faults.clear()
            self.hub_errors.clear()
            self.redirects.clear()


class _FaultHandler(_Handler):
    server: FaultServer

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(Request(self.command, path, dict(self.headers)))
        repo = next((name for name in self.server.renamed if path.startswith(f"/{name}/")), None)
        refused = next((answer for prefix, answer in self.server.hub_errors.items() if path.startswith(prefix)), None)
        fault = self.server.take(self.command, path)
        if fault.silent:
            self._hang()
        elif refused:
            self._status(refused[0], {"X-Error-Code": refused[1], "X-Error-Message": refused[1]})
        elif repo:
            self._status(307, {"Location": path.replace(repo, self.server.renamed[repo], 1)})
        elif path in self.server.redirects:
            self._status(302, {"Location": self.server.redirects[path]})
        elif fault.status:
            self._status(fault.status, fault.headers)
        elif path not in self.server.files:
            self._status(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
        else:
            self._send(self.server.files[path], fault, body)

    def _send(self, served: Served, fault: Fault, body: bool) -> None:
        content = served.content if fault.body is None else fault.body
        start, whole = self._start(served, content), len(content)
        if start > whole or (start and start == whole):
            self._status(416, {"Content-Range": f"bytes */{whole}"})
            return
        headers = {"Content-Length": str(whole - start), "ETag": served.validator, **served.headers}
        if start:
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        headers |= fault.headers
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            if value and name not in fault.without:
                self.send_header(name, value)
        if "Content-Length" in fault.without:
            self.close_connection = True
        self.end_headers()
        if body:
            self._send_pieces(content[start:], fault, chunked="Transfer-Encoding" in fault.headers)

    def _start(self, served: Served, content: bytes) -> int:
        asked = self.headers.get("Range", "")
        same = self.headers.get("If-Range", served.validator) == served.validator
        return int(asked.removeprefix("bytes=").removesuffix("-")) if asked and served.ranges and same else 0

    def _send_pieces(self, content: bytes, fault: Fault, chunked: bool) -> None:
        ends = sorted(one for one in (fault.cut_at, fault.stall_at) if one is not None)
        end = min(ends[0], len(content)) if ends else len(content)
        sent, pending = 0, fault.at_byte
        while sent < end:
            size = min(fault.piece_bytes, end - sent)
            if pending and sent < pending[0]:
                size = min(size, pending[0] - sent)
            piece = content[sent : sent + size]
            self.wfile.write(f"{size:x}\r\n".encode() + piece + b"\r\n" if chunked else piece)
            self.wfile.flush()
            sent += size
            if pending and sent >= pending[0]:
                pending[1]()
                pending = None
            if fault.pause_s and self.server.ending.wait(fault.pause_s):
                break
        if fault.stall_at is not None:
            self._hang()
        elif chunked and sent == len(content):
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = self.close_connection or end < len(content) or fault.cut_at is not None

    def _hang(self) -> None:
        self.server.ending.wait(600)
        self.close_connection = True


@contextmanager
def fault_server() -> Iterator[FaultServer]:
    """A running server; what it left hanging is let go when the block ends."""
    with local_server(FaultServer) as server:
        try:
            yield server
        finally:
            server.ending.set()


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Return what `work` returns; fails if that took longer than `seconds`."""
    started = time.monotonic()
    try:
        return work()
    finally:
        taken = time.monotonic() - started
        assert taken < seconds, f"it took {taken:.1f} s; {seconds:.1f} s were promised"
