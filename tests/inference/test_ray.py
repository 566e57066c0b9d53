"""`deeplabzoo.inference.ray` on a local Ray of two workers: nothing is lost or there twice, whatever becomes of a worker."""

import importlib.util
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deeplabzoo
from deeplabzoo import optional_imports
from deeplabzoo.errors import DeepLabZooError, ImageError, UsageError
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.ray import LabelBatch, label_files

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = 48

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed (pip install "deeplabzoo[ray]")'
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Differently cropped copies of an image, so that no two have equal areas."""
    folder = tmp_path_factory.mktemp("photos")
    with Image.open(ROOT / "docs" / "images" / "cat.jpg") as cat:
        for number in range(PHOTOS):
            cat.crop((number, 0, cat.width, cat.height - number)).save(folder / f"{number:02}.jpg")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def net() -> deeplabzoo.DeepLab:
    return deeplabzoo.create("deeplabv3plus_mobilenetv2_voc", pretrained=True)


def table(path: Path) -> list[dict[str, object]]:
    import pyarrow.parquet

    rows: list[dict[str, object]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def test_a_missing_ray_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    """One sentence, before any image is searched or model loaded; and wrong calls likewise."""
    monkeypatch.setattr(optional_imports.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeepLabZooError, match=r"deeplabzoo\[ray\]"):
        label_files([str(photos)], tmp_path / "out", "deeplabv3plus_mobilenetv2_voc")
    with pytest.raises(UsageError, match="workers=0"):
        label_files([str(photos)], tmp_path / "out", "deeplabv3plus_mobilenetv2_voc", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_batch_is_labelled_without_ray_too(tmp_path: Path, photos: Path, net: deeplabzoo.DeepLab) -> None:
    """The class is plain: it answers row by row, names what cannot be read, and does the second time nothing."""
    import pickle

    (tmp_path / "broken.jpg").write_bytes(b"words")
    batch = {
        "photo": np.array([str(photos / "03.jpg"), str(tmp_path / "broken.jpg")]),
        "name": np.array(["trip/03", "broken"]),
    }
    (tmp_path / "out" / "trip").mkdir(parents=True)
    label = LabelBatch(pickle.dumps(net), str(tmp_path / "out"), "cpu")
    first = label(batch)
    assert first["done_before"] == [False, False]
    assert first["photo"] == list(batch["photo"])
    assert first["error"][0] == "" != first["error"][1]
    assert first["areas"][1] == ""
    with Image.open(tmp_path / "out" / "trip" / "03_labels.png") as labels:
        assert np.array_equal(np.asarray(labels), Predictor(net, "cpu")(photos / "03.jpg").labels)
    again = label(batch)
    assert again["done_before"] == [True, False]
    assert again["areas"] == first["areas"]


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("default")
@pytest.mark.posix
def test_a_worker_killed_half_way_loses_and_doubles_nothing(tmp_path: Path, photos: Path, net: deeplabzoo.DeepLab) -> None:
    """SIGKILL to one of two workers when a quarter is done: each image is there once, with the right labels."""
    killed: list[int] = []
    out = tmp_path / "out"

    def kill_one() -> None:
        while len(list(out.glob("*.json"))) < PHOTOS // 4:
            time.sleep(0.01)
        mine = [pid for pid in children() if b"LabelBatch" in (Path("/proc") / str(pid) / "cmdline").read_bytes()]
        os.kill(mine[0], signal.SIGKILL)
        killed.append(len(list(out.glob("*.json"))))

    watcher = threading.Thread(target=kill_one, daemon=True)
    watcher.start()
    labelled = label_files([str(photos)], out, net, workers=2)
    watcher.join(timeout=10)
    assert killed
    assert killed[0] < PHOTOS, "the worker was killed too late to prove anything"
    assert (labelled.photos, dict(labelled.failed)) == (PHOTOS, {})
    names = sorted(path.stem for path in photos.iterdir())
    assert sorted(path.stem for path in out.glob("*.json")) == names
    assert sorted(path.name for path in out.glob("*_labels.png")) == [f"{name}_labels.png" for name in names]
    assert not list(out.glob(".*")), "a half-written file was left"
    rows = table(labelled.areas)
    assert len({(row["photo"], row["class"]) for row in rows}) == len(rows)
    shares: Counter[str] = Counter()
    for row in rows:
        shares[str(row["labels"])] += row["pixels"] / (row["height"] * row["width"])
    assert sorted(shares) == [f"{name}_labels.png" for name in names]
    assert all(abs(share - 1) < 1e-9 for share in shares.values())
    for name in names[:: PHOTOS // 6]:
        with Image.open(out / f"{name}_labels.png") as labels:
            assert np.mean(np.asarray(labels) == Predictor(net, "cpu")(photos / f"{name}.jpg").labels) > 0.9999


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("default")
def test_a_second_call_does_what_is_missing_and_tables_all(tmp_path: Path, photos: Path, net: deeplabzoo.DeepLab) -> None:
    """Done images stay untouched and stand in the table; broken ones are named; none at all is an error."""
    some = tmp_path / "in"
    some.mkdir()
    for name in ("00.jpg", "01.jpg", "02.jpg"):
        shutil.copy(photos / name, some / name)
    out = tmp_path / "out"
    assert label_files(str(some), out, "deeplabv3plus_mobilenetv2_voc").done_before == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix != ".parquet"}
    (some / "broken.jpg").write_bytes(b"words")
    shutil.copy(photos / "03.jpg", some / "03.jpg")
    second = label_files(str(some), out, net, workers=1)
    assert (second.photos, second.done_before, list(second.failed)) == (5, 3, [str(some / "broken.jpg")])
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert {Path(str(row["photo"])).name for row in table(second.areas)} == {"00.jpg", "01.jpg", "02.jpg", "03.jpg"}
    assert json.loads((out / "03.json").read_text())["weights"]["name"] == "deeplabv3plus_mobilenetv2_voc"
    with pytest.raises(ImageError, match="None of the 1 photos"):
        label_files(str(some / "broken.jpg"), tmp_path / "none", net)


def children() -> list[int]:
    """Processes below this one: only those may be killed."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(stat[1])
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)
