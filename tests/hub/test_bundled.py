"""What ships inside the package works with no network at all, and scores what its row says."""

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import deeplabzoo
from deeplabzoo.data.classes import class_list, subset_note
from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.hub.http_download import sha256_of
from deeplabzoo.hub.manifest import BundledSource, Metric, WeightRow, released, weights_folder
from deeplabzoo.models.deeplab import DeepLab

ROOT = Path(__file__).resolve().parents[2]
CAT, ASTRONAUT = ROOT / "docs" / "images" / "cat.jpg", ROOT / "docs" / "images" / "astronaut.jpg"
DEFAULT = "deeplabv3plus_mobilenetv2_voc"
LARGEST_BYTES = 7_000_000
POINTS = 0.05
PLACES = {"voc": ("voc", "voc2012_subset"), "camvid": ("camvid", "camvid"), "person": ("folder", "ccp_person")}
"""Classes of a row -> data set and its folder in the shared data."""

BUNDLED = [row for row in released() if isinstance(row.source, BundledSource)]


def each(rows: list[WeightRow], what: str) -> pytest.MarkDecorator:
    """Run a test on every row; where there is none, one skipped test says so."""
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f"no bundled weights {what}"), id="none")
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.full_name) for row in rows] or [absent])


def of_data(data: str) -> list[WeightRow]:
    return [row for row in BUNDLED if row.data == data]


def measured(split: str | None = None) -> list[Any]:
    """Every measured mIoU of a bundled row, with the row."""
    found = [
        pytest.param(row, metric, id=f"{row.full_name}-{metric.split}-os{metric.output_stride}-{len(metric.scales)}scales")
        for row in BUNDLED
        for metric in row.metrics
        if metric.origin == "measured" and metric.name == "mIoU" and split in (None, metric.split)
    ]
    absent = pytest.param(None, None, marks=pytest.mark.skip(reason="no bundled weights with a measured mIoU"), id="none")
    return found or [absent]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every way out is closed, and whoever tries one fails the test even if it swallows the error."""
    tried: list[str] = []

    def refuse(*words: object, **options: object) -> None:
        tried.append(repr(words))
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for switch in ("DEEPLABZOO_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(switch, "1")
    yield
    assert not tried


@functools.cache
def network(full_name: str) -> DeepLab:
    return deeplabzoo.create(full_name, pretrained=True)


@functools.cache
def labels_of(full_name: str, photo: Path) -> npt.NDArray[np.integer[Any]]:
    return deeplabzoo.Predictor(network(full_name), device="cpu")(photo).labels


def foreground(row: WeightRow, photo: Path) -> dict[str, float]:
    """Each class's share of what is not background, largest first."""
    pixels = np.bincount(labels_of(row.full_name, photo).ravel(), minlength=row.config.num_classes)[1:]
    classes = class_list(row.data).classes[1:]
    shares = {name: float(count) / max(1, int(pixels.sum())) for name, count in zip(classes, pixels, strict=True)}
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


@each(BUNDLED, "yet")
def test_the_file_is_the_rows_and_small(row: WeightRow) -> None:
    """At most 7 MB each, so that the package stays a package; and the very bytes that were measured."""
    assert isinstance(row.source, BundledSource)
    file = weights_folder() / row.source.file
    assert row.sha256 is not None
    assert row.bytes is not None
    assert sha256_of(file) == row.sha256
    assert file.stat().st_size == row.bytes <= LARGEST_BYTES


@pytest.mark.usefixtures("no_network")
@each(BUNDLED, "yet")
def test_it_is_created_without_any_network(row: WeightRow) -> None:
    """`create(name, pretrained=True)` on an aeroplane; classes, configuration and preprocessing are those of the row."""
    net = deeplabzoo.create(row.full_name, pretrained=True)
    known = class_list(row.data)
    assert (net.classes, net.palette, net.num_classes) == (known.classes, known.palette, known.num_classes)
    assert net.config == row.config
    assert net.preprocessing == row.preprocessing
    assert net.weights_source["sha256"] == row.sha256
    if row.default:
        assert deeplabzoo.create(row.name, pretrained=True).weights_source["tag"] == row.tag


@pytest.mark.parametrize(("row", "metric"), measured())
def test_the_metric_follows_from_its_report(row: WeightRow, metric: Metric) -> None:
    """The committed report is of these weights, and its confusion matrix gives the row's mIoU when counted again."""
    assert metric.report is not None
    report = json.loads((ROOT / metric.report).read_text(encoding="utf-8"))
    assert report["weights"]["sha256"] == row.sha256
    assert (report["split"], report["images"]) == (metric.split, metric.images)
    matrix = ConfusionMatrix(row.config.num_classes)
    matrix.counts[:] = report["confusion_matrix"]
    assert 100 * matrix.scores().miou == pytest.approx(metric.value, abs=POINTS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("row", "metric"), measured("val"))
def test_evaluate_repeats_the_metric(row: WeightRow, metric: Metric, shared_data: Path) -> None:
    """The row's mIoU on its val split, measured again under the row's conditions, to 0.05 points."""
    name, folder = PLACES[row.data]
    data = build_dataset(name, shared_data / folder, metric.split, classes=class_list(row.data).classes)
    if len(data) != metric.images:
        pytest.skip(f"{folder} has {len(data)} pictures, the figure stands on {metric.images}")
    assert subset_note(data.name, data.split, len(data)) == metric.subset
    report = deeplabzoo.evaluate(
        network(row.full_name),
        data,
        scales=metric.scales,
        flip=metric.flip,
        output_stride=metric.output_stride,
        progress=False,
        device="cpu",
    )
    assert str(report.protocol) == metric.protocol
    assert 100 * report.miou == pytest.approx(metric.value, abs=POINTS)


@each(BUNDLED, "yet")
def test_evaluate_scores_what_predict_draws(row: WeightRow, tmp_path: Path) -> None:
    """Truth made from the predicted labels, a band of them void and a corner of them wrong, has a score that a pencil finds."""
    num_classes = row.config.num_classes
    overlaps, sizes = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    for photo in (CAT, ASTRONAUT):
        found = labels_of(row.full_name, photo).astype(np.int64)
        truth = found.copy()
        truth[:40] = 255
        truth[-150:, -200:] = (truth[-150:, -200:] + 1) % num_classes
        for folder, picture in (("images", Image.open(photo)), ("masks", Image.fromarray(truth.astype(np.uint8)))):
            place = tmp_path / "val" / folder
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{photo.stem}.png")
        every = np.arange(num_classes)[:, None]
        scored = truth.ravel() != 255
        ours, theirs = found.ravel()[scored] == every, truth.ravel()[scored] == every
        overlaps, sizes = overlaps + (ours & theirs).sum(1), sizes + (ours | theirs).sum(1)
    expected = float(np.mean(overlaps[sizes > 0] / sizes[sizes > 0]))
    report = deeplabzoo.evaluate(network(row.full_name), "folder", tmp_path, "val", progress=False, device="cpu")
    assert report.images == 2
    assert 0.1 < expected < 0.99
    assert 100 * report.miou == pytest.approx(100 * expected, abs=POINTS)


@each(of_data("voc"), "for VOC")
def test_the_cat_is_a_cat(row: WeightRow) -> None:
    """The README's photo: more than half of what is not background."""
    assert foreground(row, CAT)["cat"] > 0.5


@each(of_data("voc"), "for VOC")
def test_the_astronaut_is_a_person(row: WeightRow) -> None:
    """No other class is larger, whatever the flag and the shuttle behind her are taken for."""
    name, share = next(iter(foreground(row, ASTRONAUT).items()))
    assert (name, share > 0) == ("person", True)


@each(of_data("person"), "for persons")
def test_two_models_see_the_same_person(row: WeightRow) -> None:
    """Trained on other pictures, with other classes, the person network and the VOC network draw about the same outline."""
    others = of_data("voc")
    if not others:
        pytest.skip("no bundled weights for VOC")
    own = labels_of(row.full_name, ASTRONAUT) == class_list("person").classes.index("person")
    for other in others:
        theirs = labels_of(other.full_name, ASTRONAUT) == class_list("voc").classes.index("person")
        assert (own & theirs).sum() / (own | theirs).sum() >= 0.7, other.full_name


OFFLINE_PROGRAM = """
import runpy, socket, sys

def refuse(*words, **options):
    print("network:", words, file=sys.stderr)
    raise SystemExit(99)

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
sys.argv = ["predict", *sys.argv[1:]]
runpy.run_module("deeplabzoo.predict", run_name="__main__")
"""


@each([row for row in BUNDLED if row.name == DEFAULT and row.default], f"named {DEFAULT}")
def test_the_readmes_photo_is_labelled_without_a_network(row: WeightRow, tmp_path: Path) -> None:
    """`python -m deeplabzoo.predict cat.jpg` in a new process, with empty caches: the bundled default, the right class."""
    places = {name: str(tmp_path / "empty") for name in ("DEEPLABZOO_CACHE", "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_PROGRAM, str(CAT), "--out", str(tmp_path / "out"), "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, **places, "DEEPLABZOO_OFFLINE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cat.json", "cat_labels.png", "cat_overlay.png"]
    facts = json.loads((tmp_path / "out" / "cat.json").read_text())
    assert (facts["model"], facts["weights"]["sha256"]) == (row.name, row.sha256)
    shares = {one["name"]: one["share"] for one in facts["classes"] if one["name"] != "background"}
    assert shares["cat"] > 0.5 * sum(shares.values())
