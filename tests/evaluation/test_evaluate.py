"""Evaluation from files to report: known answers, conditions that are named, and a command that fails in sentences."""

import dataclasses
import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import deeplabzoo
import deeplabzoo.cli.evaluate
from deeplabzoo.data.classes import subset_note
from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.device import eval_mode
from deeplabzoo.errors import DataError, UnknownNameError, UnsupportedStrideError, UsageError
from deeplabzoo.evaluation.evaluate import evaluate, evaluate_images
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.evaluation.report import Report
from deeplabzoo.inference import tiling
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.processing import postprocessing
from deeplabzoo.processing.preprocessing import image_logits, prepare

AS_IT_IS = Preprocessing(size=(65, 65), resize="none", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Threshold(DeepLab):
    """A real network whose logits are replaced by a known rule: class 1 where the picture's red is above one half."""

    def __init__(self, output_stride: int = 16, classes: tuple[str, ...] = ("dark", "bright")) -> None:
        config = DeepLabConfig(
            architecture="deeplabv3", encoder="resnet18", num_classes=len(classes), output_stride=output_stride, head_channels=8
        )
        super().__init__(config, classes=classes, preprocessing=AS_IT_IS)
        self.strides_seen: list[int] = []
        self.flags_seen: list[bool] = []

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        self.strides_seen.append(self.output_stride)
        self.flags_seen.append(self.training)
        bright = (image_BCHW[:, 0] - 0.5) * 100
        others = [torch.full_like(bright, -1000.0)] * (self.num_classes - 2)
        return torch.stack([-bright, bright, *others], dim=1)


class Constant(Threshold):
    """Says class 0 everywhere."""

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(image_BCHW.shape[0], self.num_classes, *image_BCHW.shape[2:])
        logits[:, 0] = 1
        return logits


def make_data(home: Path, sizes: tuple[tuple[int, int], ...] = ((40, 60), (51, 35), (64, 64))) -> None:
    """Pictures whose bright right third is labelled 1, a void line between, and 0 on the left."""
    for index, (height, width) in enumerate(sizes):
        labels = np.zeros((height, width), np.uint8)
        third = 2 * width // 3
        labels[:, third:] = 1
        image = np.repeat((labels * 255)[..., None], 3, axis=2)
        labels[:, third - 2 : third + 2] = 255
        for kind, pixels in (("images", image), ("masks", labels)):
            (home / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(home / kind / f"p{index}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_data(tmp_path / "data" / "val")
    (tmp_path / "data" / "classes.txt").write_text("dark\nbright\n")
    return tmp_path / "data"


def test_a_perfect_predictor_scores_one(root: Path) -> None:
    report = evaluate(Threshold(), "folder", root, progress=False)
    assert (report.miou, report.pixel_accuracy, report.dice) == (1.0, 1.0, 1.0)
    assert report.per_class == {"dark": 1.0, "bright": 1.0}
    assert (report.images, report.subset, report.absent_classes) == (3, None, ())


def test_a_constant_predictor_scores_what_the_areas_say(root: Path) -> None:
    """IoU of the class named everywhere is its share of the scored pixels, and the other's is 0."""
    dark = 40 * 38 + 51 * 21 + 64 * 40
    bright = 40 * 18 + 51 * 10 + 64 * 20
    report = evaluate(Constant(), "folder", root, progress=False)
    share = dark / (dark + bright)
    assert report.confusion_matrix == ((dark, 0), (bright, 0))
    assert report.per_class == {"dark": pytest.approx(share), "bright": 0.0}
    assert report.miou == pytest.approx(share / 2)
    assert report.pixel_accuracy == pytest.approx(share)


def test_labels_keep_their_own_resolution(root: Path) -> None:
    """Deformable-ConvNets#255, torchvision: resizing the truth changes the question. Every labelled pixel is counted, once."""
    net = Threshold()
    net.preprocessing = Preprocessing(size=(33, 33), mean=(0.0,) * 3, std=(1.0,) * 3)
    report = evaluate(net, "folder", root, progress=False)
    assert sum(map(sum, report.confusion_matrix)) == 40 * 56 + 51 * 31 + 64 * 60
    assert report.miou > 0.9


def test_voc_and_camvid_layouts_are_evaluated(tmp_path: Path) -> None:
    for name, images, masks, split in (
        ("voc", "VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/SegmentationClass", "val"),
        ("camvid", "test", "testannot", "test"),
    ):
        home = tmp_path / name
        make_data(home / "made")
        for kind, folder in (("images", images), ("masks", masks)):
            (home / folder).parent.mkdir(parents=True, exist_ok=True)
            (home / "made" / kind).rename(home / folder)
        (home / "ImageSets").mkdir()
        lists = home / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("p0\np1\np2\n")
        data = build_dataset(name, home, split)
        report = evaluate(Threshold(classes=data.classes), name, home, split, progress=False)
        assert report.miou == 1.0
        assert len(report.absent_classes) == len(data.classes) - 2
        assert report.per_class[data.classes[5]] is None


def test_scales_and_flip_average_probabilities(root: Path) -> None:
    """DeepLabV3 (section 4.1) averages; a network that answers by position would show where a flip is not undone."""

    class RightHalf(Threshold):
        def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
            here = torch.linspace(-1, 1, image_BCHW.shape[3]).expand(image_BCHW[:, 0].shape)
            return torch.stack([-here, here], dim=1)

    plain = evaluate(Threshold(), "folder", root, scales=(0.75, 1.0, 1.25), flip=True, progress=False)
    assert plain.miou > 0.95
    assert (plain.protocol.scales, plain.protocol.flip) == ((0.75, 1.0, 1.25), True)
    assert str(plain.protocol).startswith("scales 0.75, 1, 1.25, flip, output stride 16")
    once = evaluate(RightHalf(), "folder", root, progress=False)
    assert once.confusion_matrix[1][0] == 0
    mirrored = evaluate(RightHalf(), "folder", root, flip=True, progress=False)
    assert mirrored.confusion_matrix != once.confusion_matrix


def test_one_scale_with_probabilities_equals_one_without(root: Path) -> None:
    """The short cut for a single pass and the averaging path are one measurement."""
    torch.manual_seed(0)
    net = DeepLab(
        DeepLabConfig(architecture="deeplabv3", encoder="resnet18", num_classes=2, head_channels=8), preprocessing=AS_IT_IS
    )
    short = evaluate(net, "folder", root, progress=False)
    long = evaluate(net, "folder", root, scales=(1.0, 1.0), progress=False)
    assert short.confusion_matrix == long.confusion_matrix


def test_output_stride_is_switched_and_given_back(root: Path) -> None:
    net = Threshold()
    parameters = [id(parameter) for parameter in net.parameters()]
    net.train()
    net.head.eval()
    report = evaluate(net, "folder", root, output_stride=8, progress=False)
    assert net.strides_seen == [8, 8, 8]
    assert net.flags_seen == [False] * 3
    assert (report.protocol.output_stride, net.output_stride) == (8, 16)
    assert [id(parameter) for parameter in net.parameters()] == parameters
    assert (net.training, net.encoder.training, net.head.training) == (True, True, False)


def test_a_failure_half_way_gives_the_model_back(root: Path) -> None:
    Image.fromarray(np.full((51, 35), 9, np.uint8)).save(root / "val" / "masks" / "p1.png")
    net = Threshold().train()
    with pytest.raises(DataError, match=r"p1\.png' has label value 9 in 1785 pixels; expected 0\.\.1 or 255"):
        evaluate(net, "folder", root, output_stride=8, progress=False)
    assert (net.output_stride, net.training) == (16, True)


def test_a_limited_evaluation_is_reported_as_one(root: Path) -> None:
    report = evaluate(Threshold(), "folder", root, limit=2, progress=False)
    assert (report.images, report.subset) == (2, "the first 2 of 3 images")
    assert "the first 2 of 3 images" in report.table()
    assert report.image_list_sha256 == hashlib.sha256(b"p0\np1\n").hexdigest()
    assert evaluate(Threshold(), "folder", root, limit=7, progress=False).subset is None


def test_the_report_names_every_condition(root: Path) -> None:
    """VainF#34, jfzhang95#84: a number without its protocol sends its readers to another repository."""
    net = Threshold()
    net.weights_source = {"name": "deeplabv3_resnet18_mine", "tag": "first", "sha256": "a" * 64, "source": "here"}
    values = json.loads(json.dumps(evaluate(net, "folder", root, progress=False).to_dict(), allow_nan=False))
    assert values["model"] == "deeplabv3_resnet18_mine"
    assert (values["weights"]["sha256"], values["weights"]["tag"]) == ("a" * 64, "first")
    assert (values["data"], values["split"], values["images"], values["subset"]) == ("folder", "val", 3, None)
    assert values["protocol_settings"] | {"miou": ""} == {
        "scales": [1.0],
        "flip": False,
        "output_stride": 16,
        "resize": "none",
        "size": [65, 65],
        "pad": False,
        "ignore_index": 255,
        "tiles": None,
        "label_resolution": "original",
        "miou": "",
    }
    assert set(values["versions"]) == {"deeplabzoo", "torch", "timm"}
    assert set(values["hardware"]) >= {"device", "cpu", "threads"}
    matrix = ConfusionMatrix(2)
    matrix.counts += np.array(values["confusion_matrix"])
    assert matrix.scores().miou == values["miou"]
    assert values["date"].endswith("+00:00")


def test_the_tensors_hash_follows_the_numbers_and_nothing_else(root: Path, tmp_path: Path) -> None:
    first = Threshold()
    second = Threshold()
    hashes = [evaluate(net, "folder", root, limit=1, progress=False).weights["tensors_sha256"] for net in (first, second)]
    assert hashes[0] != hashes[1]
    second.load_state_dict(first.state_dict())
    report = evaluate(second, "folder", root, limit=1, progress=False)
    assert report.weights["tensors_sha256"] == report.weights_sha256 == hashes[0]


def test_settings_that_make_no_sense_give_a_sentence(root: Path) -> None:
    net = Threshold()
    with pytest.raises(UsageError, match="scales must be numbers above 0"):
        evaluate(net, "folder", root, scales=(1.0, -1.0))
    with pytest.raises(UsageError, match="scales must be"):
        evaluate(net, "folder", root, scales=())
    with pytest.raises(UsageError, match="limit must be at least 1"):
        evaluate(net, "folder", root, limit=0)
    with pytest.raises(UsageError, match="needs root="):
        evaluate(net, "folder")
    with pytest.raises(UnknownNameError, match="Did you mean 'folder'"):
        evaluate(net, "foldr", root)
    with pytest.raises((UsageError, UnsupportedStrideError)):
        evaluate(net, "folder", root, output_stride=7, progress=False)
    with pytest.raises(UsageError, match="device"):
        evaluate(net, "folder", root, device="toaster")


def test_a_model_of_other_classes_is_refused(root: Path) -> None:
    with pytest.raises(UsageError, match="The model has 3 classes but folder val has 2"):
        evaluate(Threshold(classes=("a", "b", "c")), "folder", root)


def test_other_class_names_are_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate(Threshold(classes=("dark", "light")), "folder", root, limit=1, progress=False)
    assert "first 'light' in the model and 'bright' in the data" in caplog.text


def test_a_model_that_sees_one_class_everywhere_is_suspected(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """tensorflow/models#3739, #9844: black masks with a fine score; somebody must say so."""
    evaluate(Constant(), "folder", root, progress=False)
    assert "100.0 % of all predictions are 'dark', which has 67.2 %" in caplog.text


def test_all_void_is_no_score(tmp_path: Path) -> None:
    make_data(tmp_path / "val", ((40, 40),))
    Image.fromarray(np.full((40, 40), 255, np.uint8)).save(tmp_path / "val" / "masks" / "p0.png")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"All pixels of these 1 images are void \(255\)"):
        evaluate(Threshold(classes=("a", "b", "c")), "folder", tmp_path, progress=False)


def test_the_package_attribute_stays_callable(root: Path) -> None:
    """`deeplabzoo.evaluate` is the function, also after the command of that name was imported."""
    importlib.import_module("deeplabzoo.evaluate")
    assert deeplabzoo.evaluate(Threshold(), data="folder", root=root, split="val", progress=False).miou == 1.0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = DeepLabConfig(architecture="deeplabv3", encoder="resnet18", num_classes=2, head_channels=8)
    path = tmp_path / "mine.safetensors"
    DeepLab(config, classes=("dark", "bright"), preprocessing=AS_IT_IS).save(path)
    return path


def call(*words: object) -> int:
    return sys.modules["deeplabzoo.cli.evaluate"].main([str(word) for word in words])


def again_of(checkpoint: Path, root: Path) -> Report:
    return evaluate(deeplabzoo.load(checkpoint), "folder", root, progress=False)


def test_the_command_prints_a_table_and_writes_json(
    root: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out" / "report.json"
    options = ("--data", "folder", "--root", root, "--split", "val", "--json", target)
    assert call(checkpoint, *options) == 0
    out = capsys.readouterr().out
    values = json.loads(target.read_text(encoding="utf-8"))
    assert values.keys() == again_of(checkpoint, root).to_dict().keys()
    assert f"mIoU {100 * values['miou']:.2f} %" in out
    assert "\x1b" not in out
    assert 0 <= values["miou"] <= 1
    assert set(values["per_class"]) == {"dark", "bright"}
    assert values["weights"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert values["command"].startswith(f"python -m deeplabzoo.evaluate {checkpoint} --data folder")
    assert [path.name for path in target.parent.iterdir()] == ["report.json"]
    assert again_of(checkpoint, root).miou == values["miou"]


def test_the_command_fails_in_one_sentence(
    root: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2 where the call was wrong, 1 where the work failed; never a traceback, never a report that is not one."""
    data = ("--data", "folder", "--root", root)
    folder = tmp_path / "folder"
    folder.mkdir()
    for status, words, said in [
        (2, (), "MODEL"),
        (2, ("deeplabv3_resnet18_vok", *data), "vok"),
        (2, (checkpoint, "--data", "camvit", "--root", root), "Did you mean 'camvid'"),
        (2, (checkpoint, *data, "--output-stride", "9"), "--output-stride"),
        (2, (checkpoint, *data, "--weights", "coral"), "leave --weights out"),
        (2, (checkpoint, *data, "--scales", "0"), "scales must be"),
        (2, (checkpoint, *data, "--spilt", "val"), "--split"),
        (1, (checkpoint, *data, "--split", "test"), "splits in"),
        (1, (checkpoint, "--data", "voc", "--root", root), "is not VOC 2012"),
        (1, (checkpoint, *data, "--json", folder), "is a folder"),
        (1, (checkpoint, *data, "--json", checkpoint / "report.json"), "annot write"),
    ]:
        assert call(*words) == status, words
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("error: "), words
        assert said in err, words
    assert list(folder.iterdir()) == []


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deeplabzoo.evaluate", "nonsense"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_published_weights_measure_what_an_independent_runtime_measures(shared_data: Path, tmp_path: Path) -> None:
    """The TFLite runtime scored 72.40 % on these 173 pictures; our network from the same file must be within half a point."""
    weights = shared_data / "tflite" / "deeplabv3_mnv2_pascal_quant.tflite"
    target = tmp_path / "report.json"
    root = shared_data / "voc2012_subset"
    name = "deeplabv3_mobilenetv2_voc"
    assert call(name, "--weights", weights, "--data", "voc", "--root", root, "--split", "val", "--json", target) == 0
    values = json.loads(target.read_text(encoding="utf-8"))
    assert values["images"] == 173
    assert values["miou"] == pytest.approx(0.7240, abs=0.005)
    assert values["pixel_accuracy"] == pytest.approx(0.934, abs=0.005)


def test_a_part_of_a_published_split_is_called_a_subset() -> None:
    """173 of VOC's 1449 val pictures are no score on VOC val."""
    assert subset_note("voc", "val", 173) == "173-image subset of 1449"
    assert subset_note("voc", "val", 1449) is None
    assert subset_note("folder", "val", 3) is None


def random_model(num_classes: int = 2, *, resize: str = "none") -> DeepLab:
    torch.manual_seed(0)
    config = DeepLabConfig(architecture="deeplabv3plus", encoder="lcnet_050", num_classes=num_classes, head_channels=8)
    preprocessing = Preprocessing(size=(65, 65), resize=resize, pad=False)  # type: ignore[arg-type]
    net = DeepLab(config, preprocessing=preprocessing).eval()
    torch.nn.init.normal_(net.head.classifier.weight, std=5.0)
    return net


@pytest.mark.parametrize("resize", ["none", "longest"])
@pytest.mark.parametrize("settings", [{}, {"tile": 96}, {"tile": (128, 96), "overlap": 32, "scale": 0.5}, {"tile": None}])
def test_images_are_cut_exactly_where_predict_cuts_them(
    root: Path, monkeypatch: pytest.MonkeyPatch, resize: str, settings: dict[str, Any]
) -> None:
    """Tiles change labels, so a score of uncut images would be of other labels; the report says how they were cut."""
    monkeypatch.setattr(tiling, "AUTO_PIXELS", 5000)
    monkeypatch.setattr(tiling, "TILE", 96)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (200, 150, 3), np.uint8)).save(root / "val" / "images" / "p0.png")
    Image.fromarray(rng.integers(0, 2, (200, 150), np.uint8)).save(root / "val" / "masks" / "p0.png")
    net = random_model(resize=resize)
    predictor = Predictor(net, engine="torch", **settings)
    found: dict[str, np.ndarray] = {}
    report = evaluate(
        net, "folder", root, progress=False, seen=lambda sample, labels: found.update({sample.name: labels}), **settings
    )
    for name, labels in found.items():
        np.testing.assert_array_equal(labels, predictor(root / "val" / "images" / f"{name}.png").labels)
    cut = settings.get("tile", "auto") not in ("auto", None) or ("tile" not in settings and resize == "none")
    assert (report.protocol.tiles is not None) == cut
    assert ("tiles of" in str(report.protocol)) == cut


def test_tiles_and_averaging_exclude_each_other(root: Path) -> None:
    with pytest.raises(UsageError, match="Tiles are evaluated in a single pass"):
        evaluate(Threshold(), "folder", root, tile=96, flip=True)


@pytest.mark.parametrize("resize", ["none", "longest"])
def test_the_loop_measures_loss_without_full_size_logits(root: Path, monkeypatch: pytest.MonkeyPatch, resize: str) -> None:
    """In bands of a few rows, labels, loss and number of pixels are those of the whole logits."""
    net = random_model(3, resize=resize)
    (root / "classes.txt").write_text("a\nb\nc\n")
    data = build_dataset("folder", root, "val")
    expected, pixels = 0.0, 0
    labels: list[np.ndarray] = []
    with eval_mode(net):
        for index in range(len(data)):
            sample = data[index]
            logits = image_logits(net, prepare(sample.image, net.preprocessing))
            truth = torch.from_numpy(sample.labels.astype(np.int64))[None]
            expected += float(torch.nn.functional.cross_entropy(logits, truth, ignore_index=255, reduction="sum"))
            pixels += int((truth != 255).sum())
            labels.append(logits[0].argmax(0).numpy())
        monkeypatch.setattr(postprocessing, "BAND_VALUES", 3 * 64 * 4)
        seen: list[np.ndarray] = []
        sums = evaluate_images(net, data, range(3), with_loss=True, seen=lambda _, predicted: seen.append(predicted))
    assert sums.loss == pytest.approx(expected, rel=1e-5)
    assert sums.loss_pixels == pixels
    for ours, theirs in zip(seen, labels, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_model_of_one_sigmoid_channel_is_scored_as_background_and_foreground(root: Path) -> None:
    """Its arg-max is 0 everywhere; its sign is the label."""

    class Sigmoid(Threshold):
        def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
            return (image_BCHW[:, :1] - 0.5) * 100

    net = Sigmoid(classes=("bright",))
    for settings in ({}, {"flip": True}, {"engine": None}):
        assert evaluate(net, "folder", root, progress=False, **settings).miou == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrapped_models_are_unwrapped(root: Path, wrapper: Any) -> None:
    assert evaluate(wrapper(Threshold()), "folder", root, progress=False).miou == 1.0


def test_a_file_and_a_half_precision_model_are_evaluated(root: Path, checkpoint: Path) -> None:
    """A name or a file in place of a model; a model in another float type without a backend."""
    whole = evaluate(checkpoint, "folder", root, progress=False)
    assert whole.weights["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for dtype in (torch.bfloat16, torch.float64):
        net = deeplabzoo.load(checkpoint).to(dtype)
        assert evaluate(net, "folder", root, progress=False, engine=None).miou == pytest.approx(whole.miou, abs=0.1)


@pytest.mark.parametrize(
    ("net", "data", "sentence"),
    [
        (torch.nn.Linear(1, 1), "folder", "evaluate takes a DeepLab model.*, not Linear"),
        (None, "folder", "not NoneType"),
        ("model", torch.utils.data.TensorDataset(torch.zeros(1)), "not TensorDataset .it has no classes"),
        ("model", [1, 2], "not list"),
        ("model", 3, "not int"),
    ],
)
def test_other_kinds_of_models_and_data_are_one_sentence(root: Path, net: Any, data: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        evaluate(Threshold() if net == "model" else net, data, root, progress=False)


def test_models_of_other_channels_are_one_sentence(root: Path) -> None:
    net = Threshold()
    net.config = dataclasses.replace(net.config, in_chans=4)
    with pytest.raises(UsageError, match="takes 4 channels"):
        evaluate(net, "folder", root, progress=False)


def test_an_ignored_class_is_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`ignore_index` of a dataset may be one of its classes; then that class is not scored, which is said."""
    data = dataclasses.replace(build_dataset("folder", root, "val"), ignore_index=0, label_map={0: 0, 1: 1, 255: 0})  # type: ignore[type-var]
    report = evaluate(Threshold(), data, progress=False)
    assert report.per_class["dark"] is None
    assert "label 0 is both the class 'dark' and the ignored label" in caplog.text
