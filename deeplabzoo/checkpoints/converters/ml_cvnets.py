"""Apple's ml-cvnets: DeepLabV3 on MobileNetV2, MobileViT and MobileViTv2, as its own training code saves them (`.pt`).

The heads are those of the Hub's copies (see transformers.py): no 3x3 convolution after ASPP; logits are upsampled with aligned
corners. Two things that the copies of MobileViTv2 lost are as in Apple's code here: the 3x3 convolution before the attention of
a v2 block is dilated like its stage (in v1 it never is), and a map that does not divide into 2 x 2 patches is upsampled and
stays so, which is what timm does too.

Files since version 0.2 read images with PIL, so they expect RGB; those of 0.1, whose head is 256 wide, were read with OpenCV
and expect BGR. Neither subtracts a mean.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from deeplabzoo.checkpoints.converters.key_mapping import Rules, converted_checkpoint, encoder_from_widths, rename
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

FORMAT_NAME = "ml_cvnets"

_STEM = "encoder.conv_1.block.conv.weight"
_ASPP = r"seg_head\.aspp\.aspp_layer"
_PROJECT = "seg_head.aspp.aspp_layer.project.block.conv.weight"
_CLASSIFIERS = ("seg_head.classifier.block.conv.weight", "seg_head.classifier.classifier.block.conv.weight")
_RGB = Preprocessing(size=(512, 512), resize="shortest", only_shrink=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
_BGR = Preprocessing(
    size=(512, 512), resize="shortest", only_shrink=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), channel_order="BGR"
)
_BLOCK = {"exp_1x1": "1_1x1", "conv_3x3": "2_kxk", "red_1x1": "3_1x1"}
"""Convolutions of an invert_rules residual block, and timm's names for them in a MobileViT (after `conv`)."""
_MOBILENET_LAYERS = {2: (2,), 3: (3,), 4: (4, 3), 5: (3, 1)}
"""Blocks of MobileNetV2's stages (1801.04381, table 2) by the layer that ml-cvnets numbers them through in, after the first."""


def can_convert(names: Collection[str]) -> bool:
    """Whether tensors of these names are a DeepLabV3 of ml-cvnets, on any of its encoders."""
    return _STEM in names and _PROJECT in names and any(classifier in names for classifier in _CLASSIFIERS)


def convert(tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError for its ResNets and for tensors that its layout does not know."""
    try:
        encoder, rules = _encoder(tensors)
    except KeyError as error:
        raise WeightsError(
            f"'{path}' is a DeepLabV3 of ml-cvnets on an encoder that cannot be read; it lacks {error}."
        ) from None
    num_classes = max(2, next(tensors[name].shape[0] for name in _CLASSIFIERS if name in tensors))
    channels = tensors[_PROJECT].shape[0]
    is_v2 = encoder.startswith("mobilevitv2")
    stride = 16 if channels == 256 or (is_v2 and num_classes == 21) else 8
    config = DeepLabConfig(
        architecture="deeplabv3",
        encoder=encoder,
        num_classes=num_classes,
        in_chans=tensors[_STEM].shape[1],
        output_stride=stride,
        head_channels=channels,
        refine_conv=False,
        align_corners=True,
        encoder_final_conv=False if encoder.startswith("mobilevit_") else None,
        encoder_dilate_local_conv=not encoder.startswith("mobilevit_"),
    )
    has_auxiliary = any(name.startswith("seg_head.aux_head.") for name in tensors)
    return converted_checkpoint(
        FORMAT_NAME,
        config=config,
        state_dict=rename(tensors, (*rules, *_head_rules()), FORMAT_NAME),
        datasets=("voc", "ade20k"),
        preprocessing=_BGR if channels == 256 else _RGB,
        dropped=("auxiliary head (of another width than ours)",) if has_auxiliary else (),
        notes=(f"output stride {stride} assumed, as in the published files of this kind",),
    )


def _encoder(tensors: Mapping[str, Tensor]) -> tuple[str, Rules]:
    """Return the encoder's name and the rules for its tensors; raises KeyError for one of another family."""
    if "encoder.layer_1.mv2_block_0.block.conv_3x3.block.conv.weight" in tensors:
        last = {1: 0, **{layer: sum(blocks) - 1 for layer, blocks in _MOBILENET_LAYERS.items()}}
        reads = [f"encoder.layer_{layer}.mv2_block_{block}.block.red_1x1.block.conv.weight" for layer, block in last.items()]
        return encoder_from_widths("mobilenetv2_*", [tensors[name] for name in reads]), _mobilenet_rules()
    last = {1: 0, 2: 0, 3: 0, 4: 0, 5: 0}
    ends = [tensors[f"encoder.layer_{layer}.{block}.block.red_1x1.block.conv.weight"] for layer, block in last.items()]
    is_v2 = "encoder.layer_5.1.local_rep.0.block.conv.weight" in tensors
    # the last entry of timm's MobileViT is the convolution after the last stage, which these models have not
    pattern, ends = ("mobilevitv2_*", ends) if is_v2 else ("mobilevit_*", ends[:4])
    return encoder_from_widths(pattern, ends), _mobilevit_rules()


def _layer(theirs: str, ours: str, convolution: str = ".conv", norm: str = ".bn") -> Rules:
    """Return the rules for a convolution and the batch norm after it."""
    return [
        (rf"{theirs}\.block\.conv\.(?P<kind>\w+)", rf"{ours}{convolution}.\g<kind>"),
        (rf"{theirs}\.block\.norm\.(?P<kind>\w+)", rf"{ours}{norm}.\g<kind>"),
    ]


def _head_rules() -> Rules:
    return [
        *_layer(rf"{_ASPP}\.convs\.([0-3])", r"head.aspp.branches.\1", norm=".norm"),
        *_layer(rf"{_ASPP}\.convs\.4\.aspp_pool\.conv_1x1", "head.aspp.pool", norm=".norm"),
        *_layer(rf"{_ASPP}\.project", "head.aspp.project", norm=".norm"),
        (r"seg_head\.classifier\.(?:classifier\.)?block\.conv\.(\w+)", r"head.classifier.\1"),
        (r"seg_head\.aux_head\..+", None),
        (r"encoder\.(?:conv_1x1_exp|classifier)\..+", None),
    ]


def _mobilenet_rules() -> Rules:
    first = r"encoder\.layer_1\.mv2_block_0\.block"
    rules = [
        *_layer(r"encoder\.conv_1", "encoder", ".conv_stem", ".bn1"),
        *_layer(rf"{first}\.conv_3x3", "encoder.blocks.0.0", ".conv_dw", ".bn1"),
        *_layer(rf"{first}\.red_1x1", "encoder.blocks.0.0", ".conv_pw", ".bn2"),
    ]
    stage = 0
    for layer, counts in _MOBILENET_LAYERS.items():
        places = [(part, block) for part, count in enumerate(counts, start=stage + 1) for block in range(count)]
        stage += len(counts)
        for index, (part, block) in enumerate(places):
            for order, (theirs, ours) in enumerate((("exp_1x1", "pw"), ("conv_3x3", "dw"), ("red_1x1", "pwl")), start=1):
                theirs = rf"encoder\.layer_{layer}\.mv2_block_{index}\.block\.{theirs}"
                rules += _layer(theirs, f"encoder.blocks.{part}.{block}", f".conv_{ours}", f".bn{order}")
    return rules


def _mobilevit_rules() -> Rules:
    rules = [*_layer(r"encoder\.conv_1", "encoder.stem")]
    transformer = {
        r"pre_norm_(?:mha|attn)\.0": "norm1",
        r"pre_norm_mha\.1\.qkv_proj": "attn.qkv",
        r"pre_norm_mha\.1\.out_proj": "attn.proj",
        r"pre_norm_attn\.1\.qkv_proj\.block\.conv": "attn.qkv_proj",
        r"pre_norm_attn\.1\.out_proj\.block\.conv": "attn.out_proj",
        r"pre_norm_ffn\.0": "norm2",
        r"pre_norm_ffn\.1(?:\.block\.conv)?": "mlp.fc1",
        r"pre_norm_ffn\.(?:4|3\.block\.conv)": "mlp.fc2",
    }
    for stage in range(5):
        layer, block = rf"encoder\.layer_{stage + 1}", f"encoder.stages_{stage}.1"
        for theirs, ours in _BLOCK.items():
            rules += _layer(rf"{layer}\.(\d)\.block\.{theirs}", rf"encoder.stages_{stage}.\1.conv{ours}")
        rules += [
            *_layer(rf"{layer}\.1\.local_rep\.(?:0|conv_3x3)", f"{block}.conv_kxk"),
            (rf"{layer}\.1\.local_rep\.(?:1|conv_1x1)\.block\.conv\.(\w+)", rf"{block}.conv_1x1.\1"),
            *_layer(rf"{layer}\.1\.conv_proj", f"{block}.conv_proj"),
            *_layer(rf"{layer}\.1\.fusion", f"{block}.conv_fusion"),
            (rf"{layer}\.1\.global_rep\.\d\.(weight|bias)", rf"{block}.norm.\1"),
        ]
        for theirs, ours in transformer.items():
            rules.append((rf"{layer}\.1\.global_rep\.(\d)\.{theirs}\.(weight|bias)", rf"{block}.transformer.\1.{ours}.\2"))
    return rules
