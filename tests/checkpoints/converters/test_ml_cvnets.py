"""Checkpoints in the layout of Apple's ml-cvnets, against networks of its documented arithmetic.

That code is no package. For the MobileViTs the reference is transformers' network under ml-cvnets' names, which its authors
checked against Apple's, with the two differences that ml-cvnets' v2 block has: its first convolution is dilated and a map that
does not divide into patches is enlarged. For MobileNetV2 it is written out here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.parity import randomised, require_same_logits
from torch import nn

import deeplabzoo
from deeplabzoo.checkpoints.converters import find_converter, ml_cvnets
from deeplabzoo.errors import WeightsError
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.models.deeplab import DeepLab

ROWS = [row for row in released() if row.origin == "ml_cvnets"]


def conv(in_channels: int, out_channels: int, kernel: int = 1, *, act: nn.Module | None, **options: Any) -> nn.Module:
    """A convolution and its norm as ml-cvnets names them: `block.conv`, `block.norm`."""
    reach = options.get("dilation", 1) * (kernel - 1) // 2
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(in_channels, out_channels, kernel, padding=reach, bias=False, **options))
    block.add_module("norm", nn.BatchNorm2d(out_channels))
    if act is not None:
        block.add_module("act", act)
    return named(block=block)


def named(**modules: nn.Module) -> nn.Sequential:
    sequence = nn.Sequential()
    for name, module in modules.items():
        sequence.add_module(name, module)
    return sequence


class Block(nn.Module):
    """MobileNetV2's invert_rules residual."""

    def __init__(self, in_channels: int, out_channels: int, expand: int, stride: int, dilation: int) -> None:
        super().__init__()
        hidden = in_channels * expand
        parts = {"exp_1x1": conv(in_channels, hidden, act=nn.ReLU6())} if expand > 1 else {}
        parts["conv_3x3"] = conv(hidden, hidden, 3, act=nn.ReLU6(), stride=stride, dilation=dilation, groups=hidden)
        self.block = named(**parts, red_1x1=conv(hidden, out_channels, act=None))
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.block(x)
        return x + y if self.shortcut else y


class Pyramid(nn.Module):
    def __init__(self, in_channels: int, channels: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        atrous = [conv(in_channels, channels, 3, act=nn.ReLU(), dilation=rate) for rate in rates]
        pool = nn.Module()
        pool.aspp_pool = named(global_pool=nn.AdaptiveAvgPool2d(1), conv_1x1=conv(in_channels, channels, act=nn.ReLU()))
        self.convs = nn.ModuleList([conv(in_channels, channels, act=nn.ReLU()), *atrous, pool])
        self.project = conv(5 * channels, channels, act=nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *local, pool = self.convs
        out: torch.Tensor = self.project(
            torch.cat([*(one(x) for one in local), pool.aspp_pool(x).expand(-1, -1, *x.shape[2:])], 1)
        )
        return out


class MobileNetReference(nn.Module):
    """MobileNetV2 at output stride 8 with an ASPP 512 wide and rates 12, 24, 36 (the ADE20K file)."""

    LAYERS = (((1, 16, 1, 1, 1, 1),), ((6, 24, 2, 2, 1, 1),), ((6, 32, 3, 2, 1, 1),))
    DEEP = (((6, 64, 4, 1, 1, 2), (6, 96, 3, 1, 2, 2)), ((6, 160, 3, 1, 2, 4), (6, 320, 1, 1, 4, 4)))
    """(expansion, channels, blocks, stride, dilation of the first block, of the others)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder = named(conv_1=conv(3, 32, 3, act=nn.ReLU6(), stride=2))
        width = 32
        for number, stages in enumerate((*self.LAYERS, *self.DEEP), start=1):
            layer = nn.Sequential()
            for expand, channels, blocks, stride, first, later in stages:
                for index in range(blocks):
                    block = Block(width, channels, expand, 1 if index else stride, later if index else first)
                    layer.add_module(f"mv2_block_{len(layer)}", block)
                    width = channels
            self.encoder.add_module(f"layer_{number}", layer)
        classifier = named(block=named(conv=nn.Conv2d(512, num_classes, 1)))
        auxiliary = nn.Sequential(
            conv(96, 128, 3, act=nn.ReLU()), nn.Dropout2d(), named(block=named(conv=nn.Conv2d(128, 9, 1)))
        )
        self.seg_head = nn.ModuleDict(
            {"aspp": named(aspp_layer=Pyramid(320, 512, (12, 24, 36))), "classifier": classifier, "aux_head": auxiliary}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.seg_head["classifier"](self.seg_head["aspp"](self.encoder(x)))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=True)


def transformers_reference(is_v2: bool, output_stride: int, num_classes: int, channels: int, **options: Any) -> nn.Module:
    """transformers' network with random weights that carry the image through, changed into ml-cvnets' where it differs."""
    transformers = pytest.importorskip("transformers")
    kind = "MobileViTV2" if is_v2 else "MobileViT"
    rates = [96 // output_stride * factor for factor in (1, 2, 3)]
    config = getattr(transformers, f"{kind}Config")(
        num_labels=num_classes, output_stride=output_stride, atrous_rates=rates, aspp_out_channels=channels, **options
    )
    net = getattr(transformers, f"{kind}ForSemanticSegmentation")(config)
    for name, module in net.named_modules():
        if is_v2 and (found := re.fullmatch(r".*encoder\.layer\.([34])\.conv_kxk\.convolution", name)):
            rate = {(16, "4"): 2, (8, "3"): 2, (8, "4"): 4}.get((output_stride, found[1]), 1)
            module.dilation = module.padding = (rate, rate)
    return net


def with_random_weights(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, std=0.2)
    return randomised(net)


def their_names(tensors: Mapping[str, torch.Tensor], is_v2: bool) -> dict[str, torch.Tensor]:
    """The tensors of transformers' network under the names that ml-cvnets saves them by."""
    joined: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".attention.attention." in name:
            if ".query." in name:
                parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
                joined[name.replace("attention.attention.query", "pre_norm_mha.1.qkv_proj")] = torch.cat(parts)
            continue
        joined[name] = tensor
    depth = {2: 2, 3: 4, 4: 3}
    local = ("0", "1") if is_v2 else ("conv_3x3", "conv_1x1")
    steps = [
        (r"^mobilevit(?:v2)?\.", "encoder."),
        (r"^encoder\.conv_stem\.", "encoder.conv_1."),
        (r"encoder\.encoder\.layer\.(\d)\.downsampling_layer\.", r"encoder.layer.\1.0.block."),
        (r"encoder\.encoder\.layer\.(\d)\.layer\.(\d)\.", r"encoder.layer.\1.\2.block."),
        (r"encoder\.encoder\.layer\.(\d)\.conv_kxk\.", rf"encoder.layer.\1.1.local_rep.{local[0]}."),
        (r"encoder\.encoder\.layer\.(\d)\.conv_1x1\.", rf"encoder.layer.\1.1.local_rep.{local[1]}."),
        (r"encoder\.encoder\.layer\.(\d)\.conv_projection\.", r"encoder.layer.\1.1.conv_proj."),
        (r"encoder\.encoder\.layer\.(\d)\.fusion\.", r"encoder.layer.\1.1.fusion."),
        (r"encoder\.encoder\.layer\.(\d)\.transformer\.layer\.", r"encoder.layer.\1.1.global_rep."),
        *((rf"encoder\.encoder\.layer\.{i}\.layernorm\.", f"encoder.layer.{i}.1.global_rep.{n}.") for i, n in depth.items()),
        (r"expand_1x1", "exp_1x1"),
        (r"reduce_1x1", "red_1x1"),
        (r"layernorm_before\.", "pre_norm_attn.0." if is_v2 else "pre_norm_mha.0."),
        (r"layernorm_after\.", "pre_norm_ffn.0."),
        (r"attention\.output\.dense\.", "pre_norm_mha.1.out_proj."),
        (r"attention\.(qkv_proj|out_proj)\.", r"pre_norm_attn.1.\1."),
        (r"intermediate\.dense\.|ffn\.conv1\.", "pre_norm_ffn.1."),
        (r"(?<=\d\.)output\.dense\.", "pre_norm_ffn.4."),
        (r"ffn\.conv2\.", "pre_norm_ffn.3."),
        (r"\.convolution\.", ".block.conv."),
        (r"\.normalization\.", ".block.norm."),
        (r"segmentation_head\.aspp\.", "seg_head.aspp.aspp_layer."),
        (r"convs\.4\.", "convs.4.aspp_pool."),
        (r"segmentation_head\.", "seg_head."),
    ]
    renamed = {}
    for name, tensor in joined.items():
        for pattern, new in steps:
            name = re.sub(pattern, new, name)
        name = re.sub(r"encoder\.layer\.(\d)", lambda found: f"encoder.layer_{int(found[1]) + 1}", name)
        renamed[name] = tensor
    return renamed


V1 = {"hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320], "expand_ratio": 2.0}
"""MobileViT's smallest size, in transformers' words."""


@pytest.mark.parametrize(
    ("is_v2", "stride", "num_classes", "channels", "options", "order"),
    [
        (False, 8, 21, 512, V1, "RGB"),
        (False, 16, 21, 256, V1, "BGR"),
        (True, 16, 21, 512, {"width_multiplier": 0.5}, "RGB"),
        (True, 8, 150, 512, {"width_multiplier": 0.5}, "RGB"),
    ],
)
def test_mobilevits_give_the_logits_of_ml_cvnets(
    is_v2: bool,
    stride: int,
    num_classes: int,
    channels: int,
    options: Mapping[str, Any],
    order: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At an even and an odd size; the stride and the order of colours are those of the published files of each kind."""
    torch.manual_seed(0)
    theirs = with_random_weights(transformers_reference(is_v2, stride, num_classes, channels, **options))
    file = tmp_path / "deeplabv3.pt"
    torch.save(their_names(theirs.state_dict(), is_v2), file)
    ours = deeplabzoo.load(file)
    assert "ml_cvnets layout" in caplog.messages[-1]
    assert ours.output_stride == stride
    assert ours.preprocessing.channel_order == order
    assert ours.classes[15] == ("person" if num_classes == 21 else "table")
    for height, width in ((64, 96), (127, 95) if is_v2 else (97, 75)):
        image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.inference_mode():
            expected = F.interpolate(theirs(image).logits, size=(height, width), mode="bilinear", align_corners=True)
            require_same_logits(ours(image), expected)


def test_mobilenetv2_gives_the_logits_of_ml_cvnets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    theirs = randomised(MobileNetReference(150))
    torch.save(theirs.state_dict(), tmp_path / "deeplabv3-mobilenetv2.pt")
    ours = deeplabzoo.create("deeplabv3_mobilenetv2_ade20k", pretrained=tmp_path / "deeplabv3-mobilenetv2.pt")
    assert "auxiliary head" in caplog.messages[-1]
    for height, width in ((64, 96), (97, 75)):
        image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.inference_mode():
            require_same_logits(ours(image), theirs(image))


def file_of(row: WeightRow) -> dict[str, torch.Tensor]:
    """Names and shapes of a row's file, on no memory."""
    with torch.device("meta"):
        if row.config.encoder == "mobilenetv2_100":
            return MobileNetReference(row.config.num_classes).state_dict()
        is_v2 = row.config.encoder.startswith("mobilevitv2")
        options = {"width_multiplier": int(row.config.encoder[-3:]) / 100} if is_v2 else {}
        theirs = transformers_reference(is_v2, row.config.output_stride, row.config.num_classes, 512, **options)
        return their_names(theirs.state_dict(), is_v2)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.full_name)
def test_manifest_rows_match_their_converter(row: WeightRow, tmp_path: Path) -> None:
    tensors = file_of(row)
    assert find_converter(tensors) is ml_cvnets
    converted = ml_cvnets.convert(tensors, tmp_path / "file.pt")
    assert converted.config == row.config
    assert converted.preprocessing == row.preprocessing
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in DeepLab(row.config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.state_dict.items()} == expected


def test_other_encoders_are_refused_in_a_sentence(tmp_path: Path) -> None:
    """Its DeepLabV3 on ResNet-50 has a stem that no published file here has."""
    with torch.device("meta"):
        tensors = MobileNetReference(150).state_dict()
    tensors = {name.replace("mv2_block_", "res_block_"): tensor for name, tensor in tensors.items()}
    with pytest.raises(WeightsError, match="on an encoder that cannot be read"):
        ml_cvnets.convert(tensors, tmp_path / "resnet.pt")
