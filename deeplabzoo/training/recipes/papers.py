"""The papers' own: DeepLabV3 (arXiv:1706.05587) and DeepLabV3+ (arXiv:1802.02611).

Crop 513 (Cityscapes 769), batch 16, poly 0.9 from 0.007, 30k iterations (Cityscapes 90k), batch norms trained over the whole
batch, output stride 16 in training and 8 at evaluation. The papers' encoders were pretrained otherwise than timm's (Xception:
top-1 error 20.19), so a difference of half a point either way proves nothing. Costs are estimates for one recent GPU.
"""

from dataclasses import replace

from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.training.recipe import ModelOptions, Recipe
from deeplabzoo.training.recipes.registry import register_recipe


@register_recipe
def deeplabv3_resnet101_voc_paper() -> Recipe:
    """V3, ResNet-101, multi-grid (1, 2, 4), on VOC + SBD as in the paper.

    Cost: 5 hours on a GPU.  Expect: 77.21 at output stride 16, 78.51 at 8, single scale, val 1449.
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_voc_paper --data ROOT --out runs/v3_paper
    """
    return Recipe(
        name="deeplabv3_resnet101_voc_paper",
        model="deeplabv3_resnet101",
        data="voc",
        train_split="trainaug",
        encoder_init=True,
        network=ModelOptions(output_stride=16, multi_grid=(1, 2, 4), refine_conv=False),
        steps=30_000,
        batch=16,
        lr=0.007,
        weight_decay=4e-5,
        evaluation_output_stride=8,
    )


@register_recipe
def deeplabv3plus_resnet101_voc_paper() -> Recipe:
    """V3+, ResNet-101 with decoder, on VOC + SBD as in the paper.

    Cost: 6 hours on a GPU.  Expect: 78.85 at output stride 16, 79.35 at 8, single scale, val 1449.
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_voc_paper --data ROOT --out runs/v3plus_paper
    """
    return replace(
        deeplabv3_resnet101_voc_paper(),
        name="deeplabv3plus_resnet101_voc_paper",
        model="deeplabv3plus_resnet101",
        network=ModelOptions(output_stride=16, multi_grid=(1, 2, 4)),
    )


@register_recipe
def deeplabv3plus_xception65_voc_paper() -> Recipe:
    """V3+, aligned Xception-65 with decoder, on VOC + SBD as in the paper.

    Cost: 7 hours on a GPU.  Expect: 79.93 at output stride 16, 80.22 at 8, single scale, val 1449.
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_voc_paper --data ROOT --out runs/xception_paper
    """
    return replace(
        deeplabv3plus_resnet101_voc_paper(),
        name="deeplabv3plus_xception65_voc_paper",
        model="deeplabv3plus_xception65",
        network=ModelOptions(output_stride=16),
    )


@register_recipe
def deeplabv3_resnet101_cityscapes_paper() -> Recipe:
    """V3, ResNet-101, on Cityscapes as in the paper: 769-pixel crops, 90k iterations.

    Cost: 2 days on a GPU.  Expect: 77.23 at output stride 16, 77.82 at 8, single scale, val 500.
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_cityscapes_paper --data ROOT --out runs/v3_cityscapes_paper
    """
    return replace(
        deeplabv3_resnet101_voc_paper(),
        name="deeplabv3_resnet101_cityscapes_paper",
        data="cityscapes",
        train_split="train",
        input_resize="none",
        steps=90_000,
        augmentation=Augmentation(crop=(769, 769)),
    )


@register_recipe
def deeplabv3plus_xception65_cityscapes_paper() -> Recipe:
    """V3+, aligned Xception-65, on Cityscapes as in the paper: 769-pixel crops, 90k iterations.

    Cost: 2 days on a GPU.  Expect: 78.79 at output stride 16, single scale, val 500.
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_cityscapes_paper --data ROOT --out runs/xception_cityscapes_paper
    """
    return replace(
        deeplabv3_resnet101_cityscapes_paper(),
        name="deeplabv3plus_xception65_cityscapes_paper",
        model="deeplabv3plus_xception65",
        network=ModelOptions(output_stride=16),
    )
