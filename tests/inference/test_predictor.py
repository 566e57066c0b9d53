"""An image in, labels at its own size out, whatever the image comes as; and what can be made of the labels."""

import dataclasses
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from helpers.color_net import CLASSES, PALETTE, ColorNet
from PIL import Image

from deeplabzoo.data.classes import default_palette
from deeplabzoo.errors import ImageError, OutputError, UsageError
from deeplabzoo.inference.large_image import read_input
from deeplabzoo.inference.predictor import Predictor, Result
from deeplabzoo.inference.visualization import MAX_LEGEND_ENTRIES, percent
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.layers import Classifier
from deeplabzoo.optimization.onnx_export import ExportModule
from deeplabzoo.processing.preprocessing import channel_statistics, image_logits, prepare


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
    """One call, one image, its size (rishizek-v3#7: 430 x 418 for 512 x 512)."""
    result = predictor(scene(151, 233))
    assert result.labels.shape == (151, 233)
    assert result.labels.dtype == np.uint8
    assert result.labels[30, 20] == 1
    assert result.labels[140, 200] == 3
    assert result.labels[30, 200] == 0


def test_the_way_an_image_comes_does_not_matter(predictor: Predictor, tmp_path: Path) -> None:
    """Path, text, Pillow image and array of one image give one answer, alone and in a mixed list."""
    image = scene()
    Image.fromarray(image).save(tmp_path / "scene.png")
    sources = [tmp_path / "scene.png", str(tmp_path / "scene.png"), Image.fromarray(image), image]
    expected = predictor(image).labels
    for source in sources:
        np.testing.assert_array_equal(predictor(source).labels, expected)
    for result in predictor(sources):
        np.testing.assert_array_equal(result.labels, expected)


def test_confidence_is_given_when_it_is_asked_for(predictor: Predictor) -> None:
    """The probability of every label, from the very logits; an image that is cut has none, and says so."""
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
    """Images of any sizes in one list, and an image's answer does not depend on its neighbours."""
    photos = [scene(120, 200), scene(60, 61), scene(300, 90)]
    results = predictor(photos)
    assert isinstance(results, list)
    for photo, result in zip(photos, results, strict=True):
        np.testing.assert_array_equal(result.labels, predictor(photo).labels)
    batch = np.stack([scene(), scene()[::-1]])
    assert [result.labels.shape for result in predictor(batch)] == [(120, 200)] * 2
    assert predictor([]) == []


def test_grey_images_are_images(predictor: Predictor) -> None:
    """An H x W array is a grey image, not an error."""
    assert predictor(np.zeros((50, 70), np.uint8)).areas == {"background": 1.0}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_labels_lie_on_the_upright_image(predictor: Predictor, tmp_path: Path, orientation: int, suffix: str) -> None:
    """Telephones store images turned, with a note; labels belong to what the eye sees, for all eight notes."""
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
    """0 is the image (with outlines), 1 the colours."""
    result = predictor(scene())
    inside = (slice(5, 40), slice(5, 30))
    np.testing.assert_array_equal(np.asarray(result.overlay(0, legend=False))[inside], result.image[inside])
    assert (np.asarray(result.overlay(1, legend=False))[inside] == PALETTE[1]).all()
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="alpha must be"):
            result.overlay(alpha)


@pytest.mark.parametrize("size", [(2, 2), (100, 75), (16, 300), (3000, 40), (1400, 1000)])
def test_legend_fits_images_of_any_size(size: tuple[int, int]) -> None:
    """Text stays readable on a thumbnail and grows with a large image; the image is never covered or scaled."""
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
    """The model runs in eval mode during the call, and is in training again after it."""
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
    with pytest.raises(ImageError, match=r"has shape \(120, 200, 3\), and the model takes 4 channels"):
        Predictor(ColorNet(in_chans=4))(scene())


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
    """The published weights on the image of the README: mostly cat."""
    import deeplabzoo

    net = deeplabzoo.load(shared_data / "tflite" / "deeplabv3_mnv2_pascal_quant.tflite")
    cat = Path(__file__).resolve().parents[2] / "docs" / "images" / "cat.jpg"
    result = deeplabzoo.Predictor(net, device="cpu")(cat)
    assert result.labels.shape == (300, 451)
    assert 0.75 < result.areas["cat"] < 0.9
    assert result.areas["cat"] + result.areas["background"] > 0.99


class BinaryNet(ColorNet):
    """A model of one output channel: the logit of a sigmoid, above 0 where red is above one half."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.config = dataclasses.replace(self.config, num_classes=1)
        self.classes, self.palette, self.num_classes = ("background", "red"), PALETTE[:2], 1

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        super().forward_low_resolution(image_BCHW)
        red = image_BCHW[:, :1] * self.preprocessing.std[0] + self.preprocessing.mean[0]
        return 8 * (F.avg_pool2d(red, self.stride, ceil_mode=True) - 0.5)


def test_a_model_of_one_output_channel_is_binary() -> None:
    """Labels are the sigmoid above one half, confidence is its probability, whole and in tiles."""
    net, image = BinaryNet(preprocessing=Preprocessing(size=(129, 129), resize="none")), scene(128, 192)
    result = Predictor(net, "cpu", confidence=True)(image)
    low = net.forward_low_resolution(prepare(image, net.preprocessing).tensor_1CHW)
    logits = F.interpolate(low, size=(128, 192), mode="bilinear").detach()[0, 0].numpy()
    np.testing.assert_array_equal(result.labels, logits > 0)
    assert result.areas["red"] == pytest.approx(0.125, abs=0.001)
    assert result.confidence is not None
    np.testing.assert_allclose(result.confidence, 1 / (1 + np.exp(-np.abs(logits))), atol=1e-5)
    np.testing.assert_allclose(Predictor(net, "cpu").probability(image, "red"), 1 / (1 + np.exp(-logits)), atol=1e-5)
    np.testing.assert_array_equal(Predictor(net, "cpu", tile=64, overlap=32)(image).labels, result.labels)


@pytest.mark.parametrize("names", [None, ["person"], ["street", "person"]])
def test_a_binary_deeplab_has_two_labels_everywhere(names: list[str] | None, tmp_path: Path) -> None:
    """Names, colours, its own predict_labels, the optimized model, the saved file and the score agree about the two labels."""
    import deeplabzoo

    config = DeepLabConfig(architecture="deeplabv3", encoder="resnet18", num_classes=1)
    torch.manual_seed(0)
    net = DeepLab(config, classes=names, preprocessing=Preprocessing(size=(65, 65), resize="none")).eval()
    with torch.no_grad():
        net.head.classifier.bias.fill_(0)
    expected = {None: ("background", "foreground"), "person": ("background", "person")}.get(
        names and names[0], ("street", "person")
    )
    assert net.classes == expected
    assert len(net.palette) == 2
    image = np.random.default_rng(0).integers(0, 256, (65, 65, 3), dtype=np.uint8)
    tensor = prepare(image, net.preprocessing).tensor_1CHW
    labels = net.predict_labels(tensor)[0].numpy()
    np.testing.assert_array_equal(labels, net(tensor)[0, 0].detach().numpy() > 0)
    net.save(tmp_path / "binary.safetensors")
    again = deeplabzoo.load(tmp_path / "binary.safetensors")
    assert again.classes == expected
    for model in (net, net.optimize(), again):
        np.testing.assert_array_equal(Predictor(model, "cpu")(image).labels, labels)
    np.testing.assert_array_equal(net.optimize().predict_labels(tensor)[0].numpy(), labels)
    np.testing.assert_array_equal(ExportModule(net, "argmax")(tensor)[0].numpy(), labels)
    for kind, pixels in (("images", image), ("masks", labels.astype(np.uint8))):
        (tmp_path / "data" / "val" / kind).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "val" / kind / "a.png")
    (tmp_path / "data" / "classes.txt").write_text("\n".join(expected))
    report = deeplabzoo.evaluate(net, "folder", tmp_path / "data", progress=False, device="cpu")
    assert report.scores.pixel_accuracy == 1
    assert report.classes == expected


def test_a_probability_map_is_the_softmax_of_its_class(predictor: Predictor) -> None:
    """By name or number; an unknown class and an image in tiles are sentences."""
    image = scene(151, 233)
    logits = image_logits(predictor.net.eval(), prepare(image, predictor.net.preprocessing))[0].detach()
    for label in ("blue", 3):
        found = predictor.probability(image, label)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, logits.softmax(dim=0)[3].numpy(), atol=1e-5)
    for label in ("cat", 4, -1, None):
        with pytest.raises(UsageError, match="has no class"):
            predictor.probability(image, label)
    with pytest.raises(UsageError, match="cut into tiles; use tile=None"):
        Predictor(ColorNet(), "cpu", tile=64).probability(image, 0)


class ChannelNet(ColorNet):
    """Label 1 where the last of its channels is above one half, whatever the others hold."""

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        self.seen_shapes.append(tuple(image_BCHW.shape))
        mean, std = channel_statistics(self.preprocessing, self.config.in_chans)
        last = (image_BCHW * std + mean)[:, -1:] - 0.5
        return torch.cat([-last, last, last - 9, last - 9], dim=1)


AT_ITS_SIZE = Preprocessing(size=(129, 129), resize="none")


def test_a_model_of_one_channel_gets_grey_values(tmp_path: Path) -> None:
    """A grey array, a grey file and a grey-looking colour file are one image; a colour image is converted as Pillow does."""
    predictor = Predictor(ChannelNet(in_chans=1, preprocessing=AT_ITS_SIZE), "cpu")
    grey = np.zeros((40, 60), np.uint8)
    grey[:20] = 200
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.save(tmp_path / "grey.npy", grey)
    sources = [
        grey,
        grey[..., None],
        np.dstack([grey] * 3),
        tmp_path / "grey.png",
        tmp_path / "grey.npy",
        Image.fromarray(grey),
    ]
    for result in predictor(sources):
        np.testing.assert_array_equal(result.labels, grey > 127)
        assert result.overlay().mode == "RGB"
    assert predictor.net.seen_shapes[0] == (1, 1, 40, 60)
    large = np.kron(grey, np.ones((4, 4), np.uint8))
    in_tiles = Predictor(ChannelNet(in_chans=1, preprocessing=AT_ITS_SIZE), "cpu", tile=64)(large).labels
    np.testing.assert_array_equal(in_tiles, large > 127)


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_model_of_several_channels_gets_arrays_npy_and_tiff(channels: int, dtype: type, tmp_path: Path) -> None:
    """Values arrive as they are, in the model's own mean and std, from contiguous and planar files."""
    mean = tuple(0.1 + 0.01 * index for index in range(channels))
    net = ChannelNet(in_chans=channels, preprocessing=Preprocessing(size=(65, 65), resize="none", mean=mean, std=mean))
    predictor, most = Predictor(net, "cpu"), np.iinfo(dtype).max
    image = np.random.default_rng(channels).integers(0, most + 1, (40, 60, channels)).astype(dtype)
    image[:20, :, -1], image[20:, :, -1] = most, 0
    np.save(tmp_path / "a.npy", image)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig", rowsperstrip=7)
    tifffile.imwrite(tmp_path / "planar.tif", np.moveaxis(image, 2, 0), photometric="minisblack", planarconfig="separate")
    for source in (image, tmp_path / "a.npy", tmp_path / "a.tif", tmp_path / "planar.tif"):
        result = predictor(source)
        np.testing.assert_array_equal(result.labels, image[..., -1] > most // 2)
        assert result.image.shape == (40, 60, 3)
        read, _ = read_input(source, channels)
        np.testing.assert_allclose(read, image / (most / 255), rtol=1e-6)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((40, 60, 3), np.uint8),
        np.zeros((40, 60, 4), np.float32),
        np.zeros((1, 60, 4), np.uint8),
        "three.png",
        "bad.npy",
        "objects.npy",
        "bad.tif",
        "missing.npy",
    ],
    ids=str,
)
def test_what_does_not_fit_four_channels_is_a_sentence(source: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of channels, floats, a line, damaged and missing files; objects are never unpickled."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40)).save("three.png")
    Path("bad.npy").write_bytes(b"\x93NUMPY")
    np.save("objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    Path("bad.tif").write_bytes(b"II*\0words")
    with pytest.raises(ImageError):
        Predictor(ChannelNet(in_chans=4), "cpu")(source)
    with pytest.raises(UsageError, match="Tiles are cut from grey or RGB"):
        Predictor(ChannelNet(in_chans=4), "cpu", tile=64)


def test_an_rgba_image_is_four_channels_for_such_a_model(tmp_path: Path) -> None:
    """The alpha of a PNG is the fourth channel, not transparency."""
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    image[..., 3] = np.where(np.arange(60) < 30, 255, 0)
    Image.fromarray(image).save(tmp_path / "a.png")
    labels = Predictor(ChannelNet(in_chans=4, preprocessing=AT_ITS_SIZE), "cpu")(tmp_path / "a.png").labels
    np.testing.assert_array_equal(labels, image[..., 3] > 127)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrapped_models_are_unwrapped(wrap: Callable[[ColorNet], object], caplog: pytest.LogCaptureFixture) -> None:
    """DataParallel and torch.compile hand over the model inside; that the compiled code is not used is logged."""
    net = ColorNet()
    predictor = Predictor(wrap(net), "cpu")
    assert predictor.net is net
    assert ("engine='compiled'" in caplog.text) == (wrap is not torch.nn.DataParallel)
    np.testing.assert_array_equal(predictor(scene()).labels, Predictor(net, "cpu")(scene()).labels)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("deeplabv3_mobilenetv2_voc", "not the name or path 'deeplabv3_mobilenetv2_voc'"),
        (Path("mine.safetensors"), "not the name or path 'mine.safetensors'"),
        (
            torch.nn.Sequential(DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="resnet18"))),
            "not a Sequential; pass its submodule '0'",
        ),
        (torch.nn.Conv2d(3, 3, 1), "not a Conv2d; build one"),
        ({"state_dict": {}}, "not a dict"),
        (None, "not a NoneType"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_model_is_a_sentence(model: object, said: str) -> None:
    """Each says what was given and how to get a model."""
    with pytest.raises(UsageError, match=said):
        Predictor(model, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_float_types_predict(dtype: torch.dtype) -> None:
    """A model made half or double by its owner is run; its own type is not an error of a layer deep inside."""
    torch.manual_seed(0)
    net = DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="resnet18", num_classes=3), preprocessing=AT_ITS_SIZE).eval()
    expected = Predictor(net, "cpu")(scene(65, 65)).labels
    labels = Predictor(net.to(dtype), "cpu")(scene(65, 65)).labels
    assert (labels == expected).mean() > 0.9


def test_a_classifier_replaced_by_hand_is_refused() -> None:
    """Labels of a 5-class head never get the names of 21 others, in any way of predicting."""
    net = DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="resnet18", num_classes=21), preprocessing=AT_ITS_SIZE).eval()
    net.head.classifier = Classifier(net.head.classifier.in_channels, 5)
    for options in ({}, {"confidence": True}, {"tile": 64}):
        with pytest.raises(UsageError, match=r"reset_classifier\(5"):
            Predictor(net, "cpu", **options)(scene(128, 128))
    other = ColorNet()
    other.config = dataclasses.replace(other.config, num_classes=21)
    for options in ({}, {"confidence": True}, {"tile": 64}):
        with pytest.raises(UsageError, match=r"gives 4 channels, .* 21 classes; .*reset_classifier\(4"):
            Predictor(other, "cpu", **options)(scene(128, 128))


def test_tiles_that_show_objects_at_another_size_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Weights that resize images to 129 pixels see a large image in tiles at its own size: the factor is named, once."""
    predictor = Predictor(ColorNet(), "cpu", tile=128)
    for _ in range(2):
        predictor(scene(516, 516))
    assert caplog.text.count("objects are 4 times as large as the weights expect; scale 0.25") == 1
    caplog.clear()
    Predictor(ColorNet(), "cpu", tile=128, scale=0.25)(scene(516, 516))
    Predictor(ColorNet(preprocessing=AT_ITS_SIZE), "cpu", tile=128)(scene(516, 516))
    assert "objects" not in caplog.text
