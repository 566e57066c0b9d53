"""Recipes by name. A recipe is a function; its docstring states cost, expected result and command.

`bundled` holds the generated shapes, a folder of one's own data and the models bundled in the package; `efficientnet_lite`
trains on EfficientNet-Lite encoders; `published` reproduces what known projects and the papers of DeepLabV3 and V3+ report.
Costs on a GPU are estimates. Expected metrics that were not measured here are cited as published elsewhere, under the protocol
of their publisher.
"""

from deeplabzoo.training.recipes import bundled as bundled
from deeplabzoo.training.recipes import efficientnet_lite as efficientnet_lite
from deeplabzoo.training.recipes import published as published
from deeplabzoo.training.recipes.registry import RECIPES, get_recipe, recipe_table

__all__ = ["RECIPES", "bundled", "efficientnet_lite", "get_recipe", "published", "recipe_table"]
