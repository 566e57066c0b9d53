"""Fetches in processes of their own, which can be limited, started together, and killed.

They are forked from a server process that imported everything once, so that a kill meets the fetch and not the imports. The
Hub's client reads its settings when it is imported, so that process knows one Hub: call `prepare` first.
"""

import hashlib
import multiprocessing
import os
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from helpers.rows import row

from deeplabzoo.errors import DownloadError
from deeplabzoo.hub import http_download
from deeplabzoo.hub.download import fetch, fetch_from_hub
from deeplabzoo.hub.manifest import HubSource, UrlSource

REPO, FILE = "someone/their-deeplab", "model.safetensors"
SILENCE_S = 1.0
"""Until a client gives up one attempt: real clients wait 10 and 20 s."""
Client = Literal["url", "hub"]

_processes = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Order:
    """What to fetch by which client, and what is published about it; `sha256` None: nothing."""

    client: Client
    address: str
    """URL, or revision of `REPO`."""
    home: str
    """Folder of the caches."""
    bytes: int | None
    sha256: str | None

    def ours(self) -> list[Path]:
        """Files that somebody could take for the result, by the rules of either cache."""
        place = Path(self.home)
        if self.client == "url":
            return [one for one in (place / "cache").rglob("*.pth") if one.is_file()]
        return [one for one in (place / "hub").rglob("snapshots/*/*") if one.exists()]


def prepare(endpoint: str) -> None:
    """Start the process that all others are forked from, for the Hub at this address."""
    os.environ |= {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": str(int(SILENCE_S)),
        "HF_HUB_ETAG_TIMEOUT": str(int(SILENCE_S)),
    }
    _processes.set_forkserver_preload(["fetching", "huggingface_hub.file_download", "filelock", "tqdm"])


class Fetching:
    """One fetch that runs; `answer` waits for its path or its sentence, None where it was killed."""

    def __init__(self, order: Order) -> None:
        self._ours, theirs = _processes.Pipe()
        self._process = _processes.Process(target=_run, args=(order, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self) -> None:
        """Let it go on from where it waits, imports done: several can begin at once."""
        assert self._ours.recv() == "ready"
        self._ours.send("go")

    def kill(self) -> None:
        """End it as the system does when memory runs out: no `finally` is run."""
        self._process.kill()

    def answer(self, seconds: float = 600) -> str | None:
        """Return the path, or `error: ` and the sentence; None after a kill."""
        try:
            if not self._ours.poll(seconds):
                raise AssertionError(f"no answer after {seconds:.0f} s")
            return str(self._ours.recv())
        except (EOFError, ConnectionResetError):
            return None
        finally:
            self._process.kill()
            self._process.join()
            self._ours.close()


def fetched(order: Order) -> str:
    """Return what one fetch in a process of its own answers."""
    one = Fetching(order)
    one.begin()
    answer = one.answer()
    assert answer is not None, "the process died"
    return answer


def fetched_at_once(orders: list[Order]) -> list[str | None]:
    """Return what fetches answer that begin together."""
    all_ = [Fetching(order) for order in orders]
    for one in all_:
        one.begin()
    return [one.answer() for one in all_]


def right(answer: str | None, sha256: str) -> bool:
    """Whether an answer is the path of the right file."""
    if answer is None or answer.startswith("error: "):
        return False
    return hashlib.sha256(Path(answer).read_bytes()).hexdigest() == sha256


def in_one_sentence(answer: str | None) -> bool:
    """Whether an answer is an error of one line that ends like a sentence."""
    return bool(answer) and answer.startswith("error: ") and "\n" not in answer and answer.endswith(".")


def obtained(order: Order) -> str:
    """Fetch here and now; return the path, or `error: ` and the sentence."""
    from huggingface_hub import constants

    os.environ["DEEPLABZOO_CACHE"] = str(Path(order.home, "cache"))
    constants.HF_HUB_CACHE = str(Path(order.home, "hub"))
    http_download.TIMEOUT_S, http_download.SPEED_WINDOW_S = SILENCE_S, 2 * SILENCE_S
    published = {"bytes": order.bytes, "sha256": order.sha256}
    try:
        if order.client == "url":
            return str(fetch(row(source=UrlSource("url", order.address), **published)))
        if order.sha256 is None:
            return str(fetch_from_hub(REPO, FILE, order.address))
        return str(fetch(row(source=HubSource("hub", REPO, order.address, FILE), **published)))
    except DownloadError as error:
        return f"error: {error}"


def _run(order: Order, answers: "Connection[Any, Any]") -> None:
    answers.send("ready")
    answers.recv()
    answers.send(obtained(order))
