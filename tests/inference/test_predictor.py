"""A photo in, labels at its own size out, whatever the photo comes as; and what can be made of the labels."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.color_net import CLASSES, PALETTE, ColorNet
from PIL import Image

from deeplabzoo.data.classes import default_palette
from deeplabzoo.errors import ImageError, OutputError, UsageError
from deeplabzoo.inference.predictor import Predictor, Result
from deeplabzoo.inference.visualization import MAX_LEGEND_ENTRIES, percent
from deeplabzoo.processing.preprocessing import image_logits, prepare


def scene(height: int = 120, width: int = 200) -> np.ndarray:
    """Black with a red block at the top left and a blue one at the bottom right: every turn of it differs."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 4, 0] = 255
    image[height // 4 * 3 :, width // 8 * 5 :, 2] = 255
    return image


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(ColorNet(), device="cpu")


def labelled(labels: list[list[int]], classes: tuple[str, ...] = CLASSES) -> Result:
    labels_HW = np.array(labels, np.uint8)
    image = np.full((*labels_HW.shape, 3), 100, np.uint8)
    return Result(image, labels_HW, classes, default_palette(len(classes)), 0.1)


def test_labels_have_the_images_own_size(predictor: Predictor) -> None:
    """One call, one photo, its size (rishizek-v3#7: 430 x 418 for 512 x 512)."""
    result = predictor(scene(151, 233))
    assert result.labels.shape == (151, 233)
    assert result.labels.dtype == np.uint8
    assert result.labels[30, 20] == 1
    assert result.labels[140, 200] == 3
    assert result.labels[30, 200] == 0


def test_the_way_an_image_comes_does_not_matter(predictor: Predictor, tmp_path: Path) -> None:
    """Path, text, Pillow image and array of one photo give one answer, alone and in a mixed list."""
    image = scene()
    Image.fromarray(image).save(tmp_path / "scene.png")
    sources = [tmp_path / "scene.png", str(tmp_path / "scene.png"), Image.fromarray(image), image]
    expected = predictor(image).labels
    for source in sources:
        np.testing.assert_array_equal(predictor(source).labels, expected)
    for result in predictor(sources):
        np.testing.assert_array_equal(result.labels, expected)


def test_confidence_is_given_when_it_is_asked_for(predictor: Predictor) -> None:
    """The probability of every label, from the very logits; a photo that is cut has none, and says so."""
    image = scene(151, 233)
    result = Predictor(ColorNet(), device="cpu", confidence=True)(image)
    logits = image_logits(ColorNet().eval(), prepare(image, ColorNet().preprocessing))[0].detach()
    assert result.confidence is not None
    np.testing.assert_allclose(result.confidence, logits.softmax(dim=0).amax(dim=0).numpy(), atol=1e-5)
    np.testing.assert_array_equal(result.labels, predictor(image).labels)
    assert predictor(image).confidence is None
    with pytest.raises(UsageError, match="233 x 151 pixels is cut into tiles; use tile=None"):
        Predictor(ColorNet(), device="cpu", confidence=True, tile=64)(image)


def test_a_list_equals_its_images_one_by_one(predictor: Predictor) -> None:
    """Photos of any sizes in one list, and a photo's answer does not depend on its neighbours."""
    photos = [scene(120, 200), scene(60, 61), scene(300, 90)]
    results = predictor(photos)
    assert isinstance(results, list)
    for photo, result in zip(photos, results, strict=True):
        np.testing.assert_array_equal(result.labels, predictor(photo).labels)
    batch = np.stack([scene(), scene()[::-1]])
    assert [result.labels.shape for result in predictor(batch)] == [(120, 200)] * 2
    assert predictor([]) == []


def test_grey_images_are_images(predictor: Predictor) -> None:
    """An H x W array is a grey photo, not an error."""
    assert predictor(np.zeros((50, 70), np.uint8)).areas == {"background": 1.0}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_labels_lie_on_the_upright_image(predictor: Predictor, tmp_path: Path, orientation: int, suffix: str) -> None:
    """Telephones store photos turned, with a note; labels belong to what the eye sees, for all eight notes."""
    stored_from_upright = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = Image.fromarray(scene())
    for turn in stored_from_upright:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    stored.save(path, exif=exif, quality=95)

    result = predictor(path)
    expected = predictor(scene()).labels
    assert result.labels.shape == result.image.shape[:2] == (120, 200)
    assert (result.labels == expected).mean() > (0.99 if suffix == ".jpg" else 0.999999)


def test_areas_sum_to_the_whole_image(predictor: Predictor) -> None:
    """{class name: share}, largest first, only what is there."""
    areas = predictor(scene()).areas
    assert list(areas) == ["background", "red", "blue"]
    assert sum(areas.values()) == pytest.approx(1)
    assert areas["red"] == pytest.approx(1 / 8, abs=0.02)


def test_classes_of_one_name_are_one_area() -> None:
    """A checkpoint may call two classes alike; their shares add up instead of hiding each other."""
    assert labelled([[0, 1], [2, 2]], ("a", "b", "a")).areas == {"a": 0.75, "b": 0.25}


def test_label_image_keeps_the_class_numbers(predictor: Predictor, tmp_path: Path) -> None:
    """A palette PNG: class numbers as values, class colours to the eye."""
    result = predictor(scene())
    result.save(tmp_path / "labels.png", "labels")
    with Image.open(tmp_path / "labels.png") as back:
        assert back.mode == "P"
        np.testing.assert_array_equal(np.asarray(back), result.labels)
        assert back.convert("RGB").getpixel((10, 10)) == PALETTE[1]


def test_label_image_of_many_classes_keeps_the_class_numbers(tmp_path: Path) -> None:
    """No palette holds 300 classes: 16-bit grey does."""
    labels = np.array([[0, 299], [256, 7]], np.uint16)
    names = tuple(map(str, range(300)))
    result = Result(np.zeros((2, 2, 3), np.uint8), labels, names, default_palette(256) * 2, 0.1)
    result.save(tmp_path / "labels.png", "labels")
    with Image.open(tmp_path / "labels.png") as back:
        np.testing.assert_array_equal(np.asarray(back), labels)


def test_overlay_tints_objects_and_leaves_background(predictor: Predictor) -> None:
    """The colour seen is the mixture asked for; background and everything under the legend stay as they were."""
    result = predictor(scene())
    plain = np.asarray(result.overlay(alpha=0.5, legend=False))
    assert plain.shape == result.image.shape
    np.testing.assert_array_equal(plain[10, 10], [(255 + 200 + 1) // 2, 5, 10])
    np.testing.assert_array_equal(plain[10, 190], [0, 0, 0])
    with_legend = result.overlay(alpha=0.5)
    assert with_legend.height > plain.shape[0]
    np.testing.assert_array_equal(np.asarray(with_legend)[:120, :200], plain)


def test_overlay_alpha_spans_image_to_colours(predictor: Predictor) -> None:
    """0 is the photo (with outlines), 1 the colours."""
    result = predictor(scene())
    inside = (slice(5, 40), slice(5, 30))
    np.testing.assert_array_equal(np.asarray(result.overlay(0, legend=False))[inside], result.image[inside])
    assert (np.asarray(result.overlay(1, legend=False))[inside] == PALETTE[1]).all()
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="alpha must be"):
            result.overlay(alpha)


@pytest.mark.parametrize("size", [(2, 2), (100, 75), (16, 300), (3000, 40), (1400, 1000)])
def test_legend_fits_images_of_any_size(size: tuple[int, int]) -> None:
    """Text stays readable on a thumbnail and grows with a large photo; the photo is never covered or scaled."""
    width, height = size
    labels = np.zeros((height, width), np.uint8)
    labels[: height // 2] = 3
    image = np.full((height, width, 3), 90, np.uint8)
    result = Result(image, labels, CLASSES, PALETTE, 0.1)
    sheet = result.overlay()
    left = (sheet.width - width) // 2
    photo = np.asarray(result.overlay(legend=False))
    np.testing.assert_array_equal(np.asarray(sheet)[:height, left : left + width], photo)
    legend = np.asarray(sheet.convert("L"))[height:]
    assert legend.shape[0] >= 12
    assert (legend < 60).sum() > 50  # ink
    assert PALETTE[3] in {color for _, color in sheet.crop((0, height, sheet.width, sheet.height)).getcolors(1 << 24)}


def test_legend_sums_up_what_it_cannot_list() -> None:
    """150 classes do not fit; the smallest become one entry and the sheet stays of sensible height."""
    names = tuple(f"class number {index}" for index in range(150))
    labels = [[index % 150 for index in range(300)] for _ in range(200)]
    few, many = labelled([[0, 1]] * 200, names), labelled(labels, names)
    line = few.overlay().height - 200
    assert many.overlay().height < 200 + line * (MAX_LEGEND_ENTRIES + 1)


def test_a_share_is_never_rounded_to_nothing_or_to_all() -> None:
    """`0.0 %` of a class that was found, or `100.0 %` beside it, would both be lies."""
    assert [percent(share) for share in (1.0, 0.9999, 0.312, 0.0006, 0.0001)] == [
        "100 %",
        ">99.9 %",
        "31.2 %",
        "0.1 %",
        "<0.1 %",
    ]


def test_json_is_plain_and_complete(predictor: Predictor, tmp_path: Path) -> None:
    """Anything can read it, and its areas are those of the labels."""
    result = predictor(scene())
    result.save(tmp_path / "areas.json", facts={"image": "scene.png"})
    facts = json.loads((tmp_path / "areas.json").read_text())
    assert (facts["image"], facts["width"], facts["height"]) == ("scene.png", 200, 120)
    assert sum(one["pixels"] for one in facts["classes"]) == 120 * 200
    assert {one["name"]: one["share"] for one in facts["classes"]} == result.areas
    assert [one["index"] for one in facts["classes"]] == [0, 1, 3]


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("x.jpg", "labels", "lossy formats change class numbers"),
        ("x.png", "json", ".json"),
        ("x.json", "overlay", ".png"),
        ("x.txt", None, ".png"),
        ("x.png", "mask", "expected 'overlay', 'labels' or 'json'"),
    ],
)
def test_wrong_kinds_of_file_are_refused(predictor: Predictor, tmp_path: Path, name: str, kind: str, said: str) -> None:
    """A JPEG of labels would be silently wrong: blurred numbers are other classes."""
    with pytest.raises(UsageError, match=said):
        predictor(scene()).save(tmp_path / name, kind)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing_behind(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk gives a sentence; the old file stays and no half of a new one lies beside it."""
    result, path = predictor(scene()), tmp_path / "overlay.png"
    result.save(path)
    before = path.read_bytes()

    def full_disk(self: Image.Image, file: object, **options: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        result.save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["overlay.png"]
    with pytest.raises(OutputError, match="Cannot write"):
        result.save(tmp_path / "missing" / "overlay.json")


def test_files_have_ordinary_permissions(predictor: Predictor, tmp_path: Path) -> None:
    """A result in a shared folder is as readable as any other new file there."""
    predictor(scene()).save(tmp_path / "overlay.png")
    (tmp_path / "other").touch()
    assert (tmp_path / "overlay.png").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_predicting_leaves_the_training_flags_alone() -> None:
    """The network runs in eval mode during the call, and is in training again after it."""
    net = ColorNet()
    net.train()
    net.norm.eval()
    Predictor(net, device="cpu")(scene())
    assert net.seen_training == [False, False]
    assert (net.training, net.norm.training) == (True, False)


def test_wrong_engines_devices_and_models_are_sentences() -> None:
    """Each names what there is."""
    with pytest.raises(UsageError, match="expected one of auto, torch"):
        Predictor(ColorNet(), engine="turbo")
    with pytest.raises(UsageError, match="cpu"):
        Predictor(ColorNet(), device="gpu")
    with pytest.raises(UsageError, match="takes 4 channels; photos have 3"):
        Predictor(ColorNet(in_chans=4))


def bomb(path: Path) -> Path:
    """A PNG of 57 bytes that declares 30000 x 30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def test_bad_images_are_sentences(predictor: Predictor, tmp_path: Path) -> None:
    """Not an image, cut short, too thin, a bomb, missing, of the wrong kind: ImageError, never a traceback from inside."""
    text = tmp_path / "text.jpg"
    text.write_text("not a photo")
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    Image.new("RGB", (1, 50)).save(tmp_path / "thin.png")
    bad = [
        (text, "not an image"),
        (cut, "damaged or cut short"),
        (tmp_path / "thin.png", "1 x 50"),
        (bomb(tmp_path / "bomb.png"), "30000 x 30000"),
        (tmp_path / "missing.png", "does not exist"),
        (np.zeros((40, 40, 3), np.float32), "uint8"),
        (np.zeros((40, 40, 7), np.uint8), "shape"),
        (3, "int"),
    ]
    for source, said in bad:
        with pytest.raises(ImageError, match=said):
            predictor(source)


def test_a_real_model_finds_the_cat(shared_data: Path) -> None:
    """The published weights on the photo of the README: mostly cat."""
    import deeplabzoo

    net = deeplabzoo.load(shared_data / "tflite" / "deeplabv3_mnv2_pascal_quant.tflite")
    cat = Path(__file__).resolve().parents[2] / "docs" / "images" / "cat.jpg"
    result = deeplabzoo.Predictor(net, device="cpu")(cat)
    assert result.labels.shape == (300, 451)
    assert 0.75 < result.areas["cat"] < 0.9
    assert result.areas["cat"] + result.areas["background"] > 0.99
