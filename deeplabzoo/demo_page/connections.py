"""A threading HTTP server that nobody can occupy: connections are counted, and a request has arrived in time or is cut off."""

import contextlib
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_FULL = json.dumps({"error": "Too many connections to this demo are open at the moment; try again in a few seconds."}).encode()
_TURNED_AWAY = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    + f"Content-Length: {len(_FULL)}\r\n\r\n".encode()
    + _FULL
)


class BoundedServer(ThreadingHTTPServer):
    """Answers each request in a thread of its own, at most `most_connections` of them.

    A client that sends its request in a trickle, byte by byte, keeps its thread until `max_seconds` have passed; then nothing
    more is read from it, and the handler answers with what it has.
    """

    request_queue_size = 256
    """Connections that the system holds until a thread takes them; the standard 5 would refuse a burst."""
    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # there it would let two programs share a port

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], most_connections: int, max_seconds: float
    ) -> None:
        self._places = threading.BoundedSemaphore(most_connections)
        self._max_seconds = max_seconds
        self._arriving: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread for a connection, or turn it away with a sentence where there are too many."""
        if not self._places.acquire(blocking=False):
            self._turn_away(request)
            return
        self._arriving[request] = time.monotonic() + self._max_seconds
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._arriving.pop(request, None)
            self._places.release()

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

    def _turn_away(self, request: socket.socket) -> None:
        request.setblocking(False)  # the thread that accepts connections waits for nobody
        with contextlib.suppress(OSError):  # what was asked is read, or the system would take the answer back
            request.recv(2**16)
        with contextlib.suppress(OSError):
            request.send(_TURNED_AWAY)
        self.shutdown_request(request)


def _stop_reading(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it went away by itself
        request.shutdown(socket.SHUT_RD)
