"""`python -m deeplabzoo.weights check`: dead, altered and moved files are found before a user finds them."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.local_server import LocalServer, local_server
from helpers.rows import row

from deeplabzoo.cli import weights
from deeplabzoo.hub import http_download, registry
from deeplabzoo.hub.download import cache_folder
from deeplabzoo.hub.manifest import UrlSource, WeightRow
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = "0" * 64


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with local_server() as running:
        yield running


def url_row(url: str, tag: str, **changes: Any) -> WeightRow:
    return row(tag=tag, source=UrlSource("url", url), **{"bytes": len(CONTENT), "sha256": SHA256, **changes})


def checked(
    rows: Sequence[WeightRow], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, list[str], str]:
    """Run the command on these rows; returns its status, its lines and what it says in the end."""
    monkeypatch.setattr(registry, "list_weights", lambda pattern: list(rows))
    status = weights.main(["check", *options])
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err


def test_files_that_are_there_and_the_same(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is fetched; an ETag that is a sha256 is compared, a redirect is followed and named."""
    plain, hashed = server.serve("/plain.pth", CONTENT), server.serve("/hashed.pth", CONTENT, etag=f'"{SHA256}"')
    server.redirects["/old.pth"] = "/plain.pth"
    rows = [url_row(plain, "plain"), url_row(hashed, "hashed"), url_row(f"{server.url}/old.pth", "moved")]
    status, lines, _ = checked(rows, monkeypatch, capsys)
    assert status == 0
    assert lines[0].startswith("ok          deeplabv3_mobilenetv2_voc.plain: 0.0 MB, size as published")
    assert "size and sha256 as published" in lines[1]
    assert f"moved to {plain}" in lines[2]
    assert lines[3] == "3 released files checked: 3 ok, 0 changed, 0 unreachable."
    assert server.asked("GET") == []


def test_check_results_as_json(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script gets every answer, and the status still says whether all is well."""
    rows = [url_row(server.serve("/plain.pth", CONTENT), "plain"), url_row(f"{server.url}/missing.pth", "missing")]
    status, lines, _ = checked(rows, monkeypatch, capsys, "--json")
    answers = json.loads("\n".join(lines))
    assert status == 1
    assert [(one["weights"].rpartition(".")[2], one["status"]) for one in answers] == [
        ("plain", "ok"),
        ("missing", "unreachable"),
    ]


def test_files_that_are_not(server: LocalServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, in the order of the rows, and status 1."""
    with local_server() as gone:
        vanished = gone.url
    larger = server.serve("/larger.pth", CONTENT + b"!")
    altered = server.serve("/altered.pth", CONTENT, etag=f'"{OTHER}"')
    rows = [
        url_row(f"{server.url}/missing.pth", "missing"),
        url_row(larger, "larger"),
        url_row(altered, "altered"),
        url_row(altered, "prefix", sha256=None, sha256_prefix=SHA256[:8]),
        url_row(f"{vanished}/net.pth", "vanished"),
    ]
    status, lines, error = checked(rows, monkeypatch, capsys)
    assert status == 1
    assert [line.split()[0] for line in lines] == ["unreachable", "changed", "changed", "changed", "unreachable"]
    assert "the server returned HTTP 404" in lines[0]
    assert "has 7001 bytes, 7000 are published" in lines[1]
    assert f"has sha256 000000000000…, published is {SHA256[:12]}…" in lines[2]
    assert "Connection refused" in lines[4]
    assert error == "error: 5 released files checked: 0 ok, 3 changed, 2 unreachable.\n"


def test_servers_that_refuse_head_get_a_range_request(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Signed addresses of object stores answer 403 to HEAD."""
    url = server.serve("/net.pth", CONTENT)
    handler = server.RequestHandlerClass
    monkeypatch.setattr(handler, "do_HEAD", lambda self: self._status(403, {}))
    status, lines, _ = checked([url_row(url, "signed"), url_row(f"{server.url}/no.pth", "no")], monkeypatch, capsys)
    assert status == 1
    assert "7000" not in lines[0]
    assert "size as published" in lines[0]
    assert "HTTP 404" in lines[1]


def test_downloading_verifies_and_builds_and_goes_on_where_it_was(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run fetches nothing; a file with the right size and wrong bytes, or of another network, is found."""
    monkeypatch.setattr(http_download, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    config = DeepLabConfig(architecture="deeplabv3", encoder="mobilenetv2_050", num_classes=21)
    torch.manual_seed(0)
    DeepLab(config).save(tmp_path / "net.safetensors", dtype=torch.float16)
    content = (tmp_path / "net.safetensors").read_bytes()
    of_it = {"config": config, "origin": "deeplabzoo", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    url = server.serve("/net.safetensors", content)
    rows = [
        url_row(url, "right", **of_it),
        url_row(url, "wrong", **{**of_it, "sha256": OTHER}),
        url_row(url, "foreign", **{**of_it, "sha256": None, "origin": "torchvision"}),
    ]
    for gets in (3, 4):  # the wrong one is removed and fetched again
        status, lines, _ = checked(rows, monkeypatch, capsys, "--download")
        assert status == 1
        assert [line.split()[0] for line in lines] == ["ok", "changed", "changed"]
        assert "sha256 as published, model of " in lines[0]
        assert "is not the published file: its sha256 is" in lines[1]
        assert "its file is deeplabzoo" in lines[2]
        assert len(server.asked("GET")) == gets
    assert [path.name for path in cache_folder().rglob("*.part")] == []


def test_offline_mode_is_reported_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DEEPLABZOO_OFFLINE", "1")
    status, lines, error = checked([url_row("http://127.0.0.1:9/x", "x")], monkeypatch, capsys)
    assert (status, lines) == (1, [])
    assert "DEEPLABZOO_OFFLINE forbids asking any server" in error


def test_a_pattern_that_fits_nothing_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["check", "nothing*"]) == 2
    assert "No released weights match 'nothing*'" in capsys.readouterr().err


REPO, COMMIT, FILE = "someone/their-deeplab", "a" * 40, "model.safetensors"
HUB_PROGRAM = """
import dataclasses, json, sys
from deeplabzoo.hub.integrity import check_remote
from deeplabzoo.hub.manifest import HubSource, released
rows = []
for asked in json.loads(sys.argv[1]):
    source = HubSource("hub", asked.pop("repo"), asked.pop("revision"), "model.safetensors")
    rows.append(dataclasses.replace(released().rows[0], source=source, sha256_prefix=None, **asked))
print(json.dumps([[answer.status, answer.detail] for answer in check_remote(rows)]))
"""


def test_hub_files_are_checked_by_the_real_client(server: LocalServer, tmp_path: Path) -> None:
    """Its metadata has the commit, the size and, for large files, the sha256; no file is fetched."""
    server.serve_hub_file(REPO, COMMIT, FILE, CONTENT)
    server.files[f"/{REPO}/resolve/{COMMIT}/{FILE}"].etag = f'"{SHA256}"'
    server.serve_hub_file("someone/moved", "b" * 40, FILE, CONTENT)
    server.files["/someone/moved/resolve/" + "b" * 40 + f"/{FILE}"].headers["X-Repo-Commit"] = "c" * 40
    server.hub_errors["/someone/gated"] = (403, "GatedRepo")
    same = {"repo": REPO, "revision": COMMIT, "bytes": len(CONTENT), "sha256": SHA256}
    rows = [
        same,
        {**same, "bytes": 5},
        {**same, "sha256": OTHER},
        {**same, "revision": "d" * 40},
        {**same, "repo": "someone/moved", "revision": "b" * 40},
        {**same, "repo": "someone/gated"},
    ]
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HUB_PROGRAM, json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [status for status, _ in answers] == ["ok", "changed", "changed", "unreachable", "changed", "unreachable"]
    assert "size and sha256 as published" in answers[0][1]
    assert "no such file at this revision" in answers[3][1]
    assert f"answers with commit {'c' * 40}" in answers[4][1]
    assert "is gated: accept its terms" in answers[5][1]
    assert server.asked("GET") == []
