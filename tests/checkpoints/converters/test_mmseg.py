"""mmsegmentation's DeepLabs: recognised, complete, and with the logits of its documented network.

The reference is written out in `mmseg_reference.py`; `test_mmseg_own_code.py` compares with the original code itself.
"""

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.mmseg_reference import Reference
from helpers.parity import random_images, randomised, require_same_logits

import deeplabzoo
from deeplabzoo.checkpoints.converters import find_converter
from deeplabzoo.checkpoints.converters.mmseg import FORMAT_NAME, convert
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab

ROWS = {row.full_name: row for row in released() if row.origin == FORMAT_NAME}
NETWORKS = {replace(row.config, num_classes=7): row for row in ROWS.values()}
"""One row of each arithmetic: the number of classes is none of it."""
FAST = (
    "deeplabv3plus_resnet50c_cityscapes.mmseg_769x769_40k",
    "deeplabv3_resnet18c_cityscapes.mmseg_512x1024_80k",
    "deeplabv3_resnet18_cityscapes.mmseg_769x769_80k",
    "deeplabv3_mobilenetv2_cityscapes.mmseg_512x1024_80k",
)
SLOW = [row.full_name for row in NETWORKS.values() if row.full_name not in FAST]
NOT_IN_THE_FILE = ("output_stride", "atrous_rates", "multi_grid", "multi_grid_halved", "align_corners")


@functools.cache
def reference(config: DeepLabConfig) -> Reference:
    torch.manual_seed(0)
    net = randomised(Reference(config))
    assert isinstance(net, Reference)
    return net


def every_row(fast: tuple[str, ...]) -> list[Any]:
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in ROWS if name not in fast)]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_logits_are_those_of_the_documented_model(name: str) -> None:
    """In the configuration of the row, at an even and an odd size; the auxiliary head's too where it is kept."""
    config = ROWS[name].config
    theirs = reference(config)
    ours = DeepLab.from_weights(config, convert(theirs.state_dict(), Path("random.pth")).state_dict)
    for height, width in ((64, 96), (97, 65)):
        image_BCHW = random_images(1, (height, width), seed=height)
        with torch.inference_mode():
            require_same_logits(ours(image_BCHW), theirs(image_BCHW))
            if ours.aux_head is not None:
                low = ours.aux_head(ours.encoder(image_BCHW)[ours.feature_plan.auxiliary])
                require_same_logits(low, theirs.auxiliary_head(theirs.backbone(image_BCHW)[-2]))


@pytest.mark.parametrize(
    "name",
    every_row(
        (
            "deeplabv3plus_resnet101c_cityscapes.mmseg_d16_mg124_512x1024_80k",
            "deeplabv3plus_resnet18c_potsdam.mmseg_512x512_80k",
            "deeplabv3plus_resnest101e_ade20k.mmseg_512x512_160k",
            "deeplabv3_resnet101c_pascalcontext59.mmseg_480x480_80k",
            "deeplabv3plus_mobilenetv2_cityscapes.mmseg_512x1024_80k",
        )
    ),
)
def test_a_file_of_the_rows_layout_is_complete(name: str) -> None:
    """Nothing is missing or left over in the network of the row, and the file alone tells all that tensors can tell."""
    row = ROWS[name]
    with torch.device("meta"):
        tensors = Reference(row.config).state_dict()
        expected = {key: one.shape for key, one in DeepLab(row.config).state_dict().items()}
    layout = find_converter(tensors)
    assert layout is not None
    assert row.origin == layout.FORMAT_NAME
    converted = layout.convert(tensors, Path("layout.pth"))
    assert {key: one.shape for key, one in converted.state_dict.items()} == expected
    assert converted.config is not None
    unknown = {field: getattr(row.config, field) for field in NOT_IN_THE_FILE}
    assert replace(converted.config, **unknown) == row.config
    assert str(row.source).endswith(f"-{row.sha256_prefix}.pth")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deeplabv3_mobilenetv2_cityscapes.mmseg_512x1024_80k", {"encoder_dilates": "all"}),
        ("deeplabv3_mobilenetv2_cityscapes.mmseg_512x1024_80k", {"encoder_dilate_strided": False}),
        ("deeplabv3_resnet18c_cityscapes.mmseg_512x1024_80k", {"encoder_dilates": "all"}),
        ("deeplabv3_resnet18_cityscapes.mmseg_769x769_80k", {"align_corners": False}),
    ],
)
def test_each_of_its_quirks_moves_the_logits(name: str, change: dict[str, Any]) -> None:
    """A converter that renames alone is quietly wrong: its tensors fit timm's own network just as well."""
    config = ROWS[name].config
    theirs = reference(config)
    state = convert(theirs.state_dict(), Path("random.pth")).state_dict
    image_BCHW = random_images(1, (64, 96))
    with torch.inference_mode():
        expected = theirs(image_BCHW)
        moved = DeepLab.from_weights(replace(config, **change), state)(image_BCHW) - expected
    assert float(moved.abs().max()) / float(expected.std()) > 1e-2


class Published:
    """The file of a row, as mmcv wrote them: a dict of facts beside the tensors."""

    def __init__(self, row: WeightRow, folder: Path) -> None:
        self.net = reference(row.config)
        self.path = folder / "published.pth"
        meta = {"mmseg_version": "0.5.0+", "CLASSES": ("road", "sidewalk"), "PALETTE": [[128, 64, 128]], "config": "model = …"}
        torch.save({"meta": meta, "state_dict": self.net.state_dict()}, self.path)


def test_a_name_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """`create(name, pretrained=True)` gives the reference's logits from a file as it is published; strides move back."""
    name = "deeplabv3plus_mobilenetv2_cityscapes"
    row = next(row for row in ROWS.values() if row.name == name and row.default)
    published = Published(row, tmp_path)
    monkeypatch.setattr("deeplabzoo.hub.factory.fetch", {row: published.path}.__getitem__)
    net = deeplabzoo.create(name, pretrained=True)
    assert "(mmsegmentation layout, sha256 " in caplog.messages[-1]
    assert (net.classes[13], net.preprocessing.size, net.output_stride) == ("car", (1024, 2048), 8)
    image_BCHW = random_images(1, (65, 97))
    with torch.inference_mode():
        require_same_logits(net(image_BCHW), published.net(image_BCHW))
        before = net(image_BCHW)
        net.set_output_stride(16)
        assert not torch.equal(net(image_BCHW), before)
        net.set_output_stride(8)
        assert torch.equal(net(image_BCHW), before)


def test_a_bare_state_dict_reports_what_was_assumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = ROWS["deeplabv3_mobilenetv2_cityscapes.mmseg_512x1024_80k"]
    net = deeplabzoo.load(Published(row, tmp_path).path)
    assert net.classes[0] == "road"
    for phrase in (
        "mmsegmentation layout",
        "auxiliary head (its width has no equivalent) dropped",
        "output stride 8",
        "CITYSCAPES",
    ):
        assert phrase in caplog.messages[-1]


class HistoryBuffer:
    """What mmengine's log of losses pickles as: an array, and a bound method found by `getattr`."""

    def __init__(self) -> None:
        self.values = np.arange(3.0)
        self.statistics = {"mean": self.mean}

    def mean(self) -> float:
        return float(self.values.mean())


def test_a_training_scripts_file_is_read_without_its_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine's own checkpoints hold its log (numpy arrays, bound methods): it is skipped, and none of its code is called."""
    name = "mmengine.logging.history_buffer"
    net = reference(ROWS["deeplabv3_mobilenetv2_cityscapes.mmseg_512x1024_80k"].config)
    with monkeypatch.context() as patch:
        for parent in ("mmengine", "mmengine.logging", name):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        patch.setattr(sys.modules[name], "HistoryBuffer", HistoryBuffer, raising=False)
        patch.setattr(HistoryBuffer, "__module__", name)
        hub = {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"iter": 3, "best": np.float64(0.7)}}
        torch.save({"meta": {"iter": 3}, "state_dict": net.state_dict(), "message_hub": hub}, tmp_path / "iter_3.pth")
    assert name not in sys.modules
    assert deeplabzoo.load(tmp_path / "iter_3.pth").num_classes == 19


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda name: name.replace("backbone.stem.", "backbone.patch_embed."), "on an encoder that has no equivalent here"),
        (lambda name: name.replace("layer3.5.", "layer2.5."), "on an encoder that has no equivalent here"),
        (lambda name: name.replace("layer2.3.", "layer5.3."), "tensor 'backbone.layer5.3.conv1.weight' that its layout"),
        (lambda name: name.replace("c1_bottleneck", "c2_bottleneck"), r"neither its DeepLabV3 nor its DeepLabV3\+"),
        (lambda name: name.replace("image_pool.1", "image_pool.2"), "tensor 'decode_head.image_pool.2.conv.weight' that its"),
    ],
)
def test_other_models_are_refused_in_a_sentence(change: Callable[[str], str], sentence: str) -> None:
    config = ROWS["deeplabv3plus_resnet50c_cityscapes.mmseg_512x1024_80k"].config
    with torch.device("meta"):
        tensors = {change(name): one for name, one in Reference(config).state_dict().items()}
    with pytest.raises(WeightsError, match=sentence):
        convert(tensors, Path("other.pth"))


def test_its_other_heads_are_not_taken_for_a_deeplab() -> None:
    """An FCN or a PSPNet has no `aspp_modules`."""
    config = ROWS["deeplabv3plus_resnet50c_cityscapes.mmseg_512x1024_80k"].config
    with torch.device("meta"):
        names = [name for name in Reference(config).state_dict() if ".aspp_modules." not in name]
    assert find_converter(names) is None


def test_options_of_its_encoders_are_refused_elsewhere() -> None:
    """A field that would change nothing is a mistake of the caller's."""
    for config in (
        DeepLabConfig(architecture="deeplabv3", encoder="resnet50", encoder_dilates="first_convs"),
        DeepLabConfig(architecture="deeplabv3", encoder="resnet18", encoder_dilates="first_blocks"),
    ):
        with pytest.raises(UsageError, match="leave it 'all'"):
            DeepLab(config)
    with pytest.raises(UsageError, match="no whole dilations at output stride 32"):
        DeepLab(
            DeepLabConfig(
                architecture="deeplabv3", encoder="resnet50", output_stride=32, multi_grid=(1, 2, 4), multi_grid_halved=True
            )
        )
