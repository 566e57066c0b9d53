"""Evaluation from files to report: known answers, conditions that are named, and a command that fails in sentences."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import deeplabzoo
import deeplabzoo.cli.evaluate
from deeplabzoo.data.classes import subset_note
from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.errors import DataError, UnknownNameError, UnsupportedStrideError, UsageError
from deeplabzoo.evaluation.evaluate import evaluate
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.evaluation.report import Report
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab

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
    with pytest.raises(DataError, match=r"All pixels of these 1 pictures are void \(255\)"):
        evaluate(Threshold(classes=("a", "b", "c")), "folder", tmp_path, progress=False)


def test_the_package_attribute_stays_callable(root: Path) -> None:
    """`import deeplabzoo.cli.evaluate` puts the module over the function of the same name; both must evaluate."""
    assert isinstance(sys.modules["deeplabzoo.cli.evaluate"], ModuleType)
    assert deeplabzoo.cli.evaluate(Threshold(), data="folder", root=root, split="val", progress=False).miou == 1.0


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
    assert values["command"].startswith(f"python -m deeplabzoo.cli.evaluate {checkpoint} --data folder")
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
        [sys.executable, "-m", "deeplabzoo.cli.evaluate", "nonsense"], capture_output=True, text=True, check=False
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
    """173 of VOC's 1449 val pictures are no score on VOC val (asks.md E: incomparable figures side by side)."""
    assert subset_note("voc", "val", 173) == "173-image subset of 1449"
    assert subset_note("voc", "val", 1449) is None
    assert subset_note("folder", "val", 3) is None
