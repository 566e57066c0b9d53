"""The demo's HTTP server: the page, the list of models, and photos in, answers out. Standard library, memory only.

It listens on this computer alone unless told otherwise, and then answers only to names of this computer: a web site that
points a name of its own to 127.0.0.1 (DNS rebinding), or posts to it from another page, gets nothing.
"""

import contextlib
import importlib.resources
import json
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

import deeplabzoo
from deeplabzoo.demo.app import BusyError, ModelPool, UploadBudget
from deeplabzoo.errors import DeepLabZooError, ImageError, UnknownNameError

# A threading HTTP server that nobody can occupy: connections are counted, and a request has arrived in time or is cut off.


_FULL = json.dumps({"error": "Too many connections to this demo are open at the moment; try again in a few seconds."}).encode()
_REJECTED_RESPONSE = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    + f"Content-Length: {len(_FULL)}\r\n\r\n".encode()
    + _FULL
)


class BoundedServer(ThreadingHTTPServer):
    """Answers each request in a thread of its own, at most `max_connections` of them.

    A client that sends its request in a trickle, byte by byte, keeps its thread until `max_seconds` have passed; then nothing
    more is read from it, and the handler answers with what it has.
    """

    request_queue_size = 256
    """Connections that the system holds until a thread takes them; the standard 5 would refuse a burst."""
    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # there it would let two programs share a port

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], max_connections: int, max_seconds: float
    ) -> None:
        self._connection_slots = threading.BoundedSemaphore(max_connections)
        self._max_seconds = max_seconds
        self._arriving: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread for a connection, or turn it away with a sentence where there are too many."""
        if not self._connection_slots.acquire(blocking=False):
            self._reject(request)
            return
        self._arriving[request] = time.monotonic() + self._max_seconds
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connection_slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._arriving.pop(request, None)
            self._connection_slots.release()

    def service_actions(self) -> None:
        """Read no more from connections whose request takes too long to arrive; called twice a second, and after requests."""
        now = time.monotonic()
        for request, until in list(self._arriving.items()):
            if now > until and self._arriving.pop(request, None) is not None:
                _stop_reading(request)

    def arrived(self, request: Any) -> bool:
        """Stop the clock of a connection whose request is complete; False where time was up before."""
        return self._arriving.pop(request, None) is not None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of browsers that went away; anything else is a bug and keeps its traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def _reject(self, request: socket.socket) -> None:
        request.setblocking(False)  # the thread that accepts connections waits for nobody
        with contextlib.suppress(OSError):  # what was asked is read, or the system would take the answer back
            request.recv(2**16)
        with contextlib.suppress(OSError):
            request.send(_REJECTED_RESPONSE)
        self.shutdown_request(request)


def _stop_reading(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it went away by itself
        request.shutdown(socket.SHUT_RD)


LOOPBACK = "127.0.0.1"
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
_MAX_TEXT_WIDTH = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8") for name in ("page", "view", "layers", "camera")},
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src blob: mediastream:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""The browser itself is told to load nothing from elsewhere and to keep nothing."""
_STATUS: tuple[tuple[type[DeepLabZooError], HTTPStatus], ...] = (
    (ImageError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (UnknownNameError, HTTPStatus.NOT_FOUND),
    (BusyError, HTTPStatus.SERVICE_UNAVAILABLE),
)
_IDLE_TIMEOUT_S = 30
_MAX_DIGITS = 18
"""Of a length in bytes: no upload has more, and no number of so many is slow to read."""


@dataclass(frozen=True)
class Limits:
    """What an upload may be."""

    max_bytes: int
    max_pixels: int
    max_seconds: float = 120.0
    """Until a request has arrived whole; the largest upload takes so long at 2 megabits a second."""
    max_connections: int = 256
    max_queued_bytes: int = 512_000_000
    """Of all uploads that wait for their turn together."""


class DemoServer(BoundedServer):
    """Answers each request in a thread of its own; the models let one photo at a time through."""

    def __init__(self, host: str, port: int, models: ModelPool, limits: Limits) -> None:
        super().__init__((host, port), _Handler, limits.max_connections, limits.max_seconds)
        self.models, self.limits = models, limits
        self.upload_budget = UploadBudget(limits.max_queued_bytes)

    @property
    def local_only(self) -> bool:
        """Whether only this computer can connect."""
        return self.server_address[0] == LOOPBACK

    @property
    def port(self) -> int:
        """The port it listens on: the one that the system chose, where 0 was asked for."""
        return int(self.server_address[1])


class _RejectedRequestError(Exception):
    """A request that is turned away before any work; the sentence goes to the page."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    server_version = f"deeplabzoo/{deeplabzoo.__version__}"
    sys_version = ""
    timeout = _IDLE_TIMEOUT_S

    def do_GET(self) -> None:
        """Send the page, its files, or the list of models."""
        try:
            self._require_arrived()
            self._require_loopback_host()
            path = _split(self.path).path
        except _RejectedRequestError as refused:
            return self._send_json(refused.status, {"error": str(refused)})
        if path == "/api/models":
            return self._send_json(HTTPStatus.OK, {"models": self.server.models.names, **vars(self.server.limits)})
        if path not in _MAX_TEXT_WIDTH:
            return self._send_json(HTTPStatus.NOT_FOUND, {"error": "There is no such page; the demo is at /."})
        name, content_type = _MAX_TEXT_WIDTH[path]
        content = importlib.resources.files("deeplabzoo.demo").joinpath("static", name).read_bytes()
        return self._send(HTTPStatus.OK, content_type, content)

    def do_POST(self) -> None:
        """Label the photo that is the request's body: POST /api/segment?model=NAME."""
        self.unread = 0
        try:
            status, content = HTTPStatus.OK, self._handle_segment()
        except _RejectedRequestError as refused:
            status, content = refused.status, {"error": str(refused)}
        except DeepLabZooError as error:
            found = [one for kind, one in _STATUS if isinstance(error, kind)]
            status, content = (found or [HTTPStatus.INTERNAL_SERVER_ERROR])[0], {"error": str(error)}
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            traceback.print_exc()
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            content = {"error": "The demo failed on this photo; the terminal that it runs in shows why."}
        self._send_json(status, content)
        self._discard()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no HTTP, or no request for this server, by a sentence instead of the library's page."""
        reason = " ".join((message or HTTPStatus(code).phrase).split())
        self.request_version = "HTTP/1.0"  # else what has no version that can be read would get no status line
        self._send_json(HTTPStatus(code), {"error": f"This demo cannot answer that request ({reason[:200]})."})

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: who looks at what is nobody's business, and errors are shown in the page."""

    def _handle_segment(self) -> dict[str, Any]:
        self.unread = self._declared_bytes()
        self._require_loopback_host()
        url = _split(self.path)
        if url.path != "/api/segment":
            raise _RejectedRequestError(HTTPStatus.NOT_FOUND, "Photos go to /api/segment.")
        if self.unread > self.server.limits.max_bytes:
            raise _RejectedRequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The upload has {self.unread / 1e6:.1f} MB, more than the {self.server.limits.max_bytes / 1e6:g} MB that this "
                "demo takes; make the photo smaller, or start the demo with a larger --max-megabytes.",
            )
        model = self.server.models[parse_qs(url.query).get("model", self.server.models.names)[0]]
        with model.queue_slot(), self.server.upload_budget.reserve(self.unread):
            declared, upload = self.unread, self.rfile.read(self.unread)
            self.unread = 0
            self._require_arrived()
            if len(upload) < declared:
                raise _RejectedRequestError(
                    HTTPStatus.BAD_REQUEST, f"The upload ended after {len(upload)} of {declared} bytes; send the photo again."
                )
            return model.segment(upload, self.server.limits.max_pixels)

    def _declared_bytes(self) -> int:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or len(length) > _MAX_DIGITS:
            raise _RejectedRequestError(HTTPStatus.LENGTH_REQUIRED, "The upload must say its size (Content-Length).")
        return int(length)

    def _require_loopback_host(self) -> None:
        host = self.headers.get("Host", "")
        if self.server.local_only and _split(f"//{host}").hostname not in _LOOPBACK_HOSTS:
            raise _RejectedRequestError(HTTPStatus.FORBIDDEN, "This demo answers only to 127.0.0.1 and localhost.")
        origin = self.headers.get("Origin")
        if origin is not None and _split(origin).netloc != host:
            raise _RejectedRequestError(HTTPStatus.FORBIDDEN, "This demo answers only to its own page.")

    def _require_arrived(self) -> None:
        if not self.server.arrived(self.connection):
            raise _RejectedRequestError(HTTPStatus.REQUEST_TIMEOUT, "The request came too slowly; send the photo again.")

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(content)), **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _discard(self) -> None:
        """Read on for a while what was refused: a browser that is cut off while it sends would not show the answer."""
        until = time.monotonic() + 5
        while self.unread > 0 and time.monotonic() < until:
            part = self.rfile.read1(min(self.unread, 2**16))
            if not part:
                break
            self.unread -= len(part)


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        raise _RejectedRequestError(HTTPStatus.BAD_REQUEST, "The request names an address that is none.") from None
