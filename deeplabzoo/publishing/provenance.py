"""Where weights come from, as their manifest row tells it: recipe, changes to it, data by hash, initial weights, machine."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deeplabzoo.data.splits import split_hash
from deeplabzoo.errors import UnknownNameError
from deeplabzoo.publishing.run import FinishedRun
from deeplabzoo.train.recipe import INDIFFERENT, Recipe
from deeplabzoo.train.recipes import named_recipe
from deeplabzoo.train.splits import Splits
from deeplabzoo.zoo.checksum import sha256_of
from deeplabzoo.zoo.training import Training

_FILES = (".safetensors", ".tflite", ".pth", ".pt", ".bin")
_WORD = re.compile(r"[A-Za-z][\w.-]*")


def training_of(run: FinishedRun, data: Splits | None) -> Training:
    """Return how the run was made; pictures are counted and hashed where `data` shows them."""
    recipe, report = run.recipe, run.report
    assert recipe.steps is not None
    images = len(data.train) if data else None
    return Training(
        recipe=recipe.name,
        recipe_sha256=report["last"]["recipe_sha256"],
        overrides=overrides(recipe, images),
        commit=report.get("commit"),
        seed=recipe.seed,
        steps=recipe.steps,
        step=run.step,
        epochs=round(recipe.steps * recipe.batch / images, 2) if images else None,
        data=recipe.data,
        split=recipe.train_split,
        images=images,
        split_sha256=split_hash(data.train.names) if data else None,
        initial_weights=initial_weights(recipe),
        chosen=run.chosen,
        hours=float(report["hours"]),
        hardware=_hardware(report["val"]["hardware"], int(report["last"].get("processes", 1))),
        torch=report["val"]["versions"]["torch"],
        date=report["val"]["date"][:10],
        changed_after=tuple(report.get("changed_after", ())),
    )


def overrides(recipe: Recipe, images: int | None) -> tuple[str, ...]:
    """Return the `--set` arguments that make the recipe of this name, as it is filed now, the one that was trained.

    `images` is the number of training pictures, by which epochs become steps. Files are named without their folders.
    """
    try:
        filed = named_recipe(recipe.name)
    except UnknownNameError:
        return ()
    before = filed.to_dict()
    if images:  # a filed number of epochs is as many steps as the changed batch makes of it
        before["steps"] = dataclasses.replace(filed, batch=recipe.batch, accumulate=recipe.accumulate).planned(images).steps
    return tuple(_differences(before, recipe.to_dict(), ""))


def initial_weights(recipe: Recipe) -> str:
    """Say in words what the network started from."""
    if recipe.init:
        return _named(recipe.init)
    if recipe.encoder_init is True:
        return "encoder: timm's ImageNet weights; head untrained"
    if recipe.encoder_init == "auto":
        return "encoder: timm's ImageNet weights where they could be had, else untrained; head untrained"
    return f"encoder: {_named(recipe.encoder_init)}; head untrained" if recipe.encoder_init else "none: untrained"


def recipe_without_paths(recipe: Recipe) -> dict[str, Any]:
    """Return the whole recipe as plain values, with files named without their folders, which are of one machine alone."""
    values = recipe.to_dict()
    return {key: _named(value) if isinstance(value, str) and key in _FILE_FIELDS else value for key, value in values.items()}


_FILE_FIELDS = ("init", "encoder_init", "teacher")


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in after.items():
        unset = not prefix and key in ("steps", "epochs") and value is None  # setting the one unsets the other
        if before.get(key) == value or unset or (not prefix and key in INDIFFERENT):
            continue
        if isinstance(value, Mapping) and isinstance(before.get(key), Mapping):
            yield from _differences(before[key], value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={_argument(Path(value).name if key in _FILE_FIELDS and _is_file(value) else value)}"


def _argument(value: Any) -> str:
    """Return a value as `--set` reads it back."""
    if isinstance(value, str) and _WORD.fullmatch(value) and value.lower() not in ("true", "false", "null", "none"):
        return value
    return json.dumps(value, separators=(",", ":"))


def _is_file(source: Any) -> bool:
    return isinstance(source, str) and (Path(source).suffix in _FILES or Path(source).is_file())


def _named(source: str) -> str:
    if not _is_file(source):
        return source
    path = Path(source)
    return f"{path.name} (sha256 {sha256_of(path)[:12]})" if path.is_file() else path.name


def _hardware(found: Mapping[str, Any], processes: int) -> str:
    one = str(found.get("gpu") or f"{found.get('cpu')}, {found.get('threads')} threads")
    return one if processes == 1 else f"{processes} x {one}"
