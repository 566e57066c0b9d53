"""The demo page among clients that are no browsers: it stays up, answers in sentences, and gives nothing away."""

import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.color_net import ColorNet
from PIL import Image

from deeplabzoo.demo.app import ModelPool
from deeplabzoo.demo.server import LOOPBACK, DemoServer, Limits
from deeplabzoo.inference.predictor import Predictor

OWN = f"Host: {LOOPBACK}\r\n".encode()
POST = b"POST /api/segment HTTP/1.1\r\n" + OWN
PACKAGE = Path(__file__).resolve().parents[2] / "deeplabzoo"


def photo(side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def exchange(port: int, request: bytes, *, half_close: bool = False, seconds: float = 20) -> bytes:
    """Send bytes as they are and return all that comes back until the server closes."""
    with socket.create_connection((LOOPBACK, port), timeout=seconds) as connection:
        try:
            connection.sendall(request)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except (ConnectionResetError, BrokenPipeError):  # it was refused before it was sent
            pass
        return received(connection)


def received(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(2**16):
            found += part
    except ConnectionResetError:
        pass
    return found


def answer(reply: bytes) -> tuple[int, dict[str, Any]]:
    """Return status and content of exactly one answer."""
    assert reply.count(b"HTTP/1.0 ") == 1, reply[:300]
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def require_sentence(reply: bytes, *statuses: int) -> None:
    status, content = answer(reply)
    assert status in statuses, content
    assert content["error"].endswith(".")
    assert "\n" not in content["error"]
    assert "Traceback" not in content["error"]


def segment(port: int) -> tuple[int, dict[str, Any]]:
    upload = photo()
    return answer(exchange(port, POST + f"Content-Length: {len(upload)}\r\n\r\n".encode() + upload))


BYTES_OF_A_SLOW_REQUEST = 80
"""One every 0.1 s: sixteen times as long as the demo of these tests waits for a request."""


@pytest.fixture
def port(capfd: pytest.CaptureFixture[str]) -> Iterator[int]:
    """A demo whose requests have half a second to arrive; in the end it answers as ever, and no traceback was printed."""
    models = ModelPool(["colors"], lambda _: Predictor(ColorNet(), "cpu"), max_queued=2)
    limits = Limits(max_bytes=100_000, max_pixels=40_000, max_seconds=0.5, max_connections=8, max_queued_bytes=60_000)
    with DemoServer(LOOPBACK, 0, models, limits) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.port
            assert segment(server.port)[0] == 200
        finally:
            server.shutdown()
            thread.join()
    assert "Traceback" not in capfd.readouterr().err


NO_REQUESTS = {
    "nothing": b"",
    "zeros": b"\0" * 100 + b"\r\n\r\n",
    "one word": b"GET\r\n\r\n",
    "four words": b"GET / HTTP/1.1 now\r\n\r\n",
    "a version that is none": b"GET / HTTP/9.9\r\n\r\n",
    "no version number": b"GET / HTTP/x\r\n\r\n",
    "a long address": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + b"\r\n\r\n",
    "PUT": b"PUT / HTTP/1.1\r\n" + OWN + b"\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\n" + OWN + b"\r\n",
    "OPTIONS": b"OPTIONS * HTTP/1.1\r\n" + OWN + b"\r\n",
    "a method of attributes": b"__init__ / HTTP/1.1\r\n" + OWN + b"\r\n",
    "an address that is none": b"GET //[ HTTP/1.1\r\n" + OWN + b"\r\n",
    "a host that is none": b"GET / HTTP/1.1\r\nHost: [\r\n\r\n",
    "an origin that is none": POST + b"Origin: http://[\r\nContent-Length: 1\r\n\r\nx",
    "a header without a colon": b"GET /nowhere HTTP/1.1\r\n" + OWN + b"no colon here\r\n\r\n",
}


@pytest.mark.parametrize("request_", NO_REQUESTS.values(), ids=NO_REQUESTS.keys())
def test_what_is_no_request_is_refused_in_a_sentence(port: int, request_: bytes) -> None:
    """Bytes that no browser sends get a sentence or a closed connection, not a page of the library or a traceback."""
    reply = exchange(port, request_, half_close=True)
    assert b"<html" not in reply.lower()
    if reply:
        require_sentence(reply, 400, 403, 404, 414, 431, 501, 505)
    else:
        assert request_ == b""


@pytest.mark.parametrize(
    ("headers", "body", "status", "words"),
    [
        (b"Content-Length: 5000\r\n", photo()[:50], 400, "ended after 50 of 5000 bytes"),
        (b"Content-Length: 99999999999\r\n", photo(), 413, "resize the image"),
        (b"Content-Length: " + b"9" * 5000 + b"\r\n", photo(), 411, "must state its size"),
        (b"Content-Length: -1\r\n", photo(), 411, "must state its size"),
        (b"Content-Length: 0x20\r\n", photo(), 411, "must state its size"),
        (b"Content-Length: \xb2\r\n", photo(), 411, "must state its size"),
        (b"Transfer-Encoding: chunked\r\n", b"fffffff\r\n" + b"\0" * 300_000, 411, "must state its size"),
        (b"Content-Length: 20\r\n", photo(), 422, "damaged|cannot be opened|not an image"),
        (
            b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 40\r\n",
            b"--x\r\nContent-Disposition: form-data; nam",
            422,
            "not an image",
        ),
        (b"Content-Type: multipart/form-data\r\nContent-Length: 3\r\n", b"--\n", 422, "not an image"),
    ],
    ids=[
        "ends early",
        "too large",
        "5000 digits",
        "negative",
        "hexadecimal",
        "superscript",
        "chunks",
        "less",
        "form",
        "no form",
    ],
)
def test_lengths_that_lie_and_forms_that_are_none(port: int, headers: bytes, body: bytes, status: int, words: str) -> None:
    """More is declared than comes, or less, or nothing, or in chunks without an end; and multipart, which is no photo."""
    reply = exchange(port, POST + headers + b"\r\n" + body, half_close=True)
    require_sentence(reply, status)
    assert re.search(words, answer(reply)[1]["error"])


@pytest.mark.parametrize(
    "path",
    [
        "/../server.py",
        "/../../pyproject.toml",
        "/%2e%2e/server.py",
        "/..%2fserver.py",
        "/page.js/../server.py",
        "/./server.py",
        "/server.py",
        "//etc/passwd",
        "/etc/passwd",
        "/page.js%00.html",
        "/page.js/",
        "/..\\server.py",
        "/~root",
        "/__init__.py",
        "/index.html",
        f"/{PACKAGE}/demo/server.py",
        "http://elsewhere.example/server.py",
        "file:///etc/passwd",
    ],
)
def test_only_the_files_of_the_page_are_given_out(port: int, path: str) -> None:
    """A path is looked up in a list and never on the disk."""
    require_sentence(exchange(port, f"GET {path} HTTP/1.1\r\n".encode() + OWN + b"\r\n"), 400, 404)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example:7860",
        "2130706433",
        "0.0.0.0",
        "[::2]",
    ],
)
@pytest.mark.parametrize("method", ["GET /api/models", "GET /page.js", "POST /api/segment"])
def test_another_name_for_this_computer_opens_nothing(port: int, host: str, method: str) -> None:
    """A web site that points its own name to 127.0.0.1 sends that name as Host (DNS rebinding)."""
    reply = exchange(port, f"{method} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
    require_sentence(reply, 403)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "", "file://"])
def test_a_page_from_elsewhere_cannot_send_images(port: int, origin: str) -> None:
    """A form or a script of another page names that page as Origin; another port of this computer is another page."""
    upload = photo()
    head = POST + f"Origin: {origin}\r\nContent-Type: text/plain\r\nContent-Length: {len(upload)}\r\n\r\n".encode()
    reply = exchange(port, head + upload)
    require_sentence(reply, 403)
    assert b"Access-Control" not in reply


@pytest.mark.parametrize(
    "beginning", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b", POST, POST + b"Content-Length: 9\r\n\r\n"]
)
def test_a_slow_loris_loses_its_thread(port: int, beginning: bytes) -> None:
    """A request that comes byte by byte, each in time: after the whole time it is answered, or closed."""
    with socket.create_connection((LOOPBACK, port), timeout=20) as connection:
        connection.sendall(beginning)
        for _ in range(BYTES_OF_A_SLOW_REQUEST):
            try:
                connection.sendall(b"x" if beginning else b"\r\n")
            except (ConnectionResetError, BrokenPipeError):
                break
            time.sleep(0.1)
            connection.settimeout(0.01)
            try:
                if not connection.recv(2**16, socket.MSG_PEEK):
                    break
            except TimeoutError:
                continue
            except ConnectionResetError:
                break
            connection.settimeout(20)
            require_sentence(received(connection), 400, 408, 411)
            break
        else:
            pytest.fail(f"the connection is still open after {BYTES_OF_A_SLOW_REQUEST} bytes, one every 0.1 s")


def test_slow_uploads_do_not_keep_others_out(port: int) -> None:
    """Two uploads that never end hold both places in the queue for half a second, and no longer."""
    head = POST + b"Content-Length: 25000\r\n\r\n"
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: exchange(port, head, seconds=20), range(2)))
    for reply in replies:
        require_sentence(reply, 408)
    assert segment(port)[0] == 200


def test_large_uploads_wait_outside_of_memory(port: int) -> None:
    """What waits is bounded in bytes as well as in photos: 64 uploads of 32 MB for each model would be gigabytes."""
    with socket.create_connection((LOOPBACK, port), timeout=20) as first:
        first.sendall(POST + b"Content-Length: 50000\r\n\r\n")
        time.sleep(0.1)
        require_sentence(exchange(port, POST + b"Content-Length: 20000\r\n\r\n" + b"\0" * 20_000), 503)
        assert segment(port)[0] == 200
        require_sentence(received(first), 408)


def test_connections_beyond_the_limit_get_an_error(port: int) -> None:
    """Idle connections do not become threads without bound; who comes too late reads a sentence, and later an answer."""
    idle = [socket.create_connection((LOOPBACK, port), timeout=20) for _ in range(8)]
    try:
        time.sleep(0.1)
        require_sentence(exchange(port, b"GET / HTTP/1.1\r\n" + OWN + b"\r\n"), 503)
    finally:
        for one in idle:
            one.close()
    time.sleep(0.2)
    assert segment(port)[0] == 200
