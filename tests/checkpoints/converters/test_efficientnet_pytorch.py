"""Encoders from files in the layout of EfficientNet-PyTorch, against its documented forward pass written out with its names.

That package is not installed, so the reference was written from the papers' tables (1905.11946, table 1, and the Lite variants:
no squeeze and excitation, ReLU6, first and last stage of one width) and from the layout's tensor names and shapes.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.parity import random_images, randomised, require_same_logits
from torch import Tensor, nn

import deeplabzoo
from deeplabzoo.checkpoints.converters import find_converter
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.errors import WeightsError
from deeplabzoo.hub.factory import load_encoder
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.initialization import build_model
from deeplabzoo.training.recipe import ModelOptions, Recipe

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride, expansion and output channels of B0's and Lite0's stages."""
LITE2 = (
    (1, 3, 1, 1, 16),
    (3, 3, 2, 6, 24),
    (3, 5, 2, 6, 48),
    (4, 3, 2, 6, 88),
    (4, 5, 1, 6, 120),
    (5, 5, 2, 6, 208),
    (1, 3, 1, 6, 352),
)


def same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve with TensorFlow's 'SAME' padding: what is missing on both sides together, the larger half behind."""
    pads: list[int] = []
    for side, kernel, stride in zip(reversed(x.shape[-2:]), reversed(conv.kernel_size), reversed(conv.stride), strict=True):
        missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.conv2d(F.pad(x, pads), conv.weight, conv.bias, conv.stride, groups=conv.groups)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """One inverted residual of the layout; without expansion there are no `_expand_conv` and `_bn0`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, lite: bool) -> None:
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = norm(width)
        if not lite:
            squeezed = max(1, inputs // 4)
            self._se_reduce, self._se_expand = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)
        self._project_conv, self._bn2 = nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)
        self.act = nn.ReLU6() if lite else nn.SiLU()
        self.expanded, self.lite, self.shortcut = expansion > 1, lite, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self._bn0(self._expand_conv(x))) if self.expanded else x
        y = self.act(self._bn1(same(y, self._depthwise_conv)))
        if not self.lite:
            y = y * self._se_expand(self.act(self._se_reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        y = self._bn2(self._project_conv(y))
        return x + y if self.shortcut else y


class Reference(nn.Module):
    """The whole classifier; its forward pass ends with the last block, where an encoder ends."""

    def __init__(
        self, stages: Sequence[tuple[int, int, int, int, int]] = STAGES, *, lite: bool = True, in_chans: int = 3
    ) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(in_chans, 32, 3, 2, bias=False), norm(32)
        blocks: list[nn.Module] = []
        inputs = 32
        for count, kernel, stride, expansion, outputs in stages:
            for index in range(count):
                blocks.append(Block(inputs, outputs, kernel, stride if index == 0 else 1, expansion, lite))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1, self._fc = nn.Conv2d(inputs, 1280, 1, bias=False), norm(1280), nn.Linear(1280, 10)
        self.act = nn.ReLU6() if lite else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._blocks(self.act(self._bn0(same(x, self._conv_stem))))
        return y


def reference(stages: Sequence[tuple[int, int, int, int, int]] = STAGES, *, lite: bool = True, in_chans: int = 3) -> Reference:
    torch.manual_seed(0)
    net = randomised(Reference(stages, lite=lite, in_chans=in_chans))
    assert isinstance(net, Reference)
    return net


def saved(net: nn.Module, path: Path) -> Path:
    """Write the tensors in a shuffled order: only names may count."""
    tensors = list(net.state_dict().items())
    random.Random(0).shuffle(tensors)
    torch.save(dict(tensors), path)
    return path


@torch.no_grad()
def require_same_features(net: DeepLab, theirs: nn.Module, hw: tuple[int, int], channels: int = 3) -> None:
    image = random_images(2, hw, channels=channels)
    net.eval()  # a new head is there to be trained, so `create` returns the model in training mode
    require_same_logits(net.encoder(image)[-1], theirs(image))


@pytest.mark.parametrize(
    ("encoder", "stages", "lite"),
    [("tf_efficientnet_lite0", STAGES, True), ("tf_efficientnet_lite2", LITE2, True), ("tf_efficientnet_b0", STAGES, False)],
)
def test_the_encoder_computes_what_the_layouts_model_does(
    encoder: str, stages: Sequence[tuple[int, int, int, int, int]], lite: bool, tmp_path: Path
) -> None:
    """At even and odd sides, with the epsilon and the padding of the weights' origin; the classifier is left out and logged."""
    theirs = reference(stages, lite=lite)
    net = deeplabzoo.create(
        f"deeplabv3plus_{encoder}", encoder_pretrained=saved(theirs, tmp_path / "file.pth"), output_stride=32
    )
    require_same_features(net, theirs, (96, 130))
    require_same_features(net, theirs, (97, 65))
    assert net.preprocessing.mean == ((0.5, 0.5, 0.5) if lite else (0.485, 0.456, 0.406))


def test_symmetric_padding_is_equal_where_no_side_is_even_at_any_stride(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """efficientnet_lite0 has timm's own epsilon, for which its running variances compensate; the log line names the change."""
    theirs = reference()
    with caplog.at_level("INFO"):
        net = deeplabzoo.create(
            "deeplabv3plus_efficientnetlite0", encoder_pretrained=saved(theirs, tmp_path / "file.pth"), output_stride=32
        )
    assert net.config.encoder == "efficientnet_lite0"
    require_same_features(net, theirs, (97, 129))
    image = random_images(1, (96, 128))
    with torch.no_grad():
        ours_BCHW, theirs_BCHW = net.encoder(image)[-1], theirs(image)
    assert float((ours_BCHW - theirs_BCHW).abs().max()) > 0.1 * float(theirs_BCHW.std())
    assert "padding of tf_efficientnet_lite0 replaced by symmetric padding" in caplog.text


def test_the_last_convolution_is_loaded_where_the_config_has_it(tmp_path: Path) -> None:
    theirs = reference()
    net = DeepLab(DeepLabConfig(architecture="deeplabv3plus", encoder="tf_efficientnet_lite0", encoder_final_conv=True)).eval()
    assert load_encoder(net, saved(theirs, tmp_path / "file.pth")).endswith(" (classifier dropped)")
    assert torch.equal(net.encoder.state_dict()["conv_head.weight"], theirs.state_dict()["_conv_head.weight"])
    assert torch.equal(net.encoder.state_dict()["bn2.running_var"], theirs.state_dict()["_bn1.running_var"])


def test_other_input_channels_are_no_other_encoder(tmp_path: Path) -> None:
    theirs = reference(in_chans=4)
    path = saved(theirs, tmp_path / "file.pth")
    net = deeplabzoo.create("deeplabv3plus_tf_efficientnet_lite0", encoder_pretrained=path, in_chans=4, output_stride=32)
    require_same_features(net, theirs, (64, 97), channels=4)


def test_a_recipe_starts_from_such_a_file(tmp_path: Path) -> None:
    """As `encoder_init` and as `init`: the encoder's tensors and the way its pixels are scaled."""
    path = saved(reference(), tmp_path / "file.pth")
    small = ModelOptions(head_channels=16, decoder_channels=16)
    recipe = Recipe(name="some", model="deeplabv3plus_efficientnetlite0", data="shapes", steps=1, network=small)
    data = SyntheticShapes("train", (64, 80), 2)
    nets = [build_model(replace(recipe, **{field: str(path)}), data) for field in ("encoder_init", "init")]
    expected = reference().state_dict()["_blocks.3._depthwise_conv.weight"]
    for net in nets:
        assert torch.equal(net.encoder.state_dict()["blocks.2.0.conv_dw.weight"], expected)
        assert net.preprocessing.std == (0.5, 0.5, 0.5)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    tensors = reference().state_dict()
    converter = find_converter(tensors)
    assert converter is not None
    assert converter.FORMAT_NAME == "efficientnet_pytorch"

    def refused(changed: dict[str, Tensor], words: str, name: str = "deeplabv3plus_efficientnetlite0") -> None:
        torch.save(changed, tmp_path / "file.pth")
        with pytest.raises(WeightsError, match=words):
            deeplabzoo.create(name, encoder_pretrained=tmp_path / "file.pth")

    refused(
        dict(tensors),
        "holds the encoder tf_efficientnet_lite0, efficientnetlite1 was asked for",
        "deeplabv3plus_efficientnetlite1",
    )
    refused(
        {k: v for k, v in tensors.items() if "_blocks.7." not in k},
        r"15 blocks but lacks the tensor '_blocks\.7\._project_conv",
    )
    refused(
        {k: v for k, v in tensors.items() if k != "_blocks.7._bn1.bias"}, "none of EfficientNet-B0 to B7 and Lite0 to Lite4"
    )
    refused(
        tensors | {"_blocks.2._extra.weight": torch.ones(1)},
        r"tensor '_blocks\.2\._extra\.weight' that its layout does not know",
    )
    narrow = reference(tuple((*stage[:4], stage[4] // 2) for stage in STAGES))
    refused(narrow.state_dict(), "none of EfficientNet-B0 to B7 and Lite0 to Lite4")


def test_short_names_of_the_lite_family_have_symmetric_padding() -> None:
    for size in range(5):
        assert deeplabzoo.create(f"deeplabv3plus_efficientnetlite{size}").config.encoder == f"efficientnet_lite{size}"
