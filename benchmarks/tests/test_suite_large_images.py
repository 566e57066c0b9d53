"""Suite benchmarks `scaling` and `seams`: cost of large images, and what tiling changes in the labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deeplabzoo
from benchmarks.suite import scaling, tables, tile_seams
from benchmarks.suite.__main__ import main as suite
from benchmarks.suite.large_images_table import SCALING_BLOCK, SEAMS_BLOCK, large_images_tables
from benchmarks.suite.scaling_chart import draw_scaling
from deeplabzoo.benchmark.record import Record, Row, Spread
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.errors import UsageError
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.inference.large_image import open_row_reader
from deeplabzoo.inference.tiling import Tiling
from deeplabzoo.models.deeplab import DeepLab

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def net() -> DeepLab:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return deeplabzoo.create("deeplabv3plus_mobilenetv2_035_camvid")


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen labelled frames of 48 x 64: a mosaic and one that is left over."""
    root = tmp_path_factory.mktemp("camvid")
    rng = np.random.default_rng(0)
    for folder in ("val", "valannot"):
        (root / folder).mkdir()
    for number in range(13):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(root / "val" / f"{number:02d}.png")
        Image.fromarray(rng.integers(0, 12, (48, 64), np.uint8)).save(root / "valannot" / f"{number:02d}.png")
    return root


def record_of(*rows: Row) -> Record:
    """A record of those rows with what else one needs."""
    return Record(
        rows=rows,
        command="python -m benchmarks.suite scaling",
        precision="fp32",
        layout="channels-last",
        threads=1,
        seed=0,
        versions={"torch": "2.15.0"},
        hardware={"cpu": "A CPU"},
        settings={},
        date="2026-01-01T00:00:00+00:00",
        commit=None,
    )


def scaling_row(area: float, seconds: float, peak: float) -> Row:
    """What one process of `--scaling` finds."""
    figures = {"megapixels": area, "seconds": seconds, "tiles": 4.0, "peak_mb": peak, "loaded_mb": 800.0}
    spread = Spread.of([1000 * seconds])
    return Row(name="net", task=scaling.TASK, side="torch fp32", threads=1, size=(500, 500), ms=spread, figures=figures)


def test_a_point_of_the_scaling_is_measured_in_a_process_of_its_own() -> None:
    """Side from the area, every tile counted, time and memory of one picture of 0.04 megapixels."""
    ((row,),) = scaling.scaling_rows(scaling.MODEL, [0.04], threads=1, seed=0, note="shared")
    assert row.size == (200, 200)
    assert row.figures["megapixels"] == pytest.approx(0.04)
    assert row.figures["tiles"] == 1
    assert row.figures["peak_mb"] > 1
    assert row.figures["loaded_mb"] > 100
    assert row.ms
    assert row.ms.median == pytest.approx(1000 * row.figures["seconds"])
    assert row.note == "shared"


def test_what_goes_wrong_in_that_process_is_one_sentence() -> None:
    """A model that does not exist is told here, not as a traceback of the other process."""
    with pytest.raises(UsageError, match="deeplabv3_resnet5O"):
        list(scaling.scaling_rows("deeplabv3_resnet5O", [0.04], threads=1, seed=0))


def test_made_images_are_read_in_windows_and_repeat(tmp_path: Path) -> None:
    """Any size, not a multiple of the file's tiles either; the same seed gives the same pixels."""
    for name in ("a", "b"):
        scaling.write_synthetic_tiff(tmp_path / f"{name}.tif", 700, seed=3)
    first, second = (open_row_reader(tmp_path / f"{name}.tif") for name in ("a", "b"))
    assert first.hw == (700, 700)
    pixels_HWC = first.rows(0, 700)
    assert np.array_equal(pixels_HWC, second.rows(0, 700))
    assert pixels_HWC.std() > 20
    assert "TiffRowReader" in type(first).__name__


def test_the_chart_shows_time_and_memory(tmp_path: Path) -> None:
    """A PNG of two drawings; a record without such rows is refused in one sentence."""
    draw_scaling(record_of(scaling_row(0.25, 1.0, 170.0), scaling_row(1.0, 4.0, 300.0)), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 2 * picture.height - 100
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
    with pytest.raises(UsageError, match="run `scaling`"):
        draw_scaling(record_of(), tmp_path / "none.png")


def test_near_a_seam_is_near_the_middle_of_an_overlap() -> None:
    """Two tiles of 128 on 192 columns share 64 to 128, so the seam is at 96; a picture of one tile has none."""
    near_HW = tile_seams.near_seams((128, 192), Tiling((128, 128), 64), aligned=False)
    assert near_HW[:, 96 - tile_seams.REACH : 96 + tile_seams.REACH].all()
    assert near_HW.sum() == 128 * 2 * tile_seams.REACH
    assert not tile_seams.near_seams((128, 128), Tiling((128, 128), 64), aligned=False).any()


def test_differences_are_counted_where_they_are() -> None:
    """One of two pixels near the seam and two of six elsewhere."""
    found = tile_seams.SeamCounts("cut")
    labels_HW = np.array([[1, 0, 1, 1], [0, 0, 0, 0]], np.uint8)
    near_HW = np.array([[True, True, False, False], [False] * 4])
    found.add(labels_HW, np.zeros((2, 4), np.uint8), near_HW, tiles=2)
    row = found.row("net", (2, 4), "")
    assert row.agreement == 5 / 8
    assert row.figures == {"tiles": 2, "apart_near_seams": 1 / 2, "apart_elsewhere": 2 / 6}


def test_an_image_of_one_tile_is_the_whole(net: DeepLab, tmp_path: Path) -> None:
    """Where nothing is cut nothing may differ, with the image-level branch given or not."""
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 128, 3), np.uint8)).save(tmp_path / "photo.png")
    (rows,) = tile_seams.seam_rows(net, "net", [tmp_path / "photo.png"])
    assert [row.side for row in rows][-1] == "tiles of 768, overlap 192, image-level branch of the whole"
    assert all(row.figures["tiles"] == 1 and row.agreement and row.agreement > 0.999 for row in rows)
    assert not net.head.aspp.pool._forward_hooks  # type: ignore[union-attr]


def test_mosaics_are_scored_against_their_frames_truth(net: DeepLab, camvid: Path) -> None:
    """MIoU of the frames one by one is the one that evaluation finds on the twelve; the thirteenth is left out."""
    rows = tile_seams.mosaic_rows(net, "net", "camvid", camvid)
    assert [row.side for row in rows][:2] == ["frames one by one", "the whole mosaic"]
    assert rows[0].size == (3 * 48, 4 * 64)
    assert rows[0].note == "1 mosaic of 3 x 4 camvid val frames"
    data = build_dataset("camvid", camvid)
    matrix = ConfusionMatrix(11, data.ignore_index)
    predictor = deeplabzoo.Predictor(net, "cpu")
    for index in range(12):
        matrix.update(predictor(data[index].image).labels, data[index].labels)
    assert rows[0].figures["miou"] == pytest.approx(matrix.scores().miou, abs=1e-4)
    assert all(0 <= row.figures["miou"] <= 1 for row in rows)


def test_mosaics_need_weights_of_the_data(camvid: Path) -> None:
    """Labels of other classes cannot be scored."""
    other = deeplabzoo.create("deeplabv3plus_mobilenetv2_035_voc")
    assert other.classes != CLASS_LISTS["camvid"].classes
    with pytest.raises(UsageError, match="mosaics need weights of camvid"):
        tile_seams.mosaic_rows(other, "voc", "camvid", camvid)


def test_tables_are_made_of_records(tmp_path: Path) -> None:
    """Seconds, megabytes and shares stand in the tables as they were recorded, with the command."""
    seam = Row(
        name="net, photo.png",
        task=tile_seams.TASK,
        side="tiles of 512, overlap 128",
        threads=1,
        size=(5, 7),
        agreement=0.97654,
        figures={"tiles": 4, "apart_near_seams": 0.01234, "apart_elsewhere": 0.02, "miou": 0.5},
    )
    record_of(scaling_row(0.25, 1.04, 170.4), seam).write(tmp_path / "r.json")
    tables = large_images_tables(tmp_path)
    assert "| 0.25 | 500 x 500 | 4 | 1.0 | 170 | 800 |" in tables[SCALING_BLOCK]
    assert "| photo.png, 5 x 7 | tiles of 512, overlap 128 | 97.65 % | 1.23 % | 2.00 % | 50.00 % |" in tables[SEAMS_BLOCK]
    assert "Reproduce: `python -m benchmarks.suite scaling`" in tables[SEAMS_BLOCK]
    assert large_images_tables(tmp_path / "none")[SEAMS_BLOCK] == "No run is recorded yet."


def test_the_page_holds_what_the_records_say(tmp_path: Path) -> None:
    """No number is typed."""
    page = ROOT / "docs" / "large_images.md"
    copy = tmp_path / "copy.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    tables.fill(copy, tables.tables(ROOT / "benchmarks"))
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("seams --images image.jpg", "seams needs a MODEL"),
        ("seams deeplabv3_resnet18", "seams needs --images or --mosaics"),
        ("upsample deeplabv3_resnet18", "upsample needs --images"),
        ("confusion", "confusion needs --masks"),
        ("scaling --megapixels 0", "--megapixels must be at least 0.01, not 0"),
        ("scaling --threads 0", "--threads must be at least 1"),
        ("confusion --masks a.png --chart c.png", "--chart draws scaling only"),
        ("speed", "Argument benchmark: invalid choice"),
        ("table --write none.md", "'none.md' cannot be read"),
    ],
)
def test_wrong_calls_are_sentences(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Found out before anything is measured."""
    assert suite(words.split()) != 0
    assert sentence in capsys.readouterr().err
