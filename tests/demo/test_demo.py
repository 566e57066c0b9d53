"""The web demo over HTTP: the answer is the predictor's, uploads are bounded, many are served, nothing is left behind."""

import base64
import http.client
import io
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.color_net import ColorNet
from PIL import Image

import deeplabzoo
import deeplabzoo.cli.demo as demo
from deeplabzoo.demo import server
from deeplabzoo.demo.app import ModelPool
from deeplabzoo.demo.server import LOOPBACK, DemoServer, Limits
from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.processing.postprocessing import compile_postprocessing

CAT = Path(__file__).resolve().parents[2] / "docs" / "images" / "cat.jpg"
MODEL = "deeplabv3plus_mobilenetv2_voc"


class Running:
    """A server in a thread of this process, and the smallest client for it."""

    def __init__(self, server: DemoServer) -> None:
        self.server = server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(LOOPBACK, self.server.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            connection.close()

    def segment(self, upload: bytes, model: str = "", **headers: str) -> tuple[int, dict[str, Any]]:
        status, _, content = self.ask("POST", f"/api/segment{model and '?model=' + model}", upload, **headers)
        answer: dict[str, Any] = json.loads(content)
        return status, answer


@pytest.fixture
def colors() -> Iterator[Running]:
    """Two models that know four colours, small limits, three places in the queue of each."""
    models = ModelPool(["one", "two"], lambda _: Predictor(ColorNet(), "cpu"), max_queued=60)
    with DemoServer(LOOPBACK, 0, models, Limits(max_bytes=100_000, max_pixels=40_000)) as server:
        yield Running(server)
        server.shutdown()


def scene(side: int = 60, kind: str = "PNG") -> bytes:
    image = np.zeros((side, side, 3), np.uint8)
    image[: side // 2, : side // 2, 0] = 255
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def labels_in(answer: dict[str, Any]) -> np.ndarray[Any, Any]:
    flat = np.frombuffer(zlib.decompress(base64.b64decode(answer["labels"])), f"<u{answer['label_bytes']}")
    return flat.reshape(answer["height"], answer["width"])


def test_a_real_image_gets_the_labels_of_the_predictor() -> None:
    """The page shows what the library says, pixel for pixel: bundled weights, a JPEG from a camera, by HTTP."""
    with demo.make_server(port=0) as server:
        running = Running(server)
        status, answer = running.segment(CAT.read_bytes())
        server.shutdown()
    expected = Predictor(deeplabzoo.create(MODEL, pretrained=True))(CAT)
    assert status == 200
    assert answer["model"].startswith(MODEL)
    np.testing.assert_array_equal(labels_in(answer), expected.labels)
    assert {one["name"]: one["share"] for one in answer["classes"]} == expected.areas
    assert answer["classes"][0]["name"] == "cat" or answer["classes"][1]["name"] == "cat"
    with Image.open(io.BytesIO(base64.b64decode(answer["labels_png"]))) as png:
        assert png.mode == "P"
        np.testing.assert_array_equal(np.asarray(png), expected.labels)
        assert png.getpalette()[: 3 * 21] == expected.label_image().getpalette()[: 3 * 21]
    with Image.open(io.BytesIO(base64.b64decode(answer["photo"]))) as photo:
        assert photo.size == (expected.image.shape[1], expected.image.shape[0])
    assert list(answer["seconds"]) == ["wait", "read", "model", "labels", "encode"]
    assert all(seconds >= 0 for seconds in answer["seconds"].values())


def test_the_page_lists_bundled_models_and_files(tmp_path: Path) -> None:
    """What the command line names stands first; the bundled weights follow; a file is shown by its name alone."""
    file = tmp_path / "mine.safetensors"
    net = deeplabzoo.create("deeplabv3_resnet18", num_classes=3)
    net.save(file)
    with demo.make_server([str(file)], port=0) as server:
        running = Running(server)
        known = json.loads(running.ask("GET", "/api/models")[2])
        status, answer = running.segment(scene(), "mine.safetensors")
        server.shutdown()
    assert known["models"][0] == "mine.safetensors"
    assert any(name.startswith(MODEL) for name in known["models"])
    assert (status, answer["model"]) == (200, "mine.safetensors")


@pytest.mark.parametrize("path", ["/", "/style.css", "/page.js", "/view.js", "/layers.js", "/camera.js"])
def test_the_page_needs_nothing_from_elsewhere(colors: Running, path: str) -> None:
    """No address of another computer stands in any file, and the browser is told to refuse them (offline, no telemetry)."""
    status, headers, content = colors.ask("GET", path)
    assert status == 200
    assert b"http:" not in content
    assert b"https:" not in content
    assert b"//" not in content.replace(b"// ", b"")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy


def test_every_file_of_the_page_is_served(colors: Running) -> None:
    """A file that the server does not know would be missing in the browser only."""
    folder = Path(server.__file__).parent / "static"
    for file in folder.iterdir():
        if file.suffix in (".css", ".js"):
            assert colors.ask("GET", f"/{file.name}")[0] == 200, file.name


def test_fifty_images_at_once_are_all_answered(colors: Running) -> None:
    """A class of students presses the button together: everyone waits a little, nobody is refused, answers are not mixed up."""
    sides = [40 + k for k in range(50)]
    with ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(lambda side: colors.segment(scene(side), "two" if side % 2 else "one"), sides))
    for side, (status, answer) in zip(sides, replies, strict=True):
        assert status == 200
        assert (answer["width"], answer["height"]) == (side, side)
        assert answer["model"] == ("two" if side % 2 else "one")
        assert labels_in(answer)[2, 2] == 1


def test_one_image_at_a_time_runs_in_a_model() -> None:
    """Two passes at once would share caches and fight for the cores."""
    running_now: list[int] = []
    most: list[int] = []

    class Slow(ColorNet):
        def forward_low_resolution(self, image_BCHW: Any) -> Any:
            running_now.append(1)
            most.append(len(running_now))
            time.sleep(0.01)
            running_now.pop()
            return super().forward_low_resolution(image_BCHW)

    model = ModelPool(["slow"], lambda _: Predictor(Slow(), "cpu"), max_queued=20)["slow"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: model.segment(scene(), 10_000), range(8)))
    assert most == [1] * 8


def test_a_full_queue_is_a_sentence_and_empties_again(colors: Running) -> None:
    """Beyond its places a model turns photos away before they are read, so memory stays bounded."""
    model = colors.server.models["one"]
    places = [model.queue_slot() for _ in range(60)]
    for place in places:
        place.__enter__()
    status, answer = colors.segment(scene(), "one")
    assert status == 503
    assert "try again" in answer["error"]
    for place in places:
        place.__exit__(None, None, None)
    assert colors.segment(scene(), "one")[0] == 200


@pytest.mark.parametrize(
    ("upload", "status", "words"),
    [
        (b"", 422, "is empty"),
        (b"no photo", 422, "not an image"),
        (scene(kind="PNG")[:80], 422, "damaged|cannot be opened"),
        (scene(300), 422, "300 x 300 pixels"),
        (b"\0" * 100_001, 413, "0.1 MB"),
        (b"\0" * 3_000_000, 413, "3.0 MB"),
    ],
)
def test_a_bad_upload_is_one_sentence(colors: Running, upload: bytes, status: int, words: str) -> None:
    """The person at the page reads why, also when the body was refused before it was read, and the server goes on."""
    import re

    found, answer = colors.segment(upload)
    assert found == status
    assert re.search(words, answer["error"])
    assert answer["error"].endswith(".")
    assert "\n" not in answer["error"]
    assert colors.segment(scene())[0] == 200


def test_unknown_models_and_places_are_sentences(colors: Running) -> None:
    """Only what the command line named can be asked for: no file of this computer, no other model."""
    status, answer = colors.segment(scene(), "/etc/passwd")
    assert status == 404
    assert "it has one, two" in answer["error"]
    assert colors.ask("GET", "/../demo.py")[0] == 404
    assert colors.ask("POST", "/elsewhere", b"")[0] == 404
    assert colors.ask("POST", "/api/segment", None, Content_Length="x")[0] == 411


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_other_web_sites_cannot_use_it(colors: Running, headers: dict[str, str]) -> None:
    """A page elsewhere that posts to this address, or points its own name to it, gets a refusal (DNS rebinding)."""
    assert colors.segment(scene(), **headers)[0] == 403
    own = f"{LOOPBACK}:{colors.server.port}"
    assert colors.segment(scene(), Host=own, Origin=f"http://{own}")[0] == 200


def test_only_this_computer_unless_asked() -> None:
    """The address is 127.0.0.1; sharing is a flag."""
    with demo.make_server(port=0) as server:
        assert server.server_address[0] == "127.0.0.1"
    with demo.make_server(port=0, share_on_network=True) as server:
        assert server.server_address[0] == "0.0.0.0"


def test_nothing_is_left_on_the_disk(colors: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads live in memory: no file is opened for writing, not even one for the time of the request."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = set(os.listdir())
    compile_postprocessing()  # writes numba's cache, once
    assert colors.segment(scene())[0] == 200
    opened: list[object] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            opened.append(arguments[0])

    sys.addaudithook(watch)  # cannot be removed; without `watching` it does nothing
    try:
        assert colors.segment(scene())[0] == 200
        assert colors.segment(b"bad")[0] == 422
    finally:
        watching = False
    assert opened == []
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir()) == before


def test_a_bug_is_a_sentence_in_the_page_and_a_traceback_in_the_terminal(
    colors: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The page never shows internals, and the demo outlives the photo that broke it."""
    monkeypatch.setattr("deeplabzoo.demo.app.segment_upload", lambda *_: 1 / 0)
    status, answer = colors.segment(scene())
    assert status == 500
    assert "ZeroDivisionError" not in answer["error"]
    assert "ZeroDivisionError" in capfd.readouterr().err
    monkeypatch.undo()
    assert colors.segment(scene())[0] == 200


def test_settings_that_make_no_sense_are_refused() -> None:
    """A port that is taken, or none at all, is a sentence before any page is promised."""
    for wrong in ({"port": 70_000}, {"max_megabytes": 0.0}, {"max_pixels": 1}):
        with pytest.raises(UsageError):
            demo.make_server(**wrong)  # type: ignore[arg-type]
    with demo.make_server(port=0) as server, pytest.raises(OutputError, match="choose another with --port"):
        demo.make_server(port=server.port)
    assert demo.main(["--port", "70000"]) == 2
    assert demo.main(["deeplabv3_resnet5O_voc"]) == 2


def test_ctrl_c_is_the_ordinary_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The address is printed when the page can be opened; Ctrl-C then is no error."""

    def interrupted(self: DemoServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DemoServer, "serve_forever", interrupted)
    assert demo.main(["--port", "0"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("deeplabzoo demo: http://127.0.0.1:")
    assert said.endswith("stopped\n")
