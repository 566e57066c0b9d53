"""The demo as people start it, a process of its own, under fifty requests at a time: each is answered once, nothing grows."""

import io
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from resources import Held
from test_demo_load import NO_REQUESTS, OWN, POST, answer, exchange
from trust_record import TrustRecord, write_record

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

MODEL = "deeplabv3plus_mobilenetv2_camvid"
MAX_PARALLEL_REQUESTS, ROUNDS = 50, 40
HOSTILE = 10
"""Of the fifty: over-large uploads, lengths that lie, no HTTP, other hosts and origins, photos that are none."""
STALLED = 20
"""Connections that send half a request and then nothing, all the time."""
MOST_GROWTH_MB = 20.0
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A demo that was started from the command line, and its port."""
    command = [sys.executable, "-m", "deeplabzoo.demo", MODEL, "--port", "0", "--max-megabytes", "1"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True, preexec_fn=_as_at_a_terminal
        )
    assert process.stdout is not None
    try:
        found = re.search(r":(\d+) ", process.stdout.readline())
        assert found
        yield process, int(found[1])
        assert process.poll() is None, "the demo ended"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 0
        assert "Traceback" not in (tmp_path / "said").read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _as_at_a_terminal() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without Ctrl-C


def photo(number: int) -> bytes:
    """A photo whose size no other of its round has; sizes come back, so that what is kept for a size is kept early."""
    file = io.BytesIO()
    image_HWC = np.random.default_rng(number).integers(0, 256, (32 + number % MAX_PARALLEL_REQUESTS, 40, 3), np.uint8)
    Image.fromarray(image_HWC).save(file, "PNG")
    return file.getvalue()


def hostile(number: int) -> tuple[str, bytes]:
    """One of the requests that must be refused, and what it is called."""
    body = photo(number)
    kinds = {
        "too large": POST + b"Content-Length: 2000000\r\n\r\n" + b"\0" * 2_000_000,
        "more declared than sent": POST + b"Content-Length: 5000000000\r\n\r\n" + body,
        "ends early": POST + b"Content-Length: 900000\r\n\r\n" + body,
        "no length": POST + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n" + body,
        "no photo": POST + b"Content-Length: 50\r\n\r\n" + body[:50],
        "another host": b"GET /api/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "another origin": POST + f"Origin: http://evil.example\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body,
        "a path out of the page": b"GET /../server.py HTTP/1.1\r\n" + OWN + b"\r\n",
        "no HTTP": NO_REQUESTS["TLS"],
        "a host that is none": NO_REQUESTS["a host that is none"],
    }
    name = list(kinds)[number % len(kinds)]
    return name, kinds[name]


def test_fifty_at_a_time_are_answered_once_each(demo: tuple[subprocess.Popen[str], int]) -> None:
    """A fifth of them hostile, beside stalled connections: right answers, flat memory, no thread and no file left."""
    process, port = demo
    started = time.perf_counter()
    answered, refused, wrong = Counter[str](), Counter[str](), list[str]()
    looks: list[Held] = []

    def ask(number: int) -> None:
        if number % MAX_PARALLEL_REQUESTS < HOSTILE:
            name, request = hostile(number // MAX_PARALLEL_REQUESTS * HOSTILE + number % MAX_PARALLEL_REQUESTS)
            status, content = answer(exchange(port, request, half_close=True, seconds=300))
            right = 400 <= status < 500 and content["error"].endswith(".")
            (refused if right else answered)[name] += 1
            if not right:
                wrong.append(f"{name}: {status} {content}")
            return
        upload = photo(number)
        status, content = answer(exchange(port, POST + f"Content-Length: {len(upload)}\r\n\r\n".encode() + upload, seconds=300))
        with Image.open(io.BytesIO(upload)) as sent:
            if status != 200 or (content["width"], content["height"]) != sent.size:
                wrong.append(f"photo {number}: {status}")
        answered["photo"] += 1

    ask(MAX_PARALLEL_REQUESTS - 1)
    time.sleep(1)
    begin = Held.of(process.pid)
    stalled = [socket.create_connection(("127.0.0.1", port)) for _ in range(STALLED)]
    for one in stalled:
        one.sendall(POST)
    with ThreadPoolExecutor(MAX_PARALLEL_REQUESTS) as pool:
        for round_ in range(ROUNDS):
            list(pool.map(ask, range(round_ * MAX_PARALLEL_REQUESTS, (round_ + 1) * MAX_PARALLEL_REQUESTS)))
            looks.append(Held.of(process.pid))
    for one in stalled:
        one.close()
    time.sleep(2)
    end = Held.of(process.pid)
    half, tenth = ROUNDS // 2, ROUNDS // 10
    resident = [held.resident_mb for held in looks]
    growth_mb = float(np.mean(resident[-tenth:]) - np.mean(resident[half - tenth : half]))
    hostiles = sum(refused.values())
    assert not wrong
    assert answered["photo"] == (MAX_PARALLEL_REQUESTS - HOSTILE) * ROUNDS + 1
    assert hostiles == HOSTILE * ROUNDS
    assert growth_mb < MOST_GROWTH_MB
    assert end.threads <= begin.threads
    assert end.files <= begin.files
    write_record(
        TrustRecord(
            name="demo_soak",
            area="servers",
            what=f"{ROUNDS} rounds of {MAX_PARALLEL_REQUESTS} requests at once to the demo, beside {STALLED} stalled "
            "connections",
            command="python -m pytest -m soak tests/trust/test_soak_demo.py",
            seconds=round(time.perf_counter() - started, 1),
            inputs=MAX_PARALLEL_REQUESTS * ROUNDS,
            faults=HOSTILE * ROUNDS + STALLED,
            survived=hostiles + STALLED,
            details={
                "photos_answered_once_each": answered["photo"] - 1,
                "hostile_requests_refused": dict(refused),
                "answers_that_were_wrong": len(wrong),
                "growth_mb_of_the_second_half": round(growth_mb, 2),
                "most_growth_mb_allowed": MOST_GROWTH_MB,
                "resident_mb_largest": max(resident),
                "threads_after_one_photo_and_at_the_end": [begin.threads, end.threads],
                "files_after_one_photo_and_at_the_end": [begin.files, end.files],
                "samples": [[(n + 1) * MAX_PARALLEL_REQUESTS, one] for n, one in enumerate(resident)],
            },
        )
    )
