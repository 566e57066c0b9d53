"""Recipes by name. A recipe is a function; its docstring states cost, expected result and command.

`own` holds the generated shapes, one's own folder and the models meant to be bundled; `published` repeats what known projects
trained; `papers` what DeepLabV3 and V3+ report. Costs on a GPU are estimates. Expected figures that were not measured here are
cited as published elsewhere, under the protocol of whoever published them.
"""

from deeplabzoo.train.recipes import own, papers, published
from deeplabzoo.train.recipes.filed import RECIPES, named_recipe, table

__all__ = ["RECIPES", "named_recipe", "own", "papers", "published", "table"]
