"""What known projects trained, as recipes here; the networks follow the papers, so details differ from theirs.

Costs are estimates for one recent data-centre GPU.
"""

from dataclasses import replace

from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.training.recipe import ModelOptions, Recipe, Stage
from deeplabzoo.training.recipes.registry import register_recipe


@register_recipe
def deeplabv3_mobilenetv3_voc() -> Recipe:
    """Small V3 on VOC 2012 train, 224-pixel crops, Adam at 0.001, random scale and flip.

    Cost: 20 minutes on a GPU.  Expect: not published for this set-up.
    Run:  python -m deeplabzoo.train deeplabv3_mobilenetv3_voc --data ROOT --out runs/v3_mobilenetv3
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
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_voc --data ROOT --out runs/v3_resnet101
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
    Run:  python -m deeplabzoo.train deeplabv3_mobilenetv3_coco --data ROOT --out runs/v3_mobilenetv3_coco
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
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_coco --data ROOT --out runs/v3_resnet101_coco
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
    Run:  python -m deeplabzoo.train deeplabv3_resnet101_cityscapes --data ROOT --out runs/v3_cityscapes
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
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_voc --data ROOT --out runs/v3plus_resnet101
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

    Cost: 9 hours on a GPU.  Expect: not published for this set-up; the paper's own has 79.93 (see papers).
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_voc --data ROOT --out runs/v3plus_xception65
    """
    return replace(deeplabv3plus_resnet101_voc(), name="deeplabv3plus_xception65_voc", model="deeplabv3plus_xception65")


@register_recipe
def deeplabv3plus_drnd54_voc() -> Recipe:
    """V3+ with DRN-D-54 on VOC + SBD, output stride 16; without a file of ImageNet weights the encoder starts untrained.

    Cost: 8 hours on a GPU.  Expect: 78.87 mIoU on val as published by jfzhang95 (fixed-scale crop of val, not full images).
    Run:  python -m deeplabzoo.train deeplabv3plus_drnd54_voc --data ROOT --out runs/drnd54 --set encoder_init=drn_d_54.pth
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
    Run:  python -m deeplabzoo.train deeplabv3plus_mobilenetv2_vocaug --data ROOT --out runs/v3plus_mobilenetv2
    """
    return replace(deeplabv3plus_resnet101_voc(), name="deeplabv3plus_mobilenetv2_vocaug", model="deeplabv3plus_mobilenetv2")


@register_recipe
def deeplabv3plus_resnet101_cityscapes() -> Recipe:
    """V3+ with ResNet-101 on Cityscapes, 769-pixel crops of the full resolution.

    Cost: 1 day on a GPU.  Expect: 76.2 mIoU on val as published by VainF for V3+ ResNet-101.
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_cityscapes --data ROOT --out runs/v3plus_cityscapes
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

    Cost: 1 day on a GPU.  Expect: not published for this set-up; the paper's own has 78.79 (see papers).
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_cityscapes --data ROOT --out runs/xception_cityscapes
    """
    return replace(
        deeplabv3plus_resnet101_cityscapes(), name="deeplabv3plus_xception65_cityscapes", model="deeplabv3plus_xception65"
    )


@register_recipe
def deeplabv3plus_drnd54_cityscapes() -> Recipe:
    """V3+ with DRN-D-54 on Cityscapes.

    Cost: 1 day on a GPU.  Expect: not published.
    Run:  python -m deeplabzoo.train deeplabv3plus_drnd54_cityscapes --data ROOT --out runs/drn_cityscapes
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
    Run:  python -m deeplabzoo.train deeplabv3plus_mobilenetv2_cityscapes --data ROOT --out runs/mobilenet_cityscapes
    """
    return replace(
        deeplabv3plus_resnet101_cityscapes(), name="deeplabv3plus_mobilenetv2_cityscapes", model="deeplabv3plus_mobilenetv2"
    )


@register_recipe
def deeplabv3plus_resnet101_coco() -> Recipe:
    """V3+ with ResNet-101 on COCO 2017 with VOC's labels; a good start for VOC.

    Cost: 3 days on a GPU.  Expect: not published.
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_coco --data ROOT --out runs/v3plus_coco
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
    Run:  python -m deeplabzoo.train deeplabv3plus_xception65_coco --data ROOT --out runs/xception_coco
    """
    return replace(deeplabv3plus_resnet101_coco(), name="deeplabv3plus_xception65_coco", model="deeplabv3plus_xception65")


@register_recipe
def deeplabv3plus_drnd54_coco() -> Recipe:
    """V3+ with DRN-D-54 on COCO 2017 with VOC's labels.

    Cost: 3 days on a GPU.  Expect: not published.
    Run:  python -m deeplabzoo.train deeplabv3plus_drnd54_coco --data ROOT --out runs/drn_coco
    """
    return replace(
        deeplabv3plus_resnet101_coco(), name="deeplabv3plus_drnd54_coco", model="deeplabv3plus_drnd54", encoder_init="auto"
    )


@register_recipe
def deeplabv3plus_mobilenetv2_coco() -> Recipe:
    """V3+ with MobileNetV2 on COCO 2017 with VOC's labels.

    Cost: 1 day on a GPU.  Expect: not published.
    Run:  python -m deeplabzoo.train deeplabv3plus_mobilenetv2_coco --data ROOT --out runs/mobilenet_coco
    """
    return replace(deeplabv3plus_resnet101_coco(), name="deeplabv3plus_mobilenetv2_coco", model="deeplabv3plus_mobilenetv2")


@register_recipe
def deeplabv3plus_resnet50_voc() -> Recipe:
    """V3+ with ResNet-50 on VOC + SBD: 20k iterations, batch 10, AdamW at 3e-4, val crops and live pictures while it trains.

    With `--set train_split=train` on VOC alone, with `network.norm=group` in group norm (then encoder_init=false).

    Cost: 4 hours on a GPU.  Expect: not published for this set-up; 77.2 by VainF for V3+ ResNet-50 (513 centre crop of val).
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet50_voc --data ROOT --out runs/v3plus_resnet50
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
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet101_voc_20k --data ROOT --out runs/v3plus_resnet101_20k
    """
    return replace(deeplabv3plus_resnet50_voc(), name="deeplabv3plus_resnet101_voc_20k", model="deeplabv3plus_resnet101")


@register_recipe
def deeplabv3plus_resnet50_person() -> Recipe:
    """V3+ for people from a folder with train, val and test: 20 epochs, cross-entropy and Dice, Dice and IoU reported.

    Cost: 30 minutes on a GPU for some thousand images.
    Expect: Dice 0.8827, IoU 0.7906 on val as published elsewhere, on another set of pictures.
    Run:  python -m deeplabzoo.train deeplabv3plus_resnet50_person --data ROOT --out runs/person_resnet50
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
