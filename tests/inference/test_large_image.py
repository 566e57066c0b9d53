"""From a file larger than memory to a file of labels: windows of TIFFs, streamed outputs, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers.color_net import PALETTE, ColorNet
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tiling import clouds

from deeplabzoo.data.image_io import read_image
from deeplabzoo.errors import ImageError, OutputError, UsageError
from deeplabzoo.inference.large_image import ArrayRowReader, TiffRowReader, open_row_reader, open_tiff
from deeplabzoo.inference.large_predict import PartialLabels, is_streamed, predict_to_files, write_labels
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.models.config import Preprocessing

LAYOUTS = [
    {"tile": (64, 64)},
    {"tile": (128, 48), "compression": "zlib", "predictor": True},
    {"rowsperstrip": 7},
    {"rowsperstrip": 64, "compression": "zlib"},
    {"rowsperstrip": 5000},
    {"tile": (64, 64), "bigtiff": True},
]


def write_tiff(path: Path, pixels: np.ndarray, *, bigtiff: bool = False, **options: object) -> Path:
    options.setdefault("photometric", "rgb" if pixels.ndim == 3 else "minisblack")
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        writer.write(pixels, **options)
    return path


def predictor(**options: object) -> Predictor:
    return Predictor(ColorNet(preprocessing=Preprocessing(size=(129, 129))), "cpu", **{"tile": 128, "overlap": 32, **options})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_windows_of_a_tiff_hold_what_reading_it_whole_gives(layout: dict[str, object], tmp_path: Path) -> None:
    """Tiles and strips, deflated or plain, BigTIFF too; edge tiles are cut off."""
    image = clouds(301, 217)
    rows = open_row_reader(write_tiff(tmp_path / "a.tif", image, **layout))
    assert isinstance(rows, TiffRowReader)
    assert rows.hw == (301, 217)
    for top, bottom in ((0, 301), (0, 1), (60, 70), (63, 65), (250, 301), (10, 200)):
        np.testing.assert_array_equal(rows.rows(top, bottom), image[top:bottom])


@pytest.mark.parametrize("kind", ["grey", "sixteen bits", "alpha", "palette", "white is zero"])
def test_colours_of_a_tiff_are_those_of_any_image(kind: str, tmp_path: Path) -> None:
    """What `read_image` makes of the file is what its windows give."""
    image = clouds(90, 70)
    pixels, options = image[..., 0], {}
    if kind == "sixteen bits":
        pixels = image.astype(np.uint16) * 257
    elif kind == "alpha":
        pixels, options = np.dstack([image, image[..., 0]]), {"extrasamples": "unassalpha"}
    elif kind == "palette":
        options = {"photometric": "palette", "colormap": (np.arange(768).reshape(3, 256) % 256 * 257).astype(np.uint16)}
    elif kind == "white is zero":
        options = {"photometric": "miniswhite"}
    path = write_tiff(tmp_path / "a.tif", pixels, rowsperstrip=16, **options)
    rows = open_row_reader(path)
    assert isinstance(rows, TiffRowReader)
    expected = image if kind == "sixteen bits" else read_image(path)  # Pillow reads no 16-bit RGB
    np.testing.assert_array_equal(rows.rows(0, 90), expected)
    np.testing.assert_array_equal(rows.rows(89, 90), expected[89:])


@settings(max_examples=60, deadline=None)
@given(
    photometric=st.sampled_from(["rgb", "minisblack", "miniswhite"]),
    extra=st.sampled_from([None, "unspecified", "assocalpha", "unassalpha"]),
    dtype=st.sampled_from(["u1", "u2"]),
    seed=st.integers(0, 999),
)
def test_every_band_of_a_tiff_means_in_windows_what_it_means_in_the_whole_file(
    photometric: str, extra: str | None, dtype: str, seed: int
) -> None:
    """A fourth band is transparency only where the file says so; premultiplied colours are divided; white may be 0."""
    samples = (3 if photometric == "rgb" else 1) + (extra is not None)
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (24, 20, samples)).astype(dtype)
    if extra == "assocalpha":
        pixels[..., :-1] = np.minimum(pixels[..., :-1], pixels[..., -1:])
    pixels[:4, :4, -1] = 0
    options = {"planarconfig": "contig"} if samples > 1 else {}
    options |= {"extrasamples": [extra]} if extra else {}
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiff(Path(folder) / "a.tif", pixels.squeeze(), photometric=photometric, rowsperstrip=7, **options)
        windows = open_tiff(path)
        try:
            expected = read_image(path)
        except ImageError:  # Pillow reads no 16-bit grey with a second band, and no inverted one
            return
        assert windows is not None
        np.testing.assert_array_equal(windows.rows(0, 24), expected)


def test_what_cannot_be_read_in_windows_is_decoded_whole_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A turned TIFF, and one whose compression tifffile does not know; a JPEG is no such case and says nothing."""
    image = clouds(40, 60)
    Image.fromarray(image).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    write_tiff(tmp_path / "turned.tif", image, extratags=[(274, 3, 1, 6, True)])
    for name in ("lzw.tif", "turned.tif"):
        rows = open_row_reader(tmp_path / name)
        assert isinstance(rows, ArrayRowReader)
        assert f"{name} is decoded whole" in caplog.text
    assert rows.hw == (60, 40)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(open_row_reader(tmp_path / "a.png").rows(3, 9), image[3:9])
    assert "a.png" not in caplog.text


def test_a_damaged_tiff_is_a_sentence(tmp_path: Path) -> None:
    """Cut in the middle of its pixels: the rows before are there, those after raise."""
    path = write_tiff(tmp_path / "a.tif", clouds(300, 200), rowsperstrip=10, compression="zlib")
    rows = open_row_reader(path)
    offset = int(rows._page.dataoffsets[20])
    rows.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + bytes(len(whole) - offset) if offset < int(rows._page.offset) else whole[:offset])
    rows = open_row_reader(path)
    with pytest.raises(ImageError, match="damaged or cut short"):
        rows.rows(0, 300)


def test_more_pixels_than_were_allowed_are_refused_for_windows_too(tmp_path: Path) -> None:
    """Windows have no limit of their own; one that was set holds."""
    path = write_tiff(tmp_path / "a.tif", clouds(100, 100), rowsperstrip=10)
    assert isinstance(open_row_reader(path), TiffRowReader)
    with pytest.raises(ImageError, match="more than the limit of 9999"):
        open_row_reader(path, max_pixels=9999)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_streamed_labels_are_what_other_programs_read(suffix: str, dtype: type, tmp_path: Path) -> None:
    """PNG and tiled TIFF written band by band hold the numbers, and up to 256 classes the colours."""
    labels = np.random.default_rng(0).integers(0, 4, (301, 517)).astype(dtype)
    path = tmp_path / f"labels{suffix}"
    write_labels(path, labels.shape, labels.dtype, lambda top, bottom: labels[top:bottom], PALETTE)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), labels)
        if dtype is np.uint8:
            assert picture.mode == "P"
            assert picture.getpalette()[: 3 * len(PALETTE)] == [value for colour in PALETTE for value in colour]
    if suffix == ".tif":
        with tifffile.TiffFile(path) as file:
            assert file.pages.first.is_tiled
            assert file.pages.first.compression.name.endswith("DEFLATE")


def test_files_hold_what_the_predictor_says_of_the_same_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labels of every pixel, areas of them, and an overlay; nothing else is left in the folder."""
    image = clouds(500, 430)
    path = write_tiff(tmp_path / "a.tif", image, tile=(64, 64))
    out = tmp_path / "out"
    out.mkdir()
    files = {"overlay": out / "o.png", "labels": out / "l.tif", "json": out / "a.json"}
    result = predict_to_files(predictor(), path, files, facts={"model": "colors"})
    expected = predictor()(image)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "l.tif")), expected.labels)
    written = json.loads((out / "a.json").read_text())
    assert written["model"] == "colors"
    assert (written["height"], written["width"], written["continued_from"]) == (500, 430, 0)
    assert {area["name"]: area["share"] for area in written["classes"]} == pytest.approx(expected.areas)
    assert result.found() == expected.found()
    assert sorted(file.name for file in out.iterdir()) == ["a.json", "l.tif", "o.png"]


def test_only_tiled_images_beyond_the_limit_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that goes through the model whole is read as ever, whatever its size."""
    path = write_tiff(tmp_path / "a.tif", clouds(100, 100), rowsperstrip=10)
    assert not is_streamed(predictor(), path)
    monkeypatch.setattr("deeplabzoo.inference.large_predict.MAX_IN_MEMORY_PIXELS", 5000)
    assert is_streamed(predictor(), path)
    assert not is_streamed(predictor(tile="auto", overlap=None), path)
    assert not is_streamed(predictor(), tmp_path / "missing.tif")


def test_a_name_that_cannot_hold_labels_is_refused_before_the_work(tmp_path: Path) -> None:
    """Lossy formats change class numbers."""
    path = write_tiff(tmp_path / "a.tif", clouds(100, 100), rowsperstrip=10)
    with pytest.raises(UsageError):
        predict_to_files(predictor(), path, {"labels": tmp_path / "l.jpg"})
    assert [file.name for file in tmp_path.iterdir()] == ["a.tif"]


SLOW_RUN = """
import os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_large_image import predictor
from deeplabzoo.inference import large_predict
large_predict._BAND_ROWS = 32
slow = predictor()
forward = slow.net.forward_low_resolution
def pausing(image):
    time.sleep(0.005)
    return forward(image)
slow.net.forward_low_resolution = pausing
large_predict.predict_to_files(slow, sys.argv[2], {"labels": Path(sys.argv[3])})
"""


@pytest.mark.posix
def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """kill -9 in the middle: no output exists, the finished rows are used, the result is that of one run."""
    image = clouds(1500, 100)
    source, out = write_tiff(tmp_path / "a.tif", image, rowsperstrip=50), tmp_path / "l.png"
    run = subprocess.Popen(
        [
            sys.executable,
            "-c",
            SLOW_RUN,
            os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]),
            str(source),
            str(out),
        ]
    )
    progress = tmp_path / ".l.png.progress"
    limit = time.monotonic() + 60
    while not (progress.exists() and json.loads(progress.read_text())["rows"] > 300):
        assert run.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not out.exists()
    rows = json.loads(progress.read_text())["rows"]
    result = predict_to_files(predictor(), source, {"labels": out})
    assert result.continued_from == rows
    assert f"{rows} of 1500 rows are there from an earlier run" in caplog.text
    np.testing.assert_array_equal(np.asarray(Image.open(out)), predictor()(image).labels)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tif", "l.png"]


def test_rows_of_another_image_or_setting_are_not_used(tmp_path: Path) -> None:
    """Half of one answer and half of another would look whole."""
    out = tmp_path / "l.png"
    with PartialLabels(out, (10, 4), np.dtype(np.uint8), {"tile": 1}) as labels:
        labels.append(np.ones((6, 4), np.uint8))
        labels.commit()
        labels.append(np.ones((2, 4), np.uint8))  # not kept
    with PartialLabels(out, (10, 4), np.dtype(np.uint8), {"tile": 1}) as labels:
        assert labels.finished == 6
        labels.append(np.full((4, 4), 2, np.uint8))
        labels.commit()
        np.testing.assert_array_equal(labels.rows(5, 7)[:, 0], [1, 2])
    with PartialLabels(out, (10, 4), np.dtype(np.uint8), {"tile": 2}) as labels:
        assert labels.finished == 0


def test_two_runs_into_one_output_do_not_mix(tmp_path: Path) -> None:
    """The second one ends with a sentence."""
    size = ((10, 4), np.dtype(np.uint8))
    with (
        PartialLabels(tmp_path / "l.png", *size, {}),
        pytest.raises(OutputError, match="Another process"),
        PartialLabels(tmp_path / "l.png", *size, {}),
    ):
        pass


PEAK = """
import os, resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_large_image import predictor
from deeplabzoo.inference.large_predict import predict_to_files
predict_to_files(predictor(tile=256, overlap=64), sys.argv[2], {"labels": Path(sys.argv[3])})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.posix
@pytest.mark.slow
def test_memory_does_not_grow_with_the_height_of_the_image(tmp_path: Path) -> None:
    """24 Mpx against 1.5 Mpx of the same width: 72 MB of pixels and 24 MB of labels more, hardly any of it in memory."""
    peaks = {}
    for height in (1024, 16384):
        source = tmp_path / f"{height}.tif"
        strips = (np.full((64, 1500, 3), n % 256, np.uint8) for n in range(height // 64))
        tifffile.imwrite(source, strips, shape=(height, 1500, 3), dtype=np.uint8, rowsperstrip=64, photometric="rgb")
        command = [
            sys.executable,
            "-c",
            PEAK,
            os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]),
            str(source),
            str(tmp_path / "l.png"),
        ]
        peaks[height] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
    assert peaks[16384] < peaks[1024] + 30
