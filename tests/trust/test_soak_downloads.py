"""Both ways of fetching, the Hub's real client and our own, through every fault of a server, a disk and a process."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import Fault, FaultServer, fault_server
from fetching import FILE, REPO, Client, Fetching, Order, fetched, fetched_at_once, in_one_sentence, prepare, right
from trust_record import TrustRecord, write_record

CONTENT = random.Random(0).randbytes(400_000)
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[::-1]
COMMIT = "a" * 40
CLIENTS: tuple[Client, ...] = ("url", "hub")
KILLS = 50
"""Of each client: half at a byte of the file, a quarter soon after the start, a quarter soon after the last byte."""

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        prepare(running.url)
        yield running


class Trial:
    """Faults one after the other, each in caches of its own; failures are collected, so that one run shows them all."""

    def __init__(self, server: FaultServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.done, self.failures = Counter[str](), list[str]()
        self.longest_s = 0.0

    def order(self, client: Client, *, published: bool = True, revision: str = COMMIT) -> Order:
        """Serve the right file where a client looks for it, and return what to ask for in new caches."""
        self.server.heal()
        self.server.renamed.clear()
        self.server.serve("/net.pth", CONTENT)
        self.server.serve_lfs(REPO, revision, FILE, CONTENT)
        home = self.folder / f"{sum(self.done.values())}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        address = f"{self.server.url}/net.pth" if client == "url" else revision
        return Order(client, address, str(home), SIZE if published else None, SHA256 if published else None)

    def path(self, order: Order) -> str:
        """Return where the server has what an order asks for."""
        return "/net.pth" if order.client == "url" else f"/{REPO}/resolve/{order.address}/{FILE}"

    def expect(self, name: str, order: Order, outcome: str, inject: Callable[[str], None]) -> None:
        """Inject, fetch, and hold the answer to `file` or `sentence`; then heal: the next fetch gives the file."""
        inject(self.path(order))
        started = time.monotonic()
        answer = fetched(order)
        self.longest_s = max(self.longest_s, time.monotonic() - started)
        good = right(answer, SHA256) if outcome == "file" else in_one_sentence(answer)
        good = good and self.nothing_wrong_is_there(order)
        self.server.heal()
        self.server.renamed.clear()
        self.server.serve("/net.pth", CONTENT)
        self.server.serve_lfs(REPO, order.address if order.client == "hub" else COMMIT, FILE, CONTENT)
        self.note(f"{order.client}: {name}", good and right(fetched(order), SHA256), answer)

    def nothing_wrong_is_there(self, order: Order) -> bool:
        """Whether all that could be taken for the file is the file, and our own cache holds nothing partial."""
        right_ones = all(hashlib.sha256(one.read_bytes()).hexdigest() == SHA256 for one in order.ours())
        return right_ones and not list(Path(order.home, "cache").rglob("*.part"))

    def note(self, name: str, good: bool, answer: str = "", *, fault: bool = True) -> None:
        self.done[name] += int(fault)
        if not good:
            self.failures.append(f"{name}: {answer}")

    def record(self, name: str, what: str, started: float, **details: object) -> None:
        """Write what was tried; fails where a promise was broken."""
        assert not self.failures, "\n".join(self.failures)
        tried = sum(self.done.values())
        write_record(
            TrustRecord(
                name=name,
                area="download",
                what=what,
                command=f"python -m pytest -m soak tests/trust/test_soak_downloads.py -k {name.removeprefix('download_')}",
                seconds=round(time.monotonic() - started, 1),
                faults=tried,
                survived=tried,
                details={**details, "faults_of_each_kind": dict(sorted((+self.done).items()))},
            )
        )


def test_all_faults_end_in_the_right_file_or_in_a_sentence(server: FaultServer, tmp_path: Path) -> None:
    """Slow, stalled, cut, busy, circular, short, long, wrong, renamed, gated, moved, full, read-only, all at once."""
    started = time.monotonic()
    trial = Trial(server, tmp_path)
    for client in CLIENTS:
        _lines(trial, client)
        _answers(trial, client)
        _contents(trial, client)
        _crowds(trial, client)
        _disks(trial, client)
    _repositories(trial)
    trial.record(
        "download_faults",
        "each fault of a server or a disk, then a fetch without it, by our downloader and by huggingface_hub",
        started,
        bytes_of_the_file=SIZE,
        seconds_of_silence_until_an_attempt_fails=1.0,
        longest_fetch_s=round(trial.longest_s, 1),
    )


def _lines(trial: Trial, client: Client) -> None:
    """The line: cut, slow, stalled."""
    for published in (True, False):
        for tenth in range(11):
            fault = Fault(cut_at=SIZE * tenth // 10)
            trial.expect("cut", trial.order(client, published=published), "file", _gets(trial, fault))
    trial.expect("slow", trial.order(client), "file", _gets(trial, Fault(piece_bytes=SIZE // 20, pause_s=0.2)))
    for at in (0, SIZE // 2, SIZE - 1):
        trial.expect("stalled", trial.order(client), "file", _gets(trial, Fault(stall_at=at)))
        for_good = _gets(trial, Fault(stall_at=at), *[Fault(stall_at=0)] * 40)
        trial.expect("stalled for good", trial.order(client), "sentence", for_good)
    trial.expect("never answers", trial.order(client), "file", _gets(trial, Fault(silent=True)))


def _answers(trial: Trial, client: Client) -> None:
    """The server: busy for a while, busy for good, in a circle."""
    for status in (429, 500, 503):
        busy = Fault(status=status, headers={"Retry-After": "1"})
        passing = client == "url" or status == 429  # the Hub's client asks once for a body that fails with 5xx
        trial.expect(f"{status} once", trial.order(client), "file" if passing else "sentence", _gets(trial, busy))
        trial.expect(f"{status} for good", trial.order(client), "sentence", _gets(trial, *[busy] * 40))
    trial.expect("redirected in a circle", trial.order(client), "sentence", _moves(trial))


def _contents(trial: Trial, client: Client) -> None:
    """The bytes: too few, too many, others."""
    for name, body in (("short", CONTENT[:-1]), ("long", CONTENT + b"x"), ("empty", b""), ("other bytes", OTHER)):
        trial.expect(name, trial.order(client), "sentence", _gets(trial, *[Fault(body=body)] * 40))
    if client == "hub":  # nothing published: the Hub's own hash counts
        trial.expect("other bytes, unknown", trial.order(client, published=False), "sentence", _gets(trial, Fault(body=OTHER)))


def _crowds(trial: Trial, client: Client) -> None:
    """Two and eight processes at once, on a good line, on a cut one, and with a wrong file."""
    for count in (2, 8):
        for name, faults, outcome in (
            ("a good line", [], "file"),
            ("a cut line", [Fault(cut_at=SIZE // 2)], "file"),
            ("a wrong file", [Fault(body=OTHER)] * 40, "sentence"),
        ):
            order = trial.order(client)
            asked = len(trial.server.asked("GET", trial.path(order)))
            trial.server.faults[trial.path(order)] = [replace(one, pause_s=0.01) for one in faults]
            answers = fetched_at_once([order] * count)
            if outcome == "file":
                gets = len(trial.server.asked("GET", trial.path(order))) - asked
                good = len(set(answers)) == 1 and right(answers[0], SHA256) and gets == 1 + len(faults)
            else:
                good = all(map(in_one_sentence, answers))
            trial.server.heal()
            good = good and trial.nothing_wrong_is_there(order) and right(fetched(order), SHA256)
            trial.note(f"{client}: {count} processes, {name}", good, str(answers))


_ON_A_SMALL_DISK = """
import json, subprocess, sys
sys.path[:0] = json.loads(sys.argv[2])
from fetching import Order, obtained
given = json.loads(sys.argv[1])
order, home = Order(**given), given["home"]
def mount(*options):
    subprocess.run(["mount", *options, home], check=True)
mount("-t", "tmpfs", "-o", f"size={order.bytes // 2}", "none")
answers = [obtained(order)]
mount("-o", "remount,size=64m")
answers.append(obtained(order))
mount("-o", "remount,ro")
answers.append(obtained(order))
subprocess.run(["umount", home], check=True)
mount("-t", "tmpfs", "-o", "ro", "none")
answers.append(obtained(order))
mount("-o", "remount,rw")
answers.append(obtained(order))
right = [open(one, "rb").read() == open(sys.argv[3], "rb").read() if one[:1] == "/" else None for one in answers]
print(json.dumps([answers, right]))
"""


def _disks(trial: Trial, client: Client) -> None:
    """A disk that fills up on the way, then has room; a cache that is read-only, with the file in it and without."""
    order = trial.order(client)
    expected = trial.folder / "expected"
    expected.write_bytes(CONTENT)
    given = json.dumps({**vars(order)})
    paths = json.dumps([one for one in sys.path if one])
    command = ["unshare", "-rm", sys.executable, "-W", "ignore", "-c", _ON_A_SMALL_DISK, given, paths, str(expected)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"this system gives no file system of its own: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    answers, found = json.loads(done.stdout.splitlines()[-1])
    names = ("full disk", "room again", "read-only cache with the file", "read-only cache without", "writable again")
    for name, answer, is_right in zip(names, answers, found, strict=True):
        expects_file = name not in ("full disk", "read-only cache without")
        good = is_right if expects_file else in_one_sentence(answer)
        trial.note(f"{client}: {name}", good, answer, fault="again" not in name)


def _repositories(trial: Trial) -> None:
    """What happens to repositories: renamed, gated, gone, moved on."""
    trial.expect("renamed", trial.order("hub"), "file", lambda _: _rename(trial))
    for name, status, code in (
        ("gated", 403, "GatedRepo"),
        ("private or gone", 401, "RepoNotFound"),
        ("no such revision", 404, "RevisionNotFound"),
        ("no such file", 404, "EntryNotFound"),
        ("unable", 500, ""),
    ):
        refuse = {f"/{REPO}": (status, code)}
        trial.expect(name, trial.order("hub"), "sentence", lambda _, refuse=refuse: trial.server.hub_errors.update(refuse))  # type: ignore[misc]
    for status in (429, 500, 503):
        busy = Fault(status=status, headers={"Retry-After": "1"})
        order = trial.order("hub")
        trial.expect(f"{status} to the question", order, "file", lambda path, busy=busy: _heads(trial, path, busy))  # type: ignore[misc]
    trial.expect("silent to the question", trial.order("hub"), "file", lambda path: _heads(trial, path, Fault(silent=True)))
    order = trial.order("hub", published=False, revision="main")
    trial.server.serve_lfs(REPO, "main", FILE, OTHER)
    before = fetched(order)
    trial.server.serve_lfs(REPO, "main", FILE, CONTENT)
    trial.server.files[trial.path(order)].headers["X-Repo-Commit"] = "b" * 40
    after = fetched(order)
    moved = right(before, hashlib.sha256(OTHER).hexdigest()) and right(after, SHA256)
    trial.note("hub: the branch moved on between two calls", moved, f"{before}, {after}")
    order = trial.order("hub", revision="v1")
    trial.server.serve_lfs(REPO, "v1", FILE, OTHER)
    trial.note("hub: a tag was moved to another file", in_one_sentence(fetched(order)))
    order = trial.order("hub", published=False, revision="main")
    trial.expect("the file changed between question and body", order, "sentence", _gets(trial, Fault(body=OTHER)))


def _gets(trial: Trial, *faults: Fault) -> Callable[[str], None]:
    return lambda path: trial.server.faults.update({path: list(faults)})


def _heads(trial: Trial, path: str, *faults: Fault) -> None:
    trial.server.head_faults[path] = list(faults)


def _moves(trial: Trial) -> Callable[[str], None]:
    return lambda path: trial.server.redirects.update({path: f"{trial.server.url}/round", "/round": path})


def _rename(trial: Trial) -> None:
    trial.server.serve_lfs("someone/new-name", COMMIT, FILE, CONTENT)
    trial.server.renamed[REPO] = "someone/new-name"


@pytest.mark.parametrize("survivors", [0, 1])
def test_kill_9_at_any_moment_costs_a_retry_and_nothing_else(server: FaultServer, tmp_path: Path, survivors: int) -> None:
    """Killed at a byte of the file or at a moment of the fetch, alone or while another process waits for it."""
    started = time.monotonic()
    trial, moments = Trial(server, tmp_path), random.Random(survivors)
    ended, left_over = Counter[str](), Counter[str]()
    for client in CLIENTS:
        for number in range(KILLS):
            order = trial.order(client)
            when = ("at a byte", "after the start", "at a byte", "after the last byte")[number % 4]
            victim = Fetching(order)
            later = threading.Timer(moments.uniform(0, 0.05), victim.kill)
            strike, at = {
                "at a byte": (victim.kill, max(1, SIZE * number // (KILLS - 2))),
                "after the last byte": (later.start, SIZE),
                "after the start": (lambda: None, SIZE),
            }[when]
            fault = Fault(piece_bytes=SIZE // 25, pause_s=0.001, at_byte=(at, strike))
            server.faults[trial.path(order)] = [fault]
            others = [Fetching(order) for _ in range(survivors)]
            victim.begin()
            for other in others:
                other.begin()
            if when == "after the start":
                time.sleep(moments.uniform(0, 0.1))
                victim.kill()
            answer = victim.answer()
            ended["before the kill" if answer else "by the kill"] += 1
            waited = [other.answer() for other in others]
            good = (right(answer, SHA256) if answer else True) and all(right(one, SHA256) for one in waited)
            good = good and all(hashlib.sha256(one.read_bytes()).hexdigest() == SHA256 for one in order.ours())
            left_over[client] += sum(1 for one in Path(order.home).rglob("*.incomplete"))
            server.heal()
            good = good and right(fetched(order), SHA256) and trial.nothing_wrong_is_there(order)
            trial.note(f"{client}: kill -9 {when}", good, f"{answer}, {waited}")
    if survivors:
        assert not trial.failures, "\n".join(trial.failures)
        return
    trial.record(
        "download_kill",
        "kill -9 in the middle of a fetch, then a fetch, by our downloader and by huggingface_hub",
        started,
        kills_of_each_client=KILLS,
        fetches_that_ended=dict(ended),
        incomplete_files_left_by_the_hubs_client=left_over["hub"],
    )
