"""Recipes by name. A recipe is a function; its docstring states cost, expected result and command.

`own` holds the generated shapes, one's own folder and the models meant to be bundled; `published` repeats what known projects
trained; `papers` what DeepLabV3 and V3+ report. Costs on a GPU are estimates. Expected figures that were not measured here are
cited as published elsewhere, under the protocol of whoever published them.
"""

from deeplabzoo.training.recipes import bundled as bundled
from deeplabzoo.training.recipes import papers as papers
from deeplabzoo.training.recipes import published as published
from deeplabzoo.training.recipes.registry import RECIPES, get_recipe, recipe_table

__all__ = ["RECIPES", "get_recipe", "own", "papers", "published", "recipe_table"]
