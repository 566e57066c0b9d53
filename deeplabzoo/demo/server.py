"""The demo's HTTP server: the page, the list of models, and segmentation of uploads; standard library, in memory only.

By default it listens on 127.0.0.1 and answers only requests for a loopback host: DNS rebinding and posts from other web pages
are refused.
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

_FULL = json.dumps({"error": "Too many connections to this demo are open at the moment; try again in a few seconds."}).encode()
_REJECTED_RESPONSE = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    + f"Content-Length: {len(_FULL)}\r\n\r\n".encode()
    + _FULL
)


class BoundedServer(ThreadingHTTPServer):
    """Answers each request in its own thread, at most `max_connections` of them.

    A request that has not arrived completely after `max_seconds` is not read further: slow clients cannot occupy threads.
    """

    request_queue_size = 256
    """Backlog of connections; the default of 5 would refuse a burst."""
    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # on Windows it would let two programs share a port

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], max_connections: int, max_seconds: float
    ) -> None:
        self._connection_slots = threading.BoundedSemaphore(max_connections)
        self._max_seconds = max_seconds
        self._arriving: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it with 503 if there are too many."""
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
        """Handle a connection and release its slot."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._arriving.pop(request, None)
            self._connection_slots.release()

    def service_actions(self) -> None:
        """Stop reading from connections whose request takes too long; called by `serve_forever` twice a second."""
        now = time.monotonic()
        for request, until in list(self._arriving.items()):
            if now > until and self._arriving.pop(request, None) is not None:
                _stop_reading(request)

    def arrived(self, request: Any) -> bool:
        """Stop the timeout of a connection whose request is complete; False if it has expired."""
        return self._arriving.pop(request, None) is not None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore disconnected browsers; anything else is a bug and keeps its traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def _reject(self, request: socket.socket) -> None:
        request.setblocking(False)  # the accepting thread must not block
        with contextlib.suppress(OSError):  # unread data would reset the connection and lose the response
            request.recv(2**16)
        with contextlib.suppress(OSError):
            request.send(_REJECTED_RESPONSE)
        self.shutdown_request(request)


def _stop_reading(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already disconnected
        request.shutdown(socket.SHUT_RD)


LOOPBACK = "127.0.0.1"
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
_STATIC_FILES = {
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
"""The browser may load nothing from elsewhere and must not cache."""
_STATUS: tuple[tuple[type[DeepLabZooError], HTTPStatus], ...] = (
    (ImageError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (UnknownNameError, HTTPStatus.NOT_FOUND),
    (BusyError, HTTPStatus.SERVICE_UNAVAILABLE),
)
_IDLE_TIMEOUT_S = 30
_MAX_DIGITS = 18
"""Of a Content-Length; longer numbers are refused."""


@dataclass(frozen=True)
class Limits:
    """Limits of uploads and connections."""

    max_bytes: int
    max_pixels: int
    max_seconds: float = 120.0
    """Timeout of a request's arrival: the largest upload at 2 Mbit/s."""
    max_connections: int = 256
    max_queued_bytes: int = 512_000_000
    """Of all queued uploads together."""


class DemoServer(BoundedServer):
    """The demo: each request has its own thread, each model processes one image at a time."""

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
        """The port it listens on; the one that the system chose for port 0."""
        return int(self.server_address[1])


class _RejectedRequestError(Exception):
    """A request that is refused before any work; the message is shown by the page."""

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
        if path not in _STATIC_FILES:
            return self._send_json(HTTPStatus.NOT_FOUND, {"error": "There is no such page; the demo is at /."})
        name, content_type = _STATIC_FILES[path]
        content = importlib.resources.files("deeplabzoo.demo").joinpath("static", name).read_bytes()
        return self._send(HTTPStatus.OK, content_type, content)

    def do_POST(self) -> None:
        """Segment the image in the request's body: POST /api/segment?model=NAME."""
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
            content = {"error": "The demo failed on this image; see the terminal that it runs in."}
        self._send_json(status, content)
        self._discard()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer invalid requests with JSON instead of the library's HTML page."""
        reason = " ".join((message or HTTPStatus(code).phrase).split())
        self.request_version = "HTTP/1.0"  # without a readable version the library would send no status line
        self._send_json(HTTPStatus(code), {"error": f"This demo cannot answer that request ({reason[:200]})."})

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests, for privacy; errors are shown in the page."""

    def _handle_segment(self) -> dict[str, Any]:
        self.unread = self._declared_bytes()
        self._require_loopback_host()
        url = _split(self.path)
        if url.path != "/api/segment":
            raise _RejectedRequestError(HTTPStatus.NOT_FOUND, "Images are posted to /api/segment.")
        if self.unread > self.server.limits.max_bytes:
            raise _RejectedRequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The upload has {self.unread / 1e6:.1f} MB, more than the {self.server.limits.max_bytes / 1e6:g} MB that this "
                "demo accepts; resize the image, or start the demo with a larger --max-megabytes.",
            )
        model = self.server.models[parse_qs(url.query).get("model", self.server.models.names)[0]]
        with model.queue_slot(), self.server.upload_budget.reserve(self.unread):
            declared, upload = self.unread, self.rfile.read(self.unread)
            self.unread = 0
            self._require_arrived()
            if len(upload) < declared:
                raise _RejectedRequestError(
                    HTTPStatus.BAD_REQUEST, f"The upload ended after {len(upload)} of {declared} bytes; send the image again."
                )
            return model.segment(upload, self.server.limits.max_pixels)

    def _declared_bytes(self) -> int:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or len(length) > _MAX_DIGITS:
            raise _RejectedRequestError(HTTPStatus.LENGTH_REQUIRED, "The upload must state its size (Content-Length).")
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
            raise _RejectedRequestError(
                HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive; send the image again."
            )

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(content)), **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _discard(self) -> None:
        """Read a refused upload for a while: a browser that is cut off while sending shows no response."""
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
        raise _RejectedRequestError(HTTPStatus.BAD_REQUEST, "The request has an invalid address.") from None
