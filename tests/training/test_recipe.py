"""Recipes: overrides are typed, wrong ones are explained, the hash sees what decides the result and nothing else."""

import dataclasses
import json

import pytest

from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.errors import UnknownNameError, UsageError
from deeplabzoo.training.overrides import apply_overrides, recipe_from_dict
from deeplabzoo.training.recipe import ModelOptions, Recipe, Stage

PLAIN = Recipe(name="plain", model="deeplabv3_resnet18", data="shapes", steps=100)
STAGED = dataclasses.replace(
    PLAIN, stages=(Stage(share=65, lr=1e-2), Stage(share=5, lr=1e-3, crop=(97, 97), scale=(0.75, 1.5))), steps=700
)


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("lr=0.5", "lr", 0.5),
        ("lr=1e-3", "lr", 1e-3),
        ("steps=60", "steps", 60),
        ("model=deeplabv3plus_resnet50", "model", "deeplabv3plus_resnet50"),
        ("channels_last=false", "channels_last", False),
        ("compile=True", "compile", True),
        ("loss=lovasz", "loss", (("lovasz", 1.0),)),
        ("loss=ce:1,lovasz:0.5", "loss", (("ce", 1.0), ("lovasz", 0.5))),
        ("loss=ce,dice", "loss", (("ce", 1.0), ("dice", 1.0))),
        ('loss=[["ce",1],["dice",2]]', "loss", (("ce", 1.0), ("dice", 2.0))),
        ("augmentation.crop=321,481", "augmentation", Augmentation(crop=(321, 481))),
        ("augmentation.crop=321", "augmentation", Augmentation(crop=(321, 321))),
        ("network.atrous_rates=3,6,9", "network", ModelOptions(atrous_rates=(3, 6, 9))),
        ("classes=background,person", "classes", ("background", "person")),
        ("class_weights=enet", "class_weights", "enet"),
        ("class_weights=1,2.5", "class_weights", (1.0, 2.5)),
        ("encoder_init=true", "encoder_init", True),
        ("encoder_init=weights.tflite", "encoder_init", "weights.tflite"),
        ("freeze_norms=none", "freeze_norms", "none"),
        ("test_split=none", "test_split", None),
    ],
)
def test_overrides_are_typed(assignment: str, field: str, value: object) -> None:
    """Text becomes what the field declares."""
    assert getattr(apply_overrides(PLAIN, [assignment]), field) == value


def test_steps_and_epochs_replace_each_other() -> None:
    """`--set steps=60` shortens a recipe that counts epochs."""
    by_epochs = dataclasses.replace(PLAIN, steps=None, epochs=2.0)
    assert apply_overrides(by_epochs, ["steps=60"]).epochs is None
    assert apply_overrides(PLAIN, ["epochs=3"]).steps is None
    assert by_epochs.with_total_steps(100).steps == 13  # 2 x 100 / 16, rounded up


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lrr=1", "Did you mean 'lr'"),
        ("crop=321", "Did you mean 'augmentation.crop'?"),
        ("atrous_rates=3,6,9", "Did you mean 'network.atrous_rates'?"),
        ("augmentation.crap=1", "Did you mean 'augmentation.crop'"),
        ("batch=four", "batch must be a whole number, not 'four'"),
        ("batch=2.5", "batch must be a whole number"),
        ("optimizer=adamm", "optimizer must be one of sgd, adam, adamw"),
        ("channels_last=3", "channels_last must be true or false"),
        ("augmentation.crop=1,2,3", "augmentation.crop must be"),
        ("batch", "field=value"),
        ("stages.0.lr=1", "no field 'stages.0.lr'"),
        ("batch=0", "batch must be above 0"),
        ("accumulate=3", "equal pieces"),
    ],
)
def test_wrong_overrides_are_explained(assignment: str, message: str) -> None:
    """One sentence that names the nearest field or the kind of value expected; exit status 2."""
    with pytest.raises(UsageError) as caught:
        apply_overrides(PLAIN, [assignment])
    assert message in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_recipe_goes_through_json_unchanged() -> None:
    """recipe.json in a run's folder is the recipe."""
    assert recipe_from_dict(json.loads(json.dumps(STAGED.to_dict()))) == STAGED
    with pytest.raises(UnknownNameError, match="lerning"):
        recipe_from_dict({**PLAIN.to_dict(), "lerning": 1})


def test_the_hash_sees_what_decides_and_nothing_else() -> None:
    """Workers and loggers may change on resume; the rate, the seed or the loss may not."""
    assert apply_overrides(PLAIN, ["workers=7", "tensorboard=true", "save_every=3"]).digest() == PLAIN.digest()
    for assignment in ("lr=0.1", "seed=1", "loss=dice", "augmentation.flip=0", "steps=101"):
        changed = apply_overrides(PLAIN, [assignment])
        assert changed.digest() != PLAIN.digest()
        assert len(PLAIN.differences(changed)) == 1


def test_stages_share_the_steps() -> None:
    """Each stage has its crop, scale and rate, and `--set steps=…` keeps their proportion."""
    assert STAGED.stage_steps == (650, 50)
    assert STAGED.lr_schedule(649) < 1e-3
    assert STAGED.lr_schedule(650) == 1e-3
    assert STAGED.augmentation_at(649).crop == (513, 513)
    assert STAGED.augmentation_at(650) == Augmentation(crop=(97, 97), scale=(0.75, 1.5))
    assert apply_overrides(STAGED, ["steps=14"]).stage_steps == (13, 1)
    short = apply_overrides(STAGED, ["steps=2"])
    assert short.stage_steps == (2, 0)
    assert short.augmentation_at(1).crop == (513, 513)
    assert apply_overrides(STAGED, ["stages.1.lr=0.5"]).lr_schedule(650) == 0.5


def test_evaluations_are_evenly_spread_and_the_last_is_at_the_end() -> None:
    """Ten evaluations of 100 steps come every ten; a run of three steps has three."""
    assert [done for done in range(1, 101) if PLAIN.should_evaluate(done)] == list(range(10, 101, 10))
    assert [done for done in range(1, 4) if apply_overrides(PLAIN, ["steps=3"]).should_evaluate(done)] == [1, 2, 3]
