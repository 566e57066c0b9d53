"""Reading pictures and masks: every kind of file a user has, and one sentence for every kind that cannot be used."""

import contextlib
import io
import logging
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplabzoo.data.image_io import read_image, read_image_bytes, read_mask
from deeplabzoo.errors import DataError, ImageError

SMALL = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 300
    return text


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_files_come_back_unchanged(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", SMALL, **options)
    for source in (path, str(path)):
        pixels = read_image(source)
        assert pixels.dtype == np.uint8
        assert pixels.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(pixels, SMALL)


def test_path_pillow_and_array_agree(tmp_path: Path) -> None:
    """One picture is one picture, however it is handed over."""
    path = save(tmp_path / "a.png", SMALL)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read_image(opened), SMALL)
    np.testing.assert_array_equal(read_image(SMALL), SMALL)
    np.testing.assert_array_equal(read_image(SMALL[:, ::-1]), SMALL[:, ::-1])
    np.testing.assert_array_equal(read_image_bytes(path.read_bytes()), SMALL)


def test_the_bytes_of_an_upload_fail_like_a_file(tmp_path: Path) -> None:
    """An upload that is no photo, or none that may be read, ends in the same sentences; nothing is written to find out."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    content = save(tmp_path / "a.png", noise).read_bytes()
    for data, words in ((b"", "is empty"), (b"no photo", "not an image"), (content[:2000], "damaged")):
        with pytest.raises(ImageError, match=words) as error:
            read_image_bytes(data, "The upload")
        assert sentence(error).startswith("The upload ")
    with pytest.raises(ImageError, match="more than the limit of 20"):
        read_image_bytes(content, max_pixels=20)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    """A photo is labelled the way a viewer shows it; the oracle lists where each stored corner belongs (Exif 2.3)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", SMALL, exif=exif, **options)
    swapped = SMALL.transpose(1, 0, 2)
    upright = {
        1: SMALL,
        2: SMALL[:, ::-1],
        3: SMALL[::-1, ::-1],
        4: SMALL[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }[orientation]
    np.testing.assert_array_equal(read_image(path), upright)
    mask = save(tmp_path / "mask.png", SMALL[..., 0], exif=exif)
    np.testing.assert_array_equal(read_mask(mask), upright[..., 0])


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", SMALL, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert read_image(path).shape == SMALL.shape


def test_palette_and_transparency_become_rgb_over_white(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.fromarray(indices, mode="L").convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    image.putdata(indices.ravel().tolist())
    plain = read_image(save(tmp_path / "plain.png", image))
    np.testing.assert_array_equal(plain, [[[10, 20, 30], [200, 0, 0]], [[0, 0, 250], [200, 0, 0]]])
    clear = read_image(save(tmp_path / "clear.png", image, transparency=bytes([255, 0, 255])))
    np.testing.assert_array_equal(clear, [[[10, 20, 30], [255] * 3], [[0, 0, 250], [255] * 3]])


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 51, 255]
    expected = np.repeat(np.array([[255, 204, 0], [255, 255, 255]], np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_image(save(tmp_path / "rgba.png", rgba)), expected)
    np.testing.assert_array_equal(read_image(rgba), expected)
    grey_alpha = rgba[..., 2:]
    np.testing.assert_array_equal(read_image(save(tmp_path / "la.png", Image.fromarray(grey_alpha))), expected)
    np.testing.assert_array_equal(read_image(grey_alpha), expected)


def test_grey_one_bit_and_cmyk_become_rgb(tmp_path: Path) -> None:
    grey = SMALL[..., 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "l.png", grey)), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(read_image(grey), np.stack([grey] * 3, axis=2))
    bits = np.array([[True, False], [False, True]])
    black_white = np.repeat((bits * 255).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_image(save(tmp_path / "one.png", Image.fromarray(bits))), black_white)
    np.testing.assert_array_equal(read_image(bits), black_white)
    cmyk = read_image(save(tmp_path / "cmyk.tif", Image.new("CMYK", (3, 2), (0, 255, 255, 0))))
    np.testing.assert_array_equal(cmyk, np.full((2, 3, 3), [255, 0, 0]))
    assert read_image(save(tmp_path / "cmyk.jpg", Image.new("CMYK", (3, 2), (0, 255, 255, 0)))).shape == (2, 3, 3)


def test_sixteen_bit_equals_its_eight_bit_copy(tmp_path: Path) -> None:
    """65535 is white, whatever the picture's own range; and v * 257, the exact 16-bit copy, is v again."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide = grey.astype(np.uint16) * 257
    for path in (save(tmp_path / "a.png", wide), save(tmp_path / "a.tif", wide)):
        np.testing.assert_array_equal(read_image(path), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(read_image(wide), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(read_image(np.stack([wide] * 3, axis=2).astype(">u2")), np.stack([grey] * 3, axis=2))
    assert read_image(np.array([[0, 128], [129, 65535]], np.uint16))[..., 0].tolist() == [[0, 0], [1, 255]]


def test_animation_gives_its_first_frame_and_logs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.INFO, "deeplabzoo"):
        read_image(save(tmp_path / "still.gif", frames[0]))
        assert caplog.text == ""
        np.testing.assert_array_equal(read_image(path), np.full((3, 4, 3), [250, 0, 0]))
    assert "several frames; the first one is used" in caplog.text


def test_files_that_are_no_image_give_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("shopping: milk, bread")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    for name, words in [
        ("notes.jpg", "not an image"),
        ("empty.png", "empty"),
        ("page.eps", "not an image"),
        ("missing.png", "does not exist"),
        ("", "is a folder"),
    ]:
        for read in (read_image, read_mask):
            with pytest.raises(ImageError, match=words) as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in sentence(error)
    with pytest.raises(ImageError, match="not a int"):
        read_image(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_give_a_sentence(tmp_path: Path, suffix: str, share: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"a.{suffix}", pixels)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert str(path) in sentence(error)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif"])
def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path, suffix: str) -> None:
    """Damage ends in pixels or in ImageError, never in a decoder's own exception."""
    rng = np.random.default_rng(1)
    path = save(tmp_path / f"a.{suffix}", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(ImageError):
            assert read_image(path, max_pixels=1_000_000).dtype == np.uint8


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_a_side_of_one_pixel_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels.*at least 2 x 2") as error:
        read_image(save(tmp_path / "thin.png", Image.new("RGB", size)))
    sentence(error)
    with pytest.raises(ImageError, match="at least 2 x 2"):
        read_image(Image.new("RGB", size))
    with pytest.raises(ImageError, match="at least 2 x 2"):
        read_image(np.zeros((size[1], size[0], 3), np.uint8))


def test_a_side_of_no_pixels_is_refused(tmp_path: Path) -> None:
    for source in (np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0), np.uint8), Image.new("RGB", (0, 5))):
        with pytest.raises(ImageError, match="at least 2 x 2"):
            read_image(source)
    path = tmp_path / "zero.png"
    path.write_bytes(png_declaring(0, 5))
    with pytest.raises(ImageError) as error:
        read_image(path)
    sentence(error)


def png_declaring(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_a_huge_declared_size_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_declaring(30000, 30000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for read in (read_image, read_mask):
        with pytest.raises(ImageError, match=r"30000 x 30000.*256000000.*max_pixels") as error:
            read(path)
        assert str(path) in sentence(error)


def test_the_size_limit_is_ours_alone_and_pillow_does_not_warn(tmp_path: Path) -> None:
    """A 100-megapixel photo is fine although Pillow would warn about it; and Pillow's own setting is left as it was."""
    path = tmp_path / "large.png"
    path.write_bytes(png_declaring(10000, 10000))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="cut short"):  # past the limit, and only then short of data
            read_image(path)
    assert before == Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match="more than the limit of 23"):
        read_image(save(tmp_path / "a.png", SMALL), max_pixels=23)
    assert read_image(tmp_path / "a.png", max_pixels=24).shape == SMALL.shape


def test_arrays_that_are_no_image_give_a_sentence() -> None:
    for array, words in [
        (np.zeros((4, 4, 3), np.float32), "float32, expected uint8"),
        (np.zeros((4, 4), np.int64), "int64, expected uint8"),
        (np.zeros((3, 4, 5), np.uint8), "channels last"),
        (np.zeros((1, 3, 4, 4), np.uint8), "channels last"),
        (np.zeros(7, np.uint8), "channels last"),
    ]:
        with pytest.raises(ImageError, match=words) as error:
            read_image(array)
        sentence(error)


def test_values_without_a_known_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="floating-point"):
        read_image(save(tmp_path / "f.tif", Image.new("F", (3, 3), 0.5)))
    with pytest.raises(ImageError, match="from 70000 to 70000"):
        read_image(save(tmp_path / "i.tif", Image.new("I", (3, 3), 70000)))


def test_masks_give_their_numbers(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 255], [20, 7, 3]], np.uint8)
    palette = Image.fromarray(labels).convert("P")
    palette.putdata(labels.ravel().tolist())
    palette.putpalette([v for i in range(256) for v in (255 - i, i, i)])
    for path in (
        save(tmp_path / "p.png", palette),
        save(tmp_path / "clear.png", palette, transparency=0),
        save(tmp_path / "l.png", labels),
        save(tmp_path / "rgb.png", np.stack([labels] * 3, axis=2)),
        save(tmp_path / "la.png", np.stack([labels, labels], axis=2)),
    ):
        mask = read_mask(path)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, labels)
    wide = labels.astype(np.uint16) * 100
    mask = read_mask(save(tmp_path / "wide.png", wide))
    assert mask.dtype == np.uint16
    np.testing.assert_array_equal(mask, wide)
    bits = np.array([[True, False]])
    np.testing.assert_array_equal(read_mask(save(tmp_path / "one.png", Image.fromarray(bits))), [[1, 0]])


def test_a_mask_of_colours_is_refused_by_name(tmp_path: Path) -> None:
    """zhengyang-wang#42, mmseg#2486: an RGB mask is no label map, and nobody says so."""
    with pytest.raises(DataError, match=r"RGB colours.*palette or grey PNG") as error:
        read_mask(save(tmp_path / "colours.png", SMALL))
    assert "colours.png" in sentence(error)
    with pytest.raises(DataError, match="mode F"):
        read_mask(save(tmp_path / "f.tif", Image.new("F", (3, 3), 0.5)))


def test_a_pillow_image_cut_short_gives_a_sentence() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "JPEG")
    with Image.open(io.BytesIO(stream.getvalue()[:900])) as lazy, pytest.raises(ImageError, match="cut short"):
        read_image(lazy)


def test_sixteen_bits_of_white_is_zero_are_no_negative(tmp_path: Path) -> None:
    """A TIFF may store white as 0, in any number of bits."""
    tifffile = pytest.importorskip("tifffile")
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for stored in (255 - grey, 65535 - grey.astype(np.uint16) * 257):
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite")
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[..., 0], grey)


def test_twelve_bits_in_a_sixteen_bit_file_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing in such a file says so, and a scale by content would differ from image to image: a warning, once a folder."""
    wide = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a.png", "b.png", "c.tif"):
        read_image(save(tmp_path / name, wide))
    assert caplog.text.count("uses values up to 4095 only") == 1
    (tmp_path / "full").mkdir()
    read_image(save(tmp_path / "full" / "a.png", wide * 16))
    read_image(save(tmp_path / "full" / "black.png", wide * 0))
    assert caplog.text.count("uses values up to") == 1


@pytest.mark.parametrize("extra", ["unspecified", "unassalpha"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_fourth_band_is_dropped_or_blended_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: str, bits: int
) -> None:
    """Near infrared is no transparency; where the file declares alpha, white shows through, and a warning says so."""
    tifffile = pytest.importorskip("tifffile")
    bands = np.dstack([SMALL, np.full(SMALL.shape[:2], 51, np.uint8)])
    stored = bands if bits == 8 else bands.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=[extra])
    pixels = read_image(tmp_path / "a.tif")
    if extra == "unspecified":
        np.testing.assert_array_equal(pixels, SMALL)
        assert "has 1 more channels than its colours, which are ignored" in caplog.text
    else:
        assert pixels.min() >= 204
        assert "has an alpha channel, which is blended over white; if its last channel is another band" in caplog.text


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 5, 8), np.uint8), np.zeros((4, 5, 3), np.float32), np.zeros((4, 5), np.float64)]
)
def test_a_tiff_of_bands_or_floats_is_called_a_tiff(tmp_path: Path, pixels: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", pixels, planarconfig="contig" if pixels.ndim == 3 else None)
    with pytest.raises(ImageError, match=r"is a TIFF of a kind that is not read .* expected 1 to 4 channels of 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.bool_])
def test_a_mask_may_be_a_numpy_array(tmp_path: Path, dtype: type) -> None:
    labels = np.array([[0, 1, 1], [1, 0, 0]]).astype(dtype)
    np.save(tmp_path / "a.npy", labels)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.npy"), labels.astype(np.uint8))


def test_minus_one_in_a_numpy_mask_is_void(tmp_path: Path) -> None:
    """LabelMe writes -1 where nothing is labelled."""
    np.save(tmp_path / "a.npy", np.array([[-1, 3], [0, 2]], np.int32))
    assert read_mask(tmp_path / "a.npy").tolist() == [[255, 3], [0, 2]]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 2), np.float32), "holds float32 of shape"),
        (np.zeros((2, 2, 3), np.uint8), "expected whole numbers, height x width"),
        (np.array([[0, 70_000]]), "values from 0 to 70000"),
        (np.array([[{}, 1]], object), "cannot be read as a .npy array"),
    ],
)
def test_a_numpy_array_that_is_no_mask_is_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises((DataError, ImageError), match=words):
        read_mask(tmp_path / "a.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    with pytest.raises((DataError, ImageError)):
        read_mask(tmp_path / "cut.npy")
