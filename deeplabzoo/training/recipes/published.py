"""Recipes that reproduce what known projects published, and what DeepLabV3 (arXiv:1706.05587) and V3+ (arXiv:1802.02611)
report.

Models follow the papers, so details differ from those of the projects. Costs are estimates for one recent data-centre GPU.
"""

from dataclasses import replace

from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.training.recipe import ModelOptions, Recipe, Stage
from deeplabzoo.training.recipes.registry import register_recipe


@register_recipe
def deeplabv3_mobilenetv3_voc() -> Recipe:
    """Small V3 on VOC 2012 train, 224-pixel crops, Adam at 0.001, random scale and flip.

    Cost: 20 minutes on a GPU.  Expect: not published for this set-up.
    Run:  python -m deeplabzoo.train deeplabv3_mobilenetv3_voc --root ROOT --out runs/v3_mobilenetv3
    """
    return Recipe(
        name="deeplabv3_mobilenetv3_voc",
        model="deeplabv3_mobilenetv3",
        data="voc",
        encoder_init=True,
        epochs=50,
        batch=16,
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.0,
        augmentation=Augmentation(crop=(224, 224)),
    )


@register_recipe
def deeplabv3_resnet101_voc() -> Recipe:
    """V3 with ResNet-101 on VOC 2012 train, 513-pixel crops, SGD at 0.01, random scale and flip.

    Cost: 1 hour on a GPU.  Expect: not published for this set-up.
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_voc --root ROOT --out runs/v3_resnet101
    """
    return Recipe(
        name="deeplabv3_resnet101_voc",
        model="deeplabv3_resnet101",
        data="voc",
        encoder_init=True,
        epochs=50,
        batch=16,
        lr=0.01,
    )


@register_recipe
def deeplabv3_mobilenetv3_coco() -> Recipe:
    """Small V3 on COCO 2017 with VOC's labels, with an auxiliary head.

    Cost: 10 hours on a GPU.  Expect: 60.3 mIoU on val as published by torchvision (0.29, images and labels resized to 520).
    Run:  python -m deeplabzoo.train deeplabv3_mobilenetv3_coco --root ROOT --out runs/v3_mobilenetv3_coco
    """
    return replace(
        deeplabv3_resnet101_coco(),
        name="deeplabv3_mobilenetv3_coco",
        model="deeplabv3_mobilenetv3",
    )


@register_recipe
def deeplabv3_resnet101_coco() -> Recipe:
    """V3 with ResNet-101 on COCO 2017 with VOC's labels, with an auxiliary head.

    Cost: 2 days on a GPU.  Expect: 67.4 mIoU on val as published by torchvision (0.29, images and labels resized to 520).
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_coco --root ROOT --out runs/v3_resnet101_coco
    """
    return Recipe(
        name="deeplabv3_resnet101_coco",
        model="deeplabv3_resnet101",
        data="coco",
        encoder_init=True,
        network=ModelOptions(aux_head=True),
        aux_weight=0.5,
        epochs=30,
        batch=16,
        lr=0.01,
        augmentation=Augmentation(crop=(481, 481)),
        evaluation_images=1000,
        save_every=1000,
    )


@register_recipe
def deeplabv3_resnet101_cityscapes() -> Recipe:
    """V3 on Cityscapes in two phases: 65 epochs at 1e-2, then 5 at 1e-3, each poly; losses compared every 5 epochs.

    Cost: 10 hours on a GPU.  Expect: 0.700 mIoU on val as published elsewhere for this schedule.
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_cityscapes --root ROOT --out runs/v3_cityscapes
    """
    return Recipe(
        name="deeplabv3_resnet101_cityscapes",
        model="deeplabv3_resnet101",
        data="cityscapes",
        encoder_init=True,
        input_resize="none",
        epochs=70,
        batch=8,
        momentum=0.9,
        weight_decay=5e-4,
        lr=1e-2,
        stages=(Stage(share=65, lr=1e-2), Stage(share=5, lr=1e-3)),
        augmentation=Augmentation(crop=(769, 769)),
        evaluations=14,
    )


@register_recipe
def deeplabv3plus_resnet101_voc() -> Recipe:
    """V3+ with ResNet-101 on VOC + SBD, output stride 16 in training and evaluation.

    Cost: 8 hours on a GPU.  Expect: 78.43 mIoU on val as published by jfzhang95 (fixed-scale crop of val, not full images).
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_voc --root ROOT --out runs/v3plus_resnet101
    """
    return Recipe(
        name="deeplabv3plus_resnet101_voc",
        model="deeplabv3plus_resnet101",
        data="voc",
        train_split="trainaug",
        encoder_init=True,
        network=ModelOptions(output_stride=16),
        epochs=50,
        batch=16,
        lr=0.007,
        head_lr_factor=10,
        weight_decay=5e-4,
        augmentation=Augmentation(crop=(513, 513), blur=0.5),
    )


@register_recipe
def deeplabv3plus_xception65_voc() -> Recipe:
    """V3+ with aligned Xception-65 on VOC + SBD, output stride 16.

    Cost: 9 hours on a GPU.  Expect: not published for this set-up; the paper's own has 79.93
    (deeplabv3plus_xception65_voc_paper).
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_voc --root ROOT --out runs/v3plus_xception65
    """
    return replace(deeplabv3plus_resnet101_voc(), name="deeplabv3plus_xception65_voc", model="deeplabv3plus_xception65")


@register_recipe
def deeplabv3plus_drnd54_voc() -> Recipe:
    """V3+ with DRN-D-54 on VOC + SBD, output stride 16; without a file of ImageNet weights the encoder is randomly initialized.

    Cost: 8 hours on a GPU.  Expect: 78.87 mIoU on val as published by jfzhang95 (fixed-scale crop of val, not full images).
    Run:  python -m deeplabzoo.train deeplabv3plus_drnd54_voc --root ROOT --out runs/drnd54 --set encoder_init=drn_d_54.pth
    """
    return replace(
        deeplabv3plus_resnet101_voc(),
        name="deeplabv3plus_drnd54_voc",
        model="deeplabv3plus_drnd54",
        encoder_init="auto",
    )


@register_recipe
def deeplabv3plus_mobilenetv2_vocaug() -> Recipe:
    """V3+ with MobileNetV2 on VOC + SBD, output stride 16 (the recipe without `aug` is the bundled model's).

    Cost: 5 hours on a GPU.  Expect: 70.81 mIoU on val as published by jfzhang95 (fixed-scale crop of val, not full images).
    Run:  python -m deeplabzoo.train deeplabv3plus_mobilenetv2_vocaug --root ROOT --out runs/v3plus_mobilenetv2
    """
    return replace(deeplabv3plus_resnet101_voc(), name="deeplabv3plus_mobilenetv2_vocaug", model="deeplabv3plus_mobilenetv2")


@register_recipe
def deeplabv3plus_resnet101_cityscapes() -> Recipe:
    """V3+ with ResNet-101 on Cityscapes, 769-pixel crops of the full resolution.

    Cost: 1 day on a GPU.  Expect: 76.2 mIoU on val as published by VainF for V3+ ResNet-101.
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_cityscapes --root ROOT --out runs/v3plus_cityscapes
    """
    return replace(
        deeplabv3plus_resnet101_voc(),
        name="deeplabv3plus_resnet101_cityscapes",
        data="cityscapes",
        train_split="train",
        input_resize="none",
        epochs=200,
        batch=16,
        lr=0.01,
        augmentation=Augmentation(crop=(769, 769), blur=0.5),
    )


@register_recipe
def deeplabv3plus_xception65_cityscapes() -> Recipe:
    """V3+ with aligned Xception-65 on Cityscapes.

    Cost: 1 day on a GPU.  Expect: not published for this set-up; the paper's own has 78.79
    (deeplabv3plus_xception65_cityscapes_paper).
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_cityscapes --root ROOT --out runs/xception_cityscapes
    """
    return replace(
        deeplabv3plus_resnet101_cityscapes(), name="deeplabv3plus_xception65_cityscapes", model="deeplabv3plus_xception65"
    )


@register_recipe
def deeplabv3plus_drnd54_cityscapes() -> Recipe:
    """V3+ with DRN-D-54 on Cityscapes.

    Cost: 1 day on a GPU.  Expect: not published.
    Run:  python -m deeplabzoo.train deeplabv3plus_drnd54_cityscapes --root ROOT --out runs/drn_cityscapes
    """
    return replace(
        deeplabv3plus_resnet101_cityscapes(),
        name="deeplabv3plus_drnd54_cityscapes",
        model="deeplabv3plus_drnd54",
        encoder_init="auto",
    )


@register_recipe
def deeplabv3plus_mobilenetv2_cityscapes() -> Recipe:
    """V3+ with MobileNetV2 on Cityscapes.

    Cost: 15 hours on a GPU.  Expect: 72.1 mIoU on val as published by VainF for V3+ MobileNet.
    Run:  python -m deeplabzoo.train deeplabv3plus_mobilenetv2_cityscapes --root ROOT --out runs/mobilenet_cityscapes
    """
    return replace(
        deeplabv3plus_resnet101_cityscapes(), name="deeplabv3plus_mobilenetv2_cityscapes", model="deeplabv3plus_mobilenetv2"
    )


@register_recipe
def deeplabv3plus_resnet101_coco() -> Recipe:
    """V3+ with ResNet-101 on COCO 2017 with VOC's labels; good initial weights for VOC.

    Cost: 3 days on a GPU.  Expect: not published.
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_coco --root ROOT --out runs/v3plus_coco
    """
    return replace(
        deeplabv3plus_resnet101_voc(),
        name="deeplabv3plus_resnet101_coco",
        data="coco",
        train_split="train",
        epochs=30,
        lr=0.01,
        evaluation_images=1000,
        save_every=1000,
    )


@register_recipe
def deeplabv3plus_xception65_coco() -> Recipe:
    """V3+ with aligned Xception-65 on COCO 2017 with VOC's labels.

    Cost: 3 days on a GPU.  Expect: not published.
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_coco --root ROOT --out runs/xception_coco
    """
    return replace(deeplabv3plus_resnet101_coco(), name="deeplabv3plus_xception65_coco", model="deeplabv3plus_xception65")


@register_recipe
def deeplabv3plus_drnd54_coco() -> Recipe:
    """V3+ with DRN-D-54 on COCO 2017 with VOC's labels.

    Cost: 3 days on a GPU.  Expect: not published.
    Run:  python -m deeplabzoo.train deeplabv3plus_drnd54_coco --root ROOT --out runs/drn_coco
    """
    return replace(
        deeplabv3plus_resnet101_coco(), name="deeplabv3plus_drnd54_coco", model="deeplabv3plus_drnd54", encoder_init="auto"
    )


@register_recipe
def deeplabv3plus_mobilenetv2_coco() -> Recipe:
    """V3+ with MobileNetV2 on COCO 2017 with VOC's labels.

    Cost: 1 day on a GPU.  Expect: not published.
    Run:  python -m deeplabzoo.train deeplabv3plus_mobilenetv2_coco --root ROOT --out runs/mobilenet_coco
    """
    return replace(deeplabv3plus_resnet101_coco(), name="deeplabv3plus_mobilenetv2_coco", model="deeplabv3plus_mobilenetv2")


@register_recipe
def deeplabv3plus_resnet50_voc() -> Recipe:
    """V3+ with ResNet-50 on VOC + SBD: 20k iterations, batch 10, AdamW at 3e-4, evaluation on val crops and TensorBoard images.

    With `--set train_split=train` on VOC alone, with `network.norm=group` in group norm (then encoder_init=false).

    Cost: 4 hours on a GPU.  Expect: not published for this set-up; 77.2 by VainF for V3+ ResNet-50 (513 centre crop of val).
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet50_voc --root ROOT --out runs/v3plus_resnet50
    """
    return Recipe(
        name="deeplabv3plus_resnet50_voc",
        model="deeplabv3plus_resnet50",
        data="voc",
        train_split="trainaug",
        encoder_init=True,
        steps=20_000,
        batch=10,
        optimizer="adamw",
        lr=3e-4,
        weight_decay=1e-4,
        crop_val=513,
        tensorboard=True,
        evaluations=20,
    )


@register_recipe
def deeplabv3plus_resnet101_voc_20k() -> Recipe:
    """As deeplabv3plus_resnet50_voc with ResNet-101: 20k iterations, batch 10.

    Cost: 6 hours on a GPU.  Expect: not published for this set-up; 78.3 by VainF for V3+ ResNet-101 (513 centre crop of val).
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_voc_20k --root ROOT --out runs/v3plus_resnet101_20k
    """
    return replace(deeplabv3plus_resnet50_voc(), name="deeplabv3plus_resnet101_voc_20k", model="deeplabv3plus_resnet101")


@register_recipe
def deeplabv3plus_resnet50_person() -> Recipe:
    """V3+ for people from a folder with train, val and test: 20 epochs, cross-entropy and Dice, Dice and IoU reported.

    Cost: 30 minutes on a GPU for some thousand images.
    Expect: Dice 0.8827, IoU 0.7906 on val as published elsewhere, on another set of images.
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet50_person --root ROOT --out runs/person_resnet50
    """
    return Recipe(
        name="deeplabv3plus_resnet50_person",
        model="deeplabv3plus_resnet50",
        data="folder",
        classes=("background", "person"),
        test_split="test",
        encoder_init=True,
        epochs=20,
        batch=8,
        optimizer="adamw",
        lr=1e-4,
        loss=(("ce", 1.0), ("dice", 1.0)),
        augmentation=Augmentation(crop=(513, 513), colour=0.2),
    )


# The papers' own recipes: crop 513 (Cityscapes 769), batch 16, poly 0.9 from 0.007, 30k iterations (Cityscapes 90k),
# batch norms trained over the whole batch, output stride 16 in training and 8 at evaluation. The encoders were pretrained
# differently from timm's (Xception: top-1 error 20.19), so a difference of half a point either way is not significant.


@register_recipe
def deeplabv3_resnet101_voc_paper() -> Recipe:
    """V3, ResNet-101, multi-grid (1, 2, 4), on VOC + SBD as in the paper.

    Cost: 5 hours on a GPU.  Expect: 77.21 at output stride 16, 78.51 at 8, single scale, val 1449.
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_voc_paper --root ROOT --out runs/v3_paper
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
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_voc_paper --root ROOT --out runs/v3plus_paper
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
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_voc_paper --root ROOT --out runs/xception_paper
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
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_cityscapes_paper --root ROOT --out runs/v3_cityscapes_paper
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
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_cityscapes_paper --root ROOT --out runs/xception_cityscapes_paper
    """
    return replace(
        deeplabv3_resnet101_cityscapes_paper(),
        name="deeplabv3plus_xception65_cityscapes_paper",
        model="deeplabv3plus_xception65",
        network=ModelOptions(output_stride=16),
    )
