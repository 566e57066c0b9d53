"""The demo's HTTP server: the page, the list of models, and photos in, answers out. Standard library, memory only.

It listens on this computer alone unless told otherwise, and then answers only to names of this computer: a web site that
points a name of its own to 127.0.0.1 (DNS rebinding), or posts to it from another page, gets nothing.
"""

import importlib.resources
import json
import time
import traceback
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

import deeplabzoo
from deeplabzoo.demo_page.connections import BoundedServer
from deeplabzoo.demo_page.models import BusyError, Models, Room
from deeplabzoo.errors import DeepLabZooError, ImageError, UnknownNameError

LOOPBACK = "127.0.0.1"
_OWN_NAMES = ("127.0.0.1", "localhost", "::1")
_PAGE = {
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
_MOST_SECONDS_OF_SILENCE = 30
_MOST_DIGITS = 18
"""Of a length in bytes: no upload has more, and no number of so many is slow to read."""


@dataclass(frozen=True)
class Limits:
    """What an upload may be."""

    max_bytes: int
    max_pixels: int
    max_seconds: float = 120.0
    """Until a request has arrived whole; the largest upload takes so long at 2 megabits a second."""
    max_connections: int = 256
    max_waiting_bytes: int = 512_000_000
    """Of all uploads that wait for their turn together."""


class DemoServer(BoundedServer):
    """Answers each request in a thread of its own; the models let one photo at a time through."""

    def __init__(self, host: str, port: int, models: Models, limits: Limits) -> None:
        super().__init__((host, port), _Handler, limits.max_connections, limits.max_seconds)
        self.models, self.limits = models, limits
        self.room = Room(limits.max_waiting_bytes)

    @property
    def local_only(self) -> bool:
        """Whether only this computer can connect."""
        return self.server_address[0] == LOOPBACK

    @property
    def port(self) -> int:
        """The port it listens on: the one that the system chose, where 0 was asked for."""
        return int(self.server_address[1])


class _RefusedError(Exception):
    """A request that is turned away before any work; the sentence goes to the page."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    server_version = f"deeplabzoo/{deeplabzoo.__version__}"
    sys_version = ""
    timeout = _MOST_SECONDS_OF_SILENCE

    def do_GET(self) -> None:
        """Send the page, its files, or the list of models."""
        try:
            self._require_arrived()
            self._require_own_name()
            path = _split(self.path).path
        except _RefusedError as refused:
            return self._send_json(refused.status, {"error": str(refused)})
        if path == "/api/models":
            return self._send_json(HTTPStatus.OK, {"models": self.server.models.names, **vars(self.server.limits)})
        if path not in _PAGE:
            return self._send_json(HTTPStatus.NOT_FOUND, {"error": "There is no such page; the demo is at /."})
        name, content_type = _PAGE[path]
        content = importlib.resources.files("deeplabzoo.demo_page").joinpath(name).read_bytes()
        return self._send(HTTPStatus.OK, content_type, content)

    def do_POST(self) -> None:
        """Label the photo that is the request's body: POST /api/segment?model=NAME."""
        self.unread = 0
        try:
            status, content = HTTPStatus.OK, self._segmented()
        except _RefusedError as refused:
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

    def _segmented(self) -> dict[str, Any]:
        self.unread = self._declared_bytes()
        self._require_own_name()
        url = _split(self.path)
        if url.path != "/api/segment":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "Photos go to /api/segment.")
        if self.unread > self.server.limits.max_bytes:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The upload has {self.unread / 1e6:.1f} MB, more than the {self.server.limits.max_bytes / 1e6:g} MB that this "
                "demo takes; make the photo smaller, or start the demo with a larger --max-megabytes.",
            )
        model = self.server.models[parse_qs(url.query).get("model", self.server.models.names)[0]]
        with model.place(), self.server.room.taken(self.unread):
            declared, upload = self.unread, self.rfile.read(self.unread)
            self.unread = 0
            self._require_arrived()
            if len(upload) < declared:
                raise _RefusedError(
                    HTTPStatus.BAD_REQUEST, f"The upload ended after {len(upload)} of {declared} bytes; send the photo again."
                )
            return model.segment(upload, self.server.limits.max_pixels)

    def _declared_bytes(self) -> int:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or len(length) > _MOST_DIGITS:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "The upload must say its size (Content-Length).")
        return int(length)

    def _require_own_name(self) -> None:
        host = self.headers.get("Host", "")
        if self.server.local_only and _split(f"//{host}").hostname not in _OWN_NAMES:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "This demo answers only to 127.0.0.1 and localhost.")
        origin = self.headers.get("Origin")
        if origin is not None and _split(origin).netloc != host:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "This demo answers only to its own page.")

    def _require_arrived(self) -> None:
        if not self.server.arrived(self.connection):
            raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, "The request came too slowly; send the photo again.")

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
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "The request names an address that is none.") from None
