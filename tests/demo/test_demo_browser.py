"""The demo's page in a real browser: drop, look, isolate, compare, download, webcam; and no other computer is asked."""

import dataclasses
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.chromium import Browser
from PIL import Image

import deeplabzoo
import deeplabzoo.cli.demo as demo
from benchmarks.suite.demo_table import FOLDER, TASK
from deeplabzoo.benchmark.record import Record, Row, Spread, conditions
from deeplabzoo.inference.predictor import Predictor

pytestmark = pytest.mark.slow

CAT = Path(__file__).resolve().parents[2] / "docs" / "images" / "cat.jpg"
MODEL = "deeplabv3plus_mobilenetv2_voc"
RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / FOLDER
DROPS = 9
COMMAND = "DEEPLABZOO_CHROMIUM=/usr/bin/chromium python -m pytest -m slow tests/demo/test_demo_browser.py"
PRESSED = "document.querySelector('.legend button[aria-pressed=true]')"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The demo as the command serves it, with the bundled models."""
    with demo.make_server(port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.port}"
        server.shutdown()


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    try:
        browser.look(1200, 900)
        browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.open(address)
        browser.wait("document.getElementById('model').options.length >= 3")
        yield browser
        assert browser.errors == []
        assert [one for one in browser.requested if not one.startswith((address, "blob:", "data:", "about:"))] == []
    finally:
        browser.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: DEEPLABZOO_SCREENSHOTS, for whoever wants to look at them."""
    folder = Path(os.environ.get("DEEPLABZOO_SCREENSHOTS") or tmp_path / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def drop_cat(page: Browser, models: int = 1) -> None:
    page.drop(CAT, 600, 200)
    page.wait("document.getElementById('status').textContent.includes('from drop to answer')")
    page.wait(f"document.querySelectorAll('.view').length === {models}")


def test_a_dropped_image_is_segmented(page: Browser, pictures: Path) -> None:
    """Drop, and see: the photo under its colours, the legend with the shares of `predict`, the time of every stage."""
    drop_cat(page)
    expected = Predictor(deeplabzoo.create(MODEL, pretrained=True))(CAT)
    legend = page.run("[...document.querySelectorAll('.legend button')].map((one) => one.innerText)")
    assert [one.split()[0] for one in legend] == [area.name for area in expected.found()]
    assert legend[0].endswith(f"{100 * expected.found()[0].share:.1f} %")
    times = page.run("document.querySelector('.times').textContent")
    assert all(stage in times for stage in ("read", "model", "labels", "encode"))
    height, width = expected.labels.shape
    for layer in ("photo", "tint", "lines"):
        assert page.run(f"(({{width, height}}) => [width, height])(document.querySelector('canvas.{layer}'))") == [
            width,
            height,
        ]
    tint = np.array(page.run("[...document.querySelector('canvas.tint').getContext('2d').getImageData(0, 0, 9999, 1).data]"))
    first_row = tint.reshape(-1, 4)[:width]
    colors = np.array([(*color, 255) for color in expected.palette])
    colors[0] = 0  # background is left as it is
    np.testing.assert_array_equal(first_row, colors[expected.labels[0]])
    print(page.run("document.getElementById('status').textContent"))
    page.picture(pictures / "demo_light.png")
    page.look(1200, 900, "dark")
    page.picture(pictures / "demo_dark.png")
    page.look(390, 844, phone=True)
    assert page.run("document.documentElement.scrollWidth") <= 390
    page.picture(pictures / "demo_phone.png")


def test_the_time_from_drop_to_answer(page: Browser) -> None:
    """The status tells it, at the page, from the drop until the answer is painted; DEEPLABZOO_RECORD=1 keeps it."""
    drop_cat(page)  # loads the model
    times = []
    for _ in range(DROPS):
        page.run("document.getElementById('status').textContent = ''")
        drop_cat(page)
        status = page.run("document.getElementById('status').textContent")
        width, height, time_ms = re.fullmatch(r"cat\.jpg: (\d+) × (\d+) pixels, (\d+) ms from drop to answer", status).groups()
        times.append(float(time_ms))
    row = Row(name=MODEL, task=TASK, side="demo", threads=torch.get_num_threads(), pairs=DROPS, note="docs/images/cat.jpg")
    row = dataclasses.replace(row, size=(int(height), int(width)), ms=Spread.of(times))
    assert row.ms.median < 30_000
    if os.environ.get("DEEPLABZOO_RECORD") == "1":
        record = Record(
            rows=(row,),
            command=f"DEEPLABZOO_RECORD=1 {COMMAND} -k time",
            precision="fp32",
            layout="channels_last",
            seed=0,
            settings={"browser": page.call("Browser.getVersion")["product"], "engine": "auto"},
            **conditions(torch.device("cpu")),
        )
        RECORDS.mkdir(parents=True, exist_ok=True)
        record.write(RECORDS / "drop_to_answer.json")


def test_opacity_and_one_class_alone(page: Browser, pictures: Path) -> None:
    """The slider asks nobody; a press on the legend or on the photo shows one class, another press or Escape all again."""
    drop_cat(page)
    asked = len(page.requested)
    page.run("(() => { const o = document.getElementById('opacity'); o.value = 80; o.dispatchEvent(new Event('input')); })()")
    assert page.run("document.querySelector('canvas.tint').style.opacity") == "0.8"
    page.click(".legend li:nth-child(2) button")
    chosen = page.run(f"{PRESSED}.innerText")
    lines = "document.querySelector('canvas.lines').getContext('2d').getImageData(0, 0, 9999, 9999).data"
    veiled = f"{lines}.filter((value, k) => k % 4 === 3 && value === 190).length"
    pixels = page.run("(({width, height}) => width * height)(document.querySelector('canvas.lines'))")
    assert 0 < page.run(veiled) < pixels
    tinted = lines.replace(".lines", ".tint") + ".some((value) => value > 0)"
    assert page.run(tinted) is ("background" not in chosen)  # background alone is the photo as it is
    page.picture(pictures / "demo_alone.png")
    page.click(".legend li:nth-child(2) button")
    assert page.run(PRESSED + " === null")
    assert page.run(veiled) == 0
    page.click(".picture", at=(0.5, 0.5))
    assert page.run(f"{PRESSED}.innerText").split()[0] in (chosen.split()[0], "background", "cat")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert page.run(PRESSED + " === null")
    assert len(page.requested) == asked


def test_two_models_side_by_side(page: Browser, pictures: Path) -> None:
    """The photo on the page goes to the second model at once; both answers stand beside each other."""
    drop_cat(page)
    page.run(
        "(() => { const s = document.getElementById('second'); s.selectedIndex = 2; s.dispatchEvent(new Event('change')); })()"
    )
    page.wait("document.querySelectorAll('.view').length === 2")
    titles = page.run("[...document.querySelectorAll('.view h2')].map((one) => one.textContent)")
    assert titles[0] != titles[1]
    tops = page.run("[...document.querySelectorAll('.view')].map((one) => one.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    page.picture(pictures / "demo_two.png")


def test_downloads_hold_what_is_shown(page: Browser, tmp_path: Path) -> None:
    """Labels are the palette picture that `predict --labels` writes; the overlay has the photo's size and its colours."""
    drop_cat(page)
    expected = Predictor(deeplabzoo.create(MODEL, pretrained=True))(CAT)
    for kind in ("labels", "overlay"):
        page.click(f"a.{kind}")
        for _ in range(200):
            if (tmp_path / f"cat_{kind}.png").exists():
                break
            page.run("new Promise((done) => setTimeout(done, 50))")
    with Image.open(tmp_path / "cat_labels.png") as labels:
        assert labels.mode == "P"
        np.testing.assert_array_equal(np.asarray(labels), expected.labels)
    with Image.open(tmp_path / "cat_overlay.png") as overlay:
        shown = np.asarray(overlay.convert("RGB")).astype(int)
    written = np.asarray(expected.overlay(0.55, legend=False)).astype(int)
    assert shown.shape == written.shape
    assert np.mean(np.abs(shown - written)) < 1.5  # the opacity of 55 % in steps of 1/255, outlines of one pixel


def test_a_bad_image_is_one_sentence(page: Browser, tmp_path: Path) -> None:
    """What is no photo says so in the page, where it was dropped; the next photo is labelled as ever."""
    bad = tmp_path / "notes.jpg"
    bad.write_text("no photo")
    page.drop(bad, 600, 200)
    page.wait("!document.getElementById('error').hidden")
    sentence = page.run("document.getElementById('error').textContent")
    assert "not an image" in sentence
    assert sentence.endswith(".")
    big = tmp_path / "big.jpg"
    big.write_bytes(b"\0" * 33_000_000)
    page.drop(big, 600, 200)
    page.wait("document.getElementById('error').textContent.includes('33.0 MB')")
    page.errors.clear()  # the browser's own line about status 422
    drop_cat(page)
    assert page.run("document.getElementById('error').hidden")


def test_the_webcam_is_labelled_until_it_is_stopped(page: Browser, pictures: Path) -> None:
    """Picture after picture, as fast as the model is; the button ends it and gives the camera back."""
    page.click("#webcam")
    page.wait("document.getElementById('status').textContent.startsWith('webcam.jpg')")
    before = sum("api/segment" in one for one in page.requested)
    page.wait("document.querySelectorAll('.view').length === 1")
    page.run("new Promise((done) => setTimeout(done, 2000))")
    assert sum("api/segment" in one for one in page.requested) > before
    page.picture(pictures / "demo_webcam.png")
    page.click("#webcam")
    page.run("new Promise((done) => setTimeout(done, 1500))")
    after = sum("api/segment" in one for one in page.requested)
    page.run("new Promise((done) => setTimeout(done, 1000))")
    assert sum("api/segment" in one for one in page.requested) == after
    assert page.run("document.getElementById('webcam').getAttribute('aria-pressed')") == "false"
