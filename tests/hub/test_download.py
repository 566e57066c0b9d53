"""Released files come from the Hub by the real huggingface_hub client: the right revision, once, verified, offline afterwards.

Each test talks to a server on this machine, in a process of its own, since the client reads its settings when it is imported.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.local_server import LocalServer, local_server

REPO, COMMIT, FILE = "someone/their-deeplab", "a" * 40, "model.safetensors"
CONTENT = b"weights" * 1000
PATH = f"/{REPO}/resolve/{COMMIT}/{FILE}"

PROGRAM = """
import dataclasses, json, sys, time
time.sleep = lambda seconds: None  # the client waits up to 23 s before it gives up
from deeplabzoo.errors import DownloadError
from deeplabzoo.hub.download import fetch
from deeplabzoo.hub.manifest import HubSource, released
asked = json.loads(sys.argv[1])
source = HubSource("hub", asked.pop("repo"), asked.pop("revision"), asked.pop("file"))
row = dataclasses.replace(released().rows[0], source=source, **asked)
try:
    print(json.dumps({"path": str(fetch(row))}))
except DownloadError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with local_server() as running:
        running.serve_hub_file(REPO, COMMIT, FILE, CONTENT)
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def fetch(endpoint: str, home: Path, env: dict[str, str] | None = None, **changes: Any) -> dict[str, str]:
    """Fetch a hub row in a fresh process; returns its `path` or its `error`."""
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    asked = {"repo": REPO, "revision": COMMIT, "file": FILE, "bytes": len(CONTENT), "sha256": sha256, **changes}
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **(env or {})}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert "\n" not in answer.get("error", "")
    return answer


def whole_files(home: Path) -> list[str]:
    """Names of everything in the cache that has bytes of the file in it."""
    return [path.name for path in home.rglob("*") if path.is_file() and b"weights" in path.read_bytes()]


def test_a_file_comes_from_its_revision_once_and_then_from_the_cache(server: LocalServer, home: Path) -> None:
    """SMP#957: a second request for what is already there, or for another branch, is a bug."""
    path = Path(fetch(server.url, home)["path"])
    assert path.read_bytes() == CONTENT
    assert [request.path for request in server.asked("GET")] == [PATH]
    assert all(f"/resolve/{COMMIT}/" in request.path for request in server.requests)
    asked = len(server.requests)
    assert Path(fetch(server.url, home)["path"]) == path
    assert len(server.requests) == asked


@pytest.mark.parametrize("switch", ["DEEPLABZOO_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_cache_works_offline_and_nothing_else_does(server: LocalServer, home: Path, switch: str) -> None:
    offline = {switch: "1"}
    assert f"{switch} forbids the download" in fetch(server.url, home, offline)["error"]
    assert server.requests == []
    path = fetch(server.url, home)["path"]
    asked = len(server.requests)
    assert fetch(server.url, home, offline)["path"] == path
    assert len(server.requests) == asked


def test_a_tag_is_a_revision_too(server: LocalServer, home: Path) -> None:
    server.serve_hub_file(REPO, "v1.0", FILE, CONTENT)
    assert "path" in fetch(server.url, home, revision="v1.0")
    assert server.asked("GET", f"/resolve/v1.0/{FILE}")


def test_a_wrong_hash_is_refused_and_removed(server: LocalServer, home: Path) -> None:
    """Neither the link nor the blob behind it stays to be found by the next program."""
    error = fetch(server.url, home, sha256="0" * 64)["error"]
    assert "is not the published file: its sha256 is" in error
    assert whole_files(home) == []


def test_a_wrong_size_is_refused_and_removed(server: LocalServer, home: Path) -> None:
    assert f"it has {len(CONTENT)} bytes, 5 are published" in fetch(server.url, home, bytes=5)["error"]
    assert whole_files(home) == []


def test_a_transfer_that_is_cut_gives_no_file(server: LocalServer, home: Path) -> None:
    server.files[PATH].faults = ["cut:100"] * 50
    assert "cannot be downloaded" in fetch(server.url, home)["error"]
    assert not [path for path in home.rglob("snapshots/**/*") if path.is_file()]


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "GatedRepo", "is gated: accept its terms"),
        (401, "RepoNotFound", "no such repository, or it is private"),
        (404, "RevisionNotFound", f"has no revision '{COMMIT}'"),
        (404, "EntryNotFound", "has no such file at this revision"),
        (500, "", "HTTP|Hub|500"),
    ],
)
def test_the_hubs_refusals_are_one_sentence(server: LocalServer, home: Path, status: int, code: str, reason: str) -> None:
    """The client's own messages take a page and a stack trace."""
    server.hub_errors[f"/{REPO}"] = (status, code)
    error = fetch(server.url, home)["error"]
    assert error.startswith(f"hf-hub:{REPO}@{COMMIT}/{FILE} cannot be downloaded: ")
    assert any(word in error for word in reason.split("|"))


def test_no_network_is_one_sentence(home: Path) -> None:
    with local_server() as server:
        url = server.url
    assert "the Hub cannot be reached" in fetch(url, home)["error"]


CREATE = """
import json, sys
import deeplabzoo
address = sys.argv[1]
nets = [
    deeplabzoo.create(address),
    deeplabzoo.create("deeplabv3_resnet18", pretrained=address, num_classes=2),
    deeplabzoo.load(address),
]
print(json.dumps([[net.num_classes, net.classes[0], net.weights_source["source"]] for net in nets]))
"""


@pytest.mark.parametrize("revision", [None, "v2"])
def test_anybodys_repository_is_a_model_name(server: LocalServer, home: Path, tmp_path: Path, revision: str | None) -> None:
    """`create("hf-hub:someone/their-deeplab")` needs nothing but the one file that `save` wrote, at the revision asked for."""
    import deeplabzoo

    net = deeplabzoo.DeepLab(
        deeplabzoo.DeepLabConfig(architecture="deeplabv3", encoder="resnet18", num_classes=3), classes=["a", "b", "c"]
    )
    net.save(tmp_path / FILE, dtype=torch.float16)
    server.serve_hub_file(REPO, revision or "main", FILE, (tmp_path / FILE).read_bytes())
    address = f"hf-hub:{REPO}{f'@{revision}' if revision else ''}"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", CREATE, address]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[3, "a", address], [2, "class_0", address], [3, "a", address]]
    assert [request.path for request in server.asked("GET")] == [f"/{REPO}/resolve/{revision or 'main'}/{FILE}"]


def test_a_bundled_file_is_verified_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that was damaged on its way is noticed before its weights are used."""
    from helpers.rows import row

    from deeplabzoo.errors import DownloadError
    from deeplabzoo.hub import download
    from deeplabzoo.hub.manifest import BundledSource

    monkeypatch.setattr(download, "weights_folder", lambda: tmp_path)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    bundled = row(source=BundledSource("bundled", "net.safetensors"), bytes=len(CONTENT), sha256=sha256)
    with pytest.raises(DownloadError, match="is missing; reinstall deeplabzoo"):
        download.fetch(bundled)
    (tmp_path / "net.safetensors").write_bytes(CONTENT)
    assert download.fetch(bundled) == tmp_path / "net.safetensors"
    (tmp_path / "net.safetensors").write_bytes(CONTENT[::-1])
    with pytest.raises(DownloadError, match="its sha256 is"):
        download.fetch(bundled)


SMALL_PROGRAM = """
import json, sys
from deeplabzoo.errors import DownloadError
from deeplabzoo.hub.download import _check_announcement, fetch_from_hub
if len(sys.argv) > 2:
    try:
        print(json.dumps(_check_announcement(*json.loads(sys.argv[2]))))
    except DownloadError as error:
        print(json.dumps(str(error)))
    raise SystemExit
try:
    print(json.dumps(str(fetch_from_hub(sys.argv[1], "config.json"))))
except DownloadError as error:
    print(json.dumps(str(error)))
"""


def fetch_settings(endpoint: str, home: Path, *words: str) -> str:
    """Fetch a repository's config.json in a fresh process; returns its path or the error."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SMALL_PROGRAM, REPO, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout.splitlines()[-1]))


def test_a_small_file_is_held_to_its_git_hash(server: LocalServer, home: Path) -> None:
    """Files outside the Hub's large-file storage have git's hash as ETag; other bytes of the same length are refused."""
    server.serve_hub_file(REPO, "main", "config.json", b'{"output_stride": 16}')
    served = server.files[f"/{REPO}/resolve/main/config.json"]
    assert Path(fetch_settings(server.url, home)).read_bytes() == served.content
    served.etag = served.validator
    served.content = b'{"output_stride": 08}'
    found = fetch_settings(server.url, home.with_name("other"))
    assert "is not the published file: its git hash is" in found
    assert not list(home.with_name("other").rglob("config.json"))


def test_settings_without_end_are_broken_off(server: LocalServer, home: Path) -> None:
    """A config.json of more than 1 MiB is no config.json, whatever length the server announces."""
    server.serve_hub_file(REPO, "main", "config.json", b" " * (3 << 20))
    assert "sends more than 1048576 bytes" in fetch_settings(server.url, home)


@pytest.mark.parametrize(
    ("announced", "words"),
    [
        (["https://hub.test/a", "http://cdn.test/a", "0" * 40], "redirects from https to http"),
        (["https://hub.test/a", "file:///etc/passwd", "0" * 40], "redirects from https to file"),
        (["https://hub.test/a", "https://cdn.test/a", "../../../out"], "ETag is no hash"),
        (["https://hub.test/a", "https://cdn.test/a", "0" * 64], "None"),
        (["http://127.0.0.1/a", "http://127.0.0.1/b", "0" * 40], "None"),
    ],
)
def test_what_the_hub_announces_is_read_before_it_is_followed(announced: list[str], words: str, home: Path) -> None:
    """The Hub's client follows any redirect and names a file of its cache after the ETag."""
    assert words in fetch_settings("http://127.0.0.1:9", home, json.dumps(announced))
