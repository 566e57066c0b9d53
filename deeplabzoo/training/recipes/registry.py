"""Registry of recipes: name -> function."""

from collections.abc import Callable

from deeplabzoo.errors import UnknownNameError, did_you_mean
from deeplabzoo.training.recipe import Recipe

RecipeFunction = Callable[[], Recipe]

RECIPES: dict[str, RecipeFunction] = {}
"""Every recipe by name."""


def register_recipe(function: RecipeFunction) -> RecipeFunction:
    """Register a recipe function under its own name, which must be the `name` of the recipe that it returns."""
    RECIPES[function.__name__] = function
    return function


def get_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UnknownNameError: There is none; the message names similar ones.
    """
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES) or " `python -m deeplabzoo.train --list` shows them."
        raise UnknownNameError(f"There is no recipe '{name}'.{hint}")
    return RECIPES[name]()


def recipe_table() -> str:
    """Return one line per recipe: its name and the first line of its docstring."""
    width = max(map(len, RECIPES))
    return "\n".join(f"{name:<{width}}  {(RECIPES[name].__doc__ or '').strip().splitlines()[0]}" for name in RECIPES)
