"""Recipes of generated shapes, of a folder of one's own data, and of the three models bundled in the package."""

from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.training.recipe import LossOptions, ModelOptions, Recipe, Stage
from deeplabzoo.training.recipes.registry import register_recipe

_CORAL = "deeplabv3_mobilenetv2_voc.coral"
"""Google Coral's quantised mobile V3 for VOC; a V3+ initialized from it has the same outputs (`transfer_weights`)."""


@register_recipe
def shapes() -> Recipe:
    """Tiny V3+ on generated images of discs, squares and triangles: needs no data.

    Cost: 1 minute on one core.  Expect: 95 to 98 mIoU on 64 images (3 seeds).
    Run:  python -m deeplabzoo.train shapes --out runs/shapes
    """
    return Recipe(
        name="shapes",
        model="deeplabv3plus_lcnet_050",
        data="shapes",
        network=ModelOptions(
            output_stride=8, head_channels=32, decoder_channels=32, decoder_low_level_channels=16, dropout=0.0
        ),
        steps=400,
        batch=8,
        optimizer="adamw",
        lr=2e-2,
        weight_decay=0.01,
        warmup_steps=20,
        augmentation=Augmentation(crop=(64, 80), scale=(0.8, 1.25)),
        evaluations=4,
        save_every=100,
    )


@register_recipe
def folder() -> Recipe:
    """One's own images and masks: a V3+ with ImageNet weights, cross-entropy and Dice.

    Classes are in ROOT/classes.txt; splits are folders, lists, or a fifth held out. A test split is evaluated if there is one.
    Without network access the encoder is randomly initialized, with a warning.

    Cost: depends on the data.  Expect: depends on the data.
    Run:  python -m deeplabzoo.train folder --root my_data --out runs/mine --set model=deeplabv3plus_mobilenetv2 epochs=40
    """
    return Recipe(
        name="folder",
        model="deeplabv3plus_mobilenetv2",
        data="folder",
        test_split="test",
        encoder_init="auto",
        epochs=40,
        batch=8,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.01,
        encoder_lr_factor=0.25,
        warmup_steps=50,
        ema=0.99,
        loss=(("ce", 1.0), ("dice", 0.5)),
        augmentation=Augmentation(crop=(385, 385), colour=0.2),
    )


@register_recipe
def deeplabv3plus_mobilenetv2_voc() -> Recipe:
    """Bundled default of `predict`: Coral's mobile V3 for VOC with atrous branches and a decoder added.

    330 images cannot improve an encoder that was trained on ten thousand, so it is frozen, with every batch norm. The head is
    trained, starting from the Coral model's outputs: atrous branches, the low-level path at stride 4, and the classifier.
    Lovász approximates the mean IoU over classes, and distillation from the Coral model itself, at two scales and mirrored,
    limits overfitting to so few labels.

    Whole images, not crops, so that the image pooling branch sees in training what it sees in inference. Longer training was
    worse (docs/reproduce.md).

    Cost: 5 minutes of training on one shared core.  Expect: 72.76 mIoU on the 173-image subset of VOC val.
    Run:  python -m deeplabzoo.train deeplabv3plus_mobilenetv2_voc --root ROOT --out runs/voc
    """
    return Recipe(
        name="deeplabv3plus_mobilenetv2_voc",
        model="deeplabv3plus_mobilenetv2",
        data="voc",
        init=_CORAL,
        recalibrate_norms=64,
        teacher=_CORAL,
        teacher_scales=(1.0, 1.25),
        freeze_norms="all",
        freeze_stages=5,
        steps=32,
        batch=8,
        optimizer="adamw",
        lr=1e-4,
        weight_decay=1e-4,
        warmup_steps=20,
        ema=0.98,
        loss=(("ce", 0.5), ("lovasz_batch", 0.5)),
        loss_options=LossOptions(lovasz_stride=4),
        augmentation=Augmentation(crop=(513, 513), scale=(0.7, 1.05)),
        evaluations=1,
        save_every=20,
    )


@register_recipe
def deeplabv3plus_mobilenetv2_camvid() -> Recipe:
    """Bundled street scenes: CamVid's 11 classes at 480 x 360, small crops first, then larger ones.

    Atrous rates 3, 6, 9 fit the small crops (with 6, 12, 18 the outer taps stay untrained); the larger crops improve thin
    classes.

    Cost: 1.1 hours of training on one shared core.  Expect: 71.56 mIoU on CamVid val.
    Run:  python -m deeplabzoo.train deeplabv3plus_mobilenetv2_camvid --root ROOT --out runs/camvid
    """
    return Recipe(
        name="deeplabv3plus_mobilenetv2_camvid",
        model="deeplabv3plus_mobilenetv2",
        data="camvid",
        test_split="test",
        init=_CORAL,
        recalibrate_norms=64,
        freeze_norms="encoder",
        network=ModelOptions(atrous_rates=(3, 6, 9)),
        input_size=(360, 480),
        input_pad=False,
        epochs=70,
        batch=8,
        optimizer="adamw",
        lr=2e-3,
        encoder_lr_factor=0.25,
        weight_decay=0.01,
        warmup_steps=50,
        ema=0.995,
        loss=(("ce", 1.0), ("dice", 0.5)),
        class_weights="inverse_sqrt",
        augmentation=Augmentation(crop=(160, 208), scale=(0.42, 0.8), colour=0.3),
        stages=(
            Stage(share=14, crop=(160, 208), scale=(0.42, 0.8)),
            Stage(share=60, crop=(256, 352), scale=(0.7, 1.3), lr=1.5e-3),
            Stage(share=16, crop=(320, 448), scale=(0.85, 1.3), lr=4e-4),
        ),
        evaluations=5,
        save_every=200,
    )


@register_recipe
def deeplabv3plus_mobilenetv2_person() -> Recipe:
    """Bundled people: background and person, from a folder of images and masks.

    Initialized from Coral's mobile V3 for VOC, whose classifier rows for background and person are kept.

    Cost: 1.1 hours of training on one shared core.  Expect: 94.70 mIoU (person 91.78) on its val.
    Run:  python -m deeplabzoo.train deeplabv3plus_mobilenetv2_person --root ROOT --out runs/person
    """
    return Recipe(
        name="deeplabv3plus_mobilenetv2_person",
        model="deeplabv3plus_mobilenetv2",
        data="folder",
        classes=("background", "person"),
        test_split="test",
        init=_CORAL,
        recalibrate_norms=64,
        freeze_norms="encoder",
        network=ModelOptions(atrous_rates=(3, 6, 9)),
        input_size=(512, 512),
        input_resize="longest",
        input_pad=False,
        epochs=26,
        batch=8,
        optimizer="adamw",
        lr=1.5e-3,
        encoder_lr_factor=0.25,
        weight_decay=0.01,
        warmup_steps=50,
        ema=0.99,
        loss=(("ce", 1.0), ("dice", 0.5)),
        augmentation=Augmentation(crop=(224, 160), scale=(0.42, 0.7), colour=0.3),
        stages=(
            Stage(share=8, crop=(224, 160), scale=(0.42, 0.7)),
            Stage(share=20, crop=(416, 288), scale=(0.7, 1.25), lr=1e-3),
        ),
        evaluations=5,
        save_every=100,
    )
