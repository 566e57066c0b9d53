"""Every recipe: says what it costs, builds what it names, and still takes the first 20 steps that it took."""

import json
import re

import pytest
import torch
from helpers.golden_curves import GOLDEN, curve

from deeplabzoo.data.dataset import DATASET_NAMES
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.errors import UnknownNameError
from deeplabzoo.models.encoder_table import supports
from deeplabzoo.models.names import parse_name
from deeplabzoo.training.initialization import build_model
from deeplabzoo.training.overrides import recipe_from_dict
from deeplabzoo.training.recipes import RECIPES, get_recipe, recipe_table

WANTED = {
    "shapes",
    "folder",
    "deeplabv3_mobilenetv3_voc",
    "deeplabv3_resnet101_voc",
    "deeplabv3_mobilenetv3_coco",
    "deeplabv3_resnet101_coco",
    "deeplabv3_resnet101_cityscapes",
    "deeplabv3plus_resnet50_voc",
    "deeplabv3plus_mobilenetv2_camvid",
    "deeplabv3plus_mobilenetv2_person",
    "deeplabv3plus_resnet50_person",
    "deeplabv3_resnet101_voc_paper",
    "deeplabv3plus_xception65_voc_paper",
    "deeplabv3plus_xception65_cityscapes_paper",
    *(
        f"deeplabv3plus_{encoder}_{data}"
        for data in ("voc", "cityscapes", "coco")
        for encoder in ("resnet101", "xception65", "mobilenetv2", "drnd54")
    ),
}


def test_every_project_has_its_recipe() -> None:
    """The published projects, the papers, the bundled models, shapes and one's own folder."""
    assert set(RECIPES) >= WANTED
    with pytest.raises(UnknownNameError, match="deeplabv3_resnet101_voc"):
        get_recipe("deeplabv3_resnet101_vok")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_documents_cost_result_and_command(name: str) -> None:
    """The docstring can be checked against reality by reading; the command names this very recipe."""
    text = RECIPES[name].__doc__ or ""
    assert "Cost:" in text
    assert "Expect:" in text
    assert re.search(rf"Run:  python -m deeplabzoo\.train {name} .*--out ", text)
    assert text.strip().splitlines()[0] in recipe_table()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_sound(name: str) -> None:
    """It carries its own name, names data and an encoder that exist at its strides, and goes through JSON."""
    recipe = get_recipe(name)
    assert recipe.name == name
    assert recipe.data in (*DATASET_NAMES, "shapes")
    encoder = parse_name(recipe.model).encoder
    for stride in (recipe.network.output_stride or 16, recipe.evaluation_output_stride or 16):
        assert supports(encoder, stride)
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    planned = recipe.with_total_steps(1000)
    assert planned.steps
    assert planned.lr_schedule(0) > 0
    assert planned.lr_schedule(planned.steps - 1) < planned.lr


@pytest.mark.parametrize("name", [name for name in RECIPES if "paper" in name or "101" in name or name == "folder"])
def test_a_recipes_model_can_be_built(name: str) -> None:
    """With the network options that it asks for, on the meta device: no memory, no download."""
    import dataclasses

    recipe = dataclasses.replace(get_recipe(name), init=None, teacher=None, encoder_init=False)
    with torch.device("meta"):
        net = build_model(recipe, SyntheticShapes("train"))
    assert net.num_classes == 4


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_losses_are_the_golden_ones(name: str) -> None:
    """A change that should not change results shows identical losses; one that should, shows them anew.

    `python tests/helpers/golden_curves.py` writes them.
    """
    golden = json.loads(GOLDEN.read_text())[name]
    assert curve(RECIPES[name]()) == pytest.approx(golden, rel=1e-3)
